"""How a run ends before its last step, and what its user is told.

Knows the kinds of ends: numbers that are not finite, too many damaged samples, no memory left, a stop that somebody
asked for. Does not know how they are found (step.py, loader.py) or what is saved (phase_run.py).
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from enum import IntEnum
from types import FrameType

import torch
import torch.distributed as dist


class FatalTrainingError(RuntimeError):
    """Every rank raises it alike, and another attempt from the same checkpoint would meet it again."""


class StoppedError(RuntimeError):
    """The run was asked to stop and has; its state is in the newest committed checkpoint."""


class Interrupt(IntEnum):
    """What somebody outside wants of a run; the largest of all ranks' interrupts counts."""

    NONE = 0
    SAVE = 1
    """a checkpoint now, then on: a node will be taken away, and its scheduler ends the run itself"""
    STOP = 2
    """a checkpoint now, and an end"""


InterruptSource = Callable[[], Interrupt]
"""Asked by every rank before every step and every held-out batch, in the same order; may hold a barrier."""


def no_interrupts() -> Interrupt:
    """Nobody wants anything."""
    return Interrupt.NONE


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[InterruptSource]:
    """SIGTERM, which schedulers and spot markets send before they kill, as a wish to stop. Main thread only."""
    asked = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        asked.set()

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: Interrupt.STOP if asked.is_set() else Interrupt.NONE
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def out_of_memory_advice(*, step: int, largest_pack: int) -> Iterator[None]:
    """Tells what to change when the block runs out of memory.

    Args:
        step: that is being run.
        largest_pack: tokens of this rank's largest pack in it.

    Raises:
        RuntimeError: on the rank that has no memory left; the other ranks lose their connection to it.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError; so is the CPU's
        if not _is_out_of_memory(error):
            raise
        raise RuntimeError(
            f"rank {dist.get_rank()} is out of memory at {step = }, with a pack of {largest_pack} tokens: lower"
            " packing.max_tokens of the phase, or set activation_checkpointing: true, a higher zero.stage,"
            " zero.offload_optimizer: true or more workers; jobs/train.py --dry-run tells what each costs."
            f" ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        "DefaultCPUAllocator" in text or "not enough memory" in text or "CUDA out of memory" in text
    )
