"""Small collectives."""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from timeviper_platform.common import storage

T = TypeVar("T")

VISIBLE_S = 10.0
"""Maximum seconds until a network file system shows a new file on all nodes."""


def from_rank_0(act: Callable[[], T]) -> T:
    """Returns rank 0's result of `act` on every rank; collective.

    Raises:
        ValueError: on every rank, if `act` raised one.
        RuntimeError: on the other ranks, for any other error.
    """
    outcome: list[Any] = [None, None, None]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcome[0] = act()
        except Exception as error:  # noqa: BLE001 - raised below, on every rank
            failure = error
            outcome[1:] = [isinstance(error, ValueError), f"{error}"]
    dist.broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    result, is_value_error, message = outcome
    if message is not None:
        raise ValueError(message) if is_value_error else RuntimeError(f"rank 0: {message}")
    return cast(T, result)


def raise_on_all_ranks(act: Callable[[], T]) -> list[T]:
    """Returns the results of all ranks, or raises RuntimeError on all; collective."""
    outcome: tuple[T | None, str | None]
    try:
        outcome = act(), None
    except Exception as error:  # noqa: BLE001 - raised below, on every rank
        outcome = None, f"rank {dist.get_rank()} on {socket.gethostname()}: {error}"
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    if failures := [failure for _, failure in outcomes if failure is not None]:
        raise RuntimeError("; ".join(failures))
    return [result for result, _ in outcomes]


def check_shared_folder(uri: str) -> None:
    """Raises ValueError on every rank if any does not see what rank 0 writes there; collective."""
    if dist.get_world_size() == 1:
        return
    probe = from_rank_0(lambda: _write_probe(uri))
    host = socket.gethostname()
    seen = raise_on_all_ranks(lambda: (host, _becomes_visible(probe)))
    from_rank_0(lambda: storage.remove(probe))
    blind = [f"rank {rank} on {where}" for rank, (where, sees) in enumerate(seen) if not sees]
    if blind:
        raise ValueError(
            f"{', '.join(blind)} cannot see the files that rank 0 on {seen[0][0]} writes into {uri}: checkpoints need a"
            " folder that all nodes share; set `runs` to one, such as s3://bucket/runs or a network file system"
        )


def _write_probe(uri: str) -> str:
    probe = storage.join_uri(uri, f".seen-by-all-ranks-{uuid.uuid4().hex}")
    storage.write_bytes(probe, b"")
    return probe


def _becomes_visible(uri: str) -> bool:
    deadline = time.monotonic() + VISIBLE_S
    while not (is_visible := storage.exists(uri)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return is_visible


def ranks_of_machine() -> list[int]:
    """Returns the ranks that share this rank's machine and temporary folder; collective."""
    machine = [socket.gethostname()]
    with suppress(OSError):  # only Linux identifies boots and mount namespaces
        machine.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        machine.append(str(Path("/proc/self/ns/mnt").readlink()))
    machines: list[list[str]] = [machine] * dist.get_world_size()
    dist.all_gather_object(machines, machine)
    return [rank for rank, other in enumerate(machines) if other == machine]


def sum_over_ranks(values: Tensor) -> None:
    """Sums in place; does nothing without torch.distributed."""
    if dist.is_initialized():
        dist.all_reduce(values)


def shared_store(prefix: str) -> Any:
    """Returns torch.distributed's key-value store; torch has no public name for it."""
    return PrefixStore(prefix, _get_default_store())


def all_ranks_end(timeout_s: float, *, world_size: int | None = None) -> bool:
    """Returns whether every rank calls this in time."""
    store = shared_store("timeviper-end")
    store.set(str(dist.get_rank()), "")
    ranks = range(dist.get_world_size() if world_size is None else world_size)
    try:
        store.wait([str(rank) for rank in ranks], timedelta(seconds=timeout_s))
    except RuntimeError:  # torch's stores raise it on a time-out, and if the store's process is gone
        return False
    return True
