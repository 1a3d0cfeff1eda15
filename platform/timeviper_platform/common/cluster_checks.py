"""Checks before a run waits for workers: durable outputs, storage that all nodes share, sufficient resources."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timeviper_platform.common import storage
from timeviper_platform.common.ray_cluster import has_autoscaler

logger = logging.getLogger(__name__)

NODE_TIMEOUT_S = 120.0
"""Seconds for all nodes to start a process and check their storage."""

SUBMITTED_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the driver of a submitted job."""


def refuse_lost_outputs(outputs: Mapping[str, str | None]) -> None:
    """Refuses outputs of a submitted job in the folder where Ray unpacked it, a cache that Ray deletes.

    Call it before paths are made absolute.

    Args:
        outputs: configuration key -> path or URI as configured.

    Raises:
        ValueError: for a relative path in a submitted job, or any path in such a cache.
    """
    is_submitted = SUBMITTED_VARIABLE in os.environ
    for key, uri in outputs.items():
        if uri is None or not storage.is_local(uri):
            continue
        path = Path(uri.removeprefix("file://")).expanduser()
        if (is_submitted and not path.is_absolute()) or _is_in_job_cache((Path.cwd() / path).resolve()):
            raise ValueError(
                f"{key} = {uri!r} lies in the working folder of a submitted job, which Ray deletes; give an absolute"
                f" path on storage that every node mounts, or a URI such as s3://bucket/{path.name}"
            )


def _is_in_job_cache(path: Path) -> bool:
    """Whether Ray unpacked a job's working_dir in one of the folders above."""
    return any(
        folder.name == "working_dir_files" and folder.parent.name == "runtime_resources" for folder in path.parents
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageProof:
    """What every process of a run must see. Pickled to workers."""

    folders: Mapping[str, str] = field(default_factory=dict)
    """configuration key -> folder in which the driver has put `file` and every worker must be able to write"""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """configuration key -> file or folder that must exist"""
    file: str = ""

    def problems(self) -> list[str]:
        """Returns what this process does not see, one line each."""
        found = []
        for key, folder in self.folders.items():
            try:
                if not storage.exists(storage.join_uri(folder, self.file)):
                    found.append(f"{key} {storage.shown_uri(folder)} is not the folder that the driver writes to")
                else:
                    storage.ensure_writable(folder)
            except (OSError, RuntimeError) as error:
                found.append(f"{key}: {error}")
        for key, uri in self.inputs.items():
            try:
                if not storage.exists(uri):
                    found.append(f"{key} {storage.shown_uri(uri)} does not exist there")
            except OSError as error:
                found.append(f"{key}: {error}")
        return found

    def check(self) -> None:
        """Raises RuntimeError with what this process does not see."""
        if problems := self.problems():
            raise RuntimeError(
                f"{socket.gethostname()} lacks storage of the run: {'; '.join(problems)}; mount it at the same path on"
                " every node, or use a URI such as s3://"
            )


@contextlib.contextmanager
def storage_proof(folders: Mapping[str, str], inputs: Mapping[str, str] | None = None) -> Iterator[StorageProof]:
    """Puts a file of a unique name in each folder and removes it at the end. See `StorageProof`.

    Raises:
        RuntimeError: if the driver cannot write a folder.
    """
    proof = StorageProof(folders=dict(folders), inputs=dict(inputs or {}), file=f".proof-{uuid.uuid4().hex}")
    uris = [storage.join_uri(folder, proof.file) for folder in proof.folders.values()]
    try:
        for uri in uris:
            storage.write_bytes(uri, b"")
        yield proof
    finally:
        for uri in uris:
            with contextlib.suppress(OSError, RuntimeError):
                storage.remove(uri)


def check_every_node(proof: StorageProof, *, timeout_s: float = NODE_TIMEOUT_S) -> int:
    """Checks `proof` in a process on every node that has CPUs or GPUs; returns their number.

    Needs a connected Ray. Nodes that join later are not checked: let workers call `proof.check()`.

    Raises:
        RuntimeError: with the nodes that do not see the storage.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote = ray.remote(num_cpus=0, max_retries=0)(_problems_of)
    nodes = working_nodes()
    names = {
        remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            proof
        ): f"node {node['NodeManagerAddress']}"
        for node in nodes
    }
    ended, waiting = ray.wait(list(names), num_returns=len(names), timeout=timeout_s) if names else ([], [])
    problems = [f"{names[ref]} did not answer within {timeout_s:g} s" for ref in waiting]
    for ref in ended:
        try:
            problems += [f"{names[ref]}: {problem}" for problem in ray.get(ref)]
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError as error:
            logger.warning("%s was lost while its storage was checked: %s", names[ref], type(error).__name__)
    if problems:
        raise RuntimeError(
            f"nodes lack storage of the run: {'; '.join(problems)}; mount it at the same path on every node, or use a"
            " URI such as s3://"
        )
    return len(nodes)


def _problems_of(proof: StorageProof) -> list[str]:
    return proof.problems()


def working_nodes() -> list[dict[str, Any]]:
    """Returns the entries of `ray.nodes()` that are alive and offer CPUs or GPUs; a head often offers none."""
    import ray

    return [
        node
        for node in ray.nodes()
        if node["Alive"] and any(node["Resources"].get(name, 0) > 0 for name in ("CPU", "GPU"))
    ]


def check_cluster_can_give(bundle: Mapping[str, float], *, wanted_by: str, way_out: str) -> None:
    """Refuses a worker that no node can ever hold. Needs a connected Ray.

    Passes with a warning while nodes may still join: with an autoscaler, or while only a head without CPUs and GPUs
    is up.

    Args:
        bundle: resources that one node must have, for example {"GPU": 8}.
        wanted_by: for the message, such as "each worker (execution.gpus_per_worker)".
        way_out: what to change.

    Raises:
        ValueError: if no node is large enough, and none can be added.
    """
    nodes = [node["Resources"] for node in working_nodes()]
    if any(all(node.get(name, 0.0) >= amount for name, amount in bundle.items()) for node in nodes):
        return
    lacking = [
        f"{amount:g} {_plural(name, amount)} wanted by {wanted_by}, largest node has"
        f" {max((node.get(name, 0.0) for node in nodes), default=0.0):g}"
        for name, amount in bundle.items()
        if all(node.get(name, 0.0) < amount for node in nodes)
    ] or [f"no node has {', '.join(f'{amount:g} {name}' for name, amount in bundle.items())} together"]
    types = largest_node_types()
    can_grow = not nodes or (
        has_autoscaler()
        if types is None
        else any(all(node.get(name, 0.0) >= amount for name, amount in bundle.items()) for node in types)
    )
    if not can_grow:
        raise ValueError(f"{'; '.join(lacking)}, and the cluster adds no larger one; {way_out}")
    logger.warning("waiting for nodes: %s", "; ".join(lacking))


def _plural(name: str, amount: float) -> str:
    return f"{name}s" if name in ("CPU", "GPU") and amount != 1 else name


def largest_node_types() -> list[dict[str, float]] | None:
    """Returns the resources of the node types that may be added; None if no autoscaler (v2) has reported them."""
    from ray._private.state import state  # no public API; Ray Train also reads it here

    config = state.get_cluster_config()
    groups = [] if config is None else list(config.node_group_configs)
    return [dict(group.resources) for group in groups if group.max_count] or None
