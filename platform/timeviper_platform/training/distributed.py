"""What rank 0 does for all ranks, who get its result or its failure; sums; and whether all ranks come to the same end.

Knows torch.distributed; does not know what is done.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

T = TypeVar("T")


def from_rank_0(act: Callable[[], T]) -> T:
    """What `act` returns on rank 0, on every rank; collective. The result must be picklable.

    Raises:
        ValueError: on every rank, when `act` raised one.
        RuntimeError: on every other rank, when `act` raised anything else; rank 0 raises that itself.
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


def sum_over_ranks(figures: Tensor) -> None:
    """Sums `figures` over all ranks, in place; collective. Where torch.distributed is not up, this process is all."""
    if dist.is_initialized():
        dist.all_reduce(figures)


def all_ranks_end(timeout_s: float) -> bool:
    """True when every rank has called this by then: none waits in a collective for one that ends."""
    store = PrefixStore("timeviper-end", _get_default_store())
    store.set(str(dist.get_rank()), "")
    try:
        store.wait([str(rank) for rank in range(dist.get_world_size())], timedelta(seconds=timeout_s))
    except RuntimeError:  # of torch's stores, when the time is over or the store's process is gone
        return False
    return True
