"""Small collectives."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

T = TypeVar("T")


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
