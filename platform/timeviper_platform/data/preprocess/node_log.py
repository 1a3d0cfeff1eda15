"""Log lines for the nodes that join and leave during a run."""

from __future__ import annotations

import logging
import threading

from timeviper_platform.common.cluster_checks import working_nodes

logger = logging.getLogger(__name__)

EVERY_S = 2.0


class NodeLog:
    """Context manager with a thread that watches the connected Ray's nodes."""

    def __init__(self, every_seconds: float = EVERY_S) -> None:
        self._every_seconds = every_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="node-log", daemon=True)
        self._known: dict[str, str] = {}

    def __enter__(self) -> NodeLog:
        self._known = _addresses()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        import ray

        while not self._ended.wait(self._every_seconds):
            try:
                self._compare(_addresses())
            except (ray.exceptions.RayError, RuntimeError) as error:  # a log must not end the run
                logger.debug("cannot list the nodes: %s", error)

    def _compare(self, nodes: dict[str, str]) -> None:
        for node in nodes.keys() - self._known.keys():
            logger.info("node %s joined: %s", nodes[node], _count(nodes))
        for node in self._known.keys() - nodes.keys():
            logger.warning("lost node %s: %s left; its unfinished work starts again", self._known[node], _count(nodes))
        self._known = nodes


def _count(nodes: dict[str, str]) -> str:
    return "1 node" if len(nodes) == 1 else f"{len(nodes)} nodes"


def _addresses() -> dict[str, str]:
    """Returns node id -> address."""
    return {node["NodeID"]: str(node["NodeManagerAddress"]) for node in working_nodes()}
