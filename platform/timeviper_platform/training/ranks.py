"""What rank 0 does for all ranks: they get its result, or its failure, and none waits for another that has ended.

Knows torch.distributed; does not know what is done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

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
