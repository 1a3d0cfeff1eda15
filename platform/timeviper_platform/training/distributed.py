"""Small collectives: a result of rank 0 on every rank, sums, and a barrier that gives up."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

T = TypeVar("T")


def from_rank_0(act: Callable[[], T]) -> T:
    """Runs `act` on rank 0 and returns its picklable result on every rank; collective.

    Raises:
        ValueError: on every rank, if `act` raised one.
        RuntimeError: on every other rank, if `act` raised anything else; rank 0 raises the original.
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


def sum_over_ranks(values: Tensor) -> None:
    """Sums `values` over all ranks, in place; does nothing in a process without torch.distributed."""
    if dist.is_initialized():
        dist.all_reduce(values)


def all_ranks_end(timeout_s: float, *, world_size: int | None = None) -> bool:
    """True if every rank calls this within the time-out, so that none is left waiting in a collective."""
    store = PrefixStore("timeviper-end", _get_default_store())
    store.set(str(dist.get_rank()), "")
    ranks = range(dist.get_world_size() if world_size is None else world_size)
    try:
        store.wait([str(rank) for rank in ranks], timedelta(seconds=timeout_s))
    except RuntimeError:  # torch's stores raise it on a time-out, and if the store's process is gone
        return False
    return True
