"""Early ends of a run."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from enum import IntEnum
from types import FrameType

import torch


class FatalTrainingError(RuntimeError):
    """A failure that a retry would repeat; raised on every rank."""


class StoppedError(RuntimeError):
    """Training stopped on request."""


class Interrupt(IntEnum):
    """A request from outside the training loop. The strongest of any rank wins."""

    NONE = 0
    SAVE = 1
    """Save and continue, because a node will be removed."""
    STOP = 2


InterruptSource = Callable[[], Interrupt]
"""Called by every rank before every step and validation batch; may be collective."""


def no_interrupts() -> Interrupt:
    return Interrupt.NONE


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[InterruptSource]:
    """Requests STOP after SIGTERM. Main thread only."""
    received = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        received.set()

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: Interrupt.STOP if received.is_set() else Interrupt.NONE
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def out_of_memory_advice(*, rank: int, step: int, largest_pack: int) -> Iterator[None]:
    """Adds the settings to change to an out-of-memory error."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError; so is the CPU's
        if not _is_out_of_memory(error):
            raise
        raise RuntimeError(
            f"rank {rank} is out of memory at {step = }, with a pack of {largest_pack} tokens: lower"
            " packing.max_tokens of the phase, or set activation_checkpointing: true, a higher zero.stage,"
            " zero.offload_optimizer: true or more workers; jobs/train.py --dry-run estimates each."
            f" ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        "DefaultCPUAllocator" in text or "not enough memory" in text or "CUDA out of memory" in text
    )
