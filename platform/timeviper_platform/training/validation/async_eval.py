"""Looks at the held-out samples beside the training, one after another, while the ranks train on.

    step 500 -> checkpoint 500, committed -> its look begins ... step 537 -> its figures join the row of step 500

Rank 0's alone. Knows which looks wait, which one goes on, and what is told of those that have ended. Does not know what
a look does, nor where: whoever starts the ranks says how a look is started (look_process.py without Ray, trainer.py
with it). A look that fails costs its figures and a warning, never a step.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from timeviper_platform.training.config import TrainConfig

logger = logging.getLogger(__name__)


class EvalTask(NamedTuple):
    """What the process that makes a look has to know."""

    config: TrainConfig
    phase: str
    checkpoint: str
    """committed"""
    step: int
    """of the phase"""
    global_step: int


class EvalHandle(Protocol):
    """A look that goes on elsewhere."""

    def metrics(self) -> dict[str, float] | None:
        """What it found; None while it goes on. Any exception says that it failed."""

    def close(self) -> None:
        """Ends it, wherever it stands."""


StartEval = Callable[[EvalTask], EvalHandle]


class AsyncEvaluator:
    """The looks of one phase.

    Args:
        start: begins one.
        write: is given the row of each that has ended well.
    """

    def __init__(self, start: StartEval, write: Callable[[dict[str, Any]], None]) -> None:
        self._start = start
        self._write = write
        self._waiting: deque[EvalTask] = deque()
        self._current: tuple[EvalTask, EvalHandle] | None = None

    def want(self, task: EvalTask) -> None:
        """Begins once its checkpoint is committed and the looks before it have ended."""
        self._waiting.append(task)

    def advance(self, committed: int) -> bool:
        """Does what can be done without waiting; True while looks are left.

        Args:
            committed: global step of the newest committed checkpoint.
        """
        if self._current is not None and self._has_ended(*self._current):
            self._current = None
        if self._current is None and self._waiting and self._waiting[0].global_step <= committed:
            task = self._waiting.popleft()
            try:
                self._current = task, self._start(task)
            except Exception as error:  # noqa: BLE001 - training goes on without its figures
                _warn(task, error)
        return self._current is not None or bool(self._waiting)

    def _has_ended(self, task: EvalTask, handle: EvalHandle) -> bool:
        try:
            metrics = handle.metrics()
        except Exception as error:  # noqa: BLE001 - training goes on without its figures
            handle.close()
            _warn(task, error)
            return True
        if metrics is None:
            return False
        handle.close()
        self._write({"phase": task.phase, "step": task.step, "global_step": task.global_step, **metrics})
        return True

    def close(self) -> None:
        """Ends what goes on; looks that are left are named."""
        left = [*([self._current[0]] if self._current else []), *self._waiting]
        if self._current is not None:
            self._current[1].close()
            self._current = None
        self._waiting.clear()
        if left:
            steps = ", ".join(str(task.step) for task in left)
            logger.warning("%s: the looks at the held-out samples after step %s are not done", left[0].phase, steps)


def _warn(task: EvalTask, error: Exception) -> None:
    reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
    logger.warning("%s step %d: the look at the held-out samples failed: %s", task.phase, task.step, reason)
