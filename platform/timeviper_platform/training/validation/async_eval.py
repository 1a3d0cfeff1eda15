"""Validates checkpoints in other processes, one at a time, while training continues.

step 500 -> checkpoint committed -> evaluation -> its metrics join the row of step 500
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from timeviper_platform.training.config import TrainConfig

logger = logging.getLogger(__name__)


class EvalTask(NamedTuple):
    config: TrainConfig
    phase: str
    checkpoint: str
    step: int
    """Step of the phase."""
    global_step: int


class EvalHandle(Protocol):
    def metrics(self) -> dict[str, float] | None:
        """Returns None while it runs; raises if it failed."""

    def close(self) -> None:
        """Ends the evaluation in any state."""


StartEval = Callable[[EvalTask], EvalHandle]


class AsyncEvaluator:
    """Evaluations of one phase, on rank 0. Failures are logged."""

    def __init__(self, start: StartEval, write: Callable[[dict[str, Any]], None]) -> None:
        self._start = start
        self._write = write
        self._waiting: deque[EvalTask] = deque()
        self._current: tuple[EvalTask, EvalHandle] | None = None

    def submit(self, task: EvalTask) -> None:
        """Queues an evaluation until its checkpoint is committed."""
        self._waiting.append(task)

    def poll(self, committed: int) -> bool:
        """Starts and collects evaluations; returns whether any are left.

        `committed` is the newest committed global step.
        """
        if self._current is not None and self._has_ended(*self._current):
            self._current = None
        if self._current is None and self._waiting and self._waiting[0].global_step <= committed:
            task = self._waiting.popleft()
            try:
                self._current = task, self._start(task)
            except Exception as error:  # noqa: BLE001 - training continues without its metrics
                _warn(task, error)
        return self._current is not None or bool(self._waiting)

    def _has_ended(self, task: EvalTask, handle: EvalHandle) -> bool:
        try:
            metrics = handle.metrics()
        except Exception as error:  # noqa: BLE001 - training continues without its metrics
            handle.close()
            _warn(task, error)
            return True
        if metrics is None:
            return False
        handle.close()
        self._write({"phase": task.phase, "step": task.step, "global_step": task.global_step, **metrics})
        return True

    def close(self) -> None:
        left = [*([self._current[0]] if self._current else []), *self._waiting]
        if self._current is not None:
            self._current[1].close()
            self._current = None
        self._waiting.clear()
        if left:
            steps = ", ".join(str(task.step) for task in left)
            logger.warning("%s: validation after step %s was not finished", left[0].phase, steps)


def _warn(task: EvalTask, error: Exception) -> None:
    reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
    logger.warning("%s step %d: validation failed: %s", task.phase, task.step, reason)
