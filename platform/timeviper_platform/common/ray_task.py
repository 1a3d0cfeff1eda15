"""One function call as a Ray task with its resources."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from timeviper_platform.common.cluster_checks import StorageProof, check_cluster_can_give, storage_proof
from timeviper_platform.common.logs import setup_logging
from timeviper_platform.common.ray_cluster import connect, has_cluster

T = TypeVar("T")


def run_as_task(
    function: Callable[..., T],
    *arguments: Any,
    resources: Mapping[str, float],
    wanted_by: str,
    way_out: str,
    folders: Mapping[str, str] | None = None,
) -> T:
    """Returns `function(*arguments)`, run by a task of the cluster in RAY_ADDRESS, else in this process.

    Args:
        function: of a module, with arguments that can be pickled.
        resources: CPU (default 0), GPU, memory (bytes) and custom resources of Ray.
        wanted_by, way_out: see `check_cluster_can_give`.
        folders: configuration key -> folder that the task must share with this process.

    Raises:
        ValueError: if no node can ever have the resources.
        RuntimeError: if a folder cannot be written, or the task's node has one of its own.
    """
    with storage_proof(folders or {}) as proof:
        if not has_cluster():
            return function(*arguments)
        with connect(log_to_driver=True):
            import ray

            check_cluster_can_give(resources, wanted_by=wanted_by, way_out=way_out)
            remote: Any = ray.remote(_run_checked).options(**task_options(resources), max_retries=1)
            result: T = ray.get(remote.remote(proof, function, arguments))
            return result


def task_options(resources: Mapping[str, float]) -> dict[str, Any]:
    """Returns Ray's options of a task with these resources."""
    custom = dict(resources)
    options = {"num_cpus": custom.pop("CPU", 0), "num_gpus": custom.pop("GPU", 0)}
    if memory := custom.pop("memory", 0):
        options["memory"] = memory
    return {**options, "resources": custom}


def _run_checked(proof: StorageProof, function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    setup_logging(logging.INFO)
    proof.check()
    return function(*arguments)
