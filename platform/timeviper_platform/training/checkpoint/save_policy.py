"""Saves checkpoints during a phase, and tolerates failed saves."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from timeviper_platform.training.checkpoint.manager import CheckpointConfig, Checkpoints, SaveFailedError, Snapshot
from timeviper_platform.training.checkpoint.state import TrainState

logger = logging.getLogger(__name__)

OnCheckpoint = Callable[[str, dict[str, Any]], None]
"""Called on every rank with a committed URI and its metrics row."""


class Checkpointer:
    """Checkpoints of one phase; every method is collective.

    Args:
        log: receives the row of a saved step.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        config: CheckpointConfig,
        *,
        snapshot: Callable[[TrainState], Snapshot],
        log: Callable[[dict[str, Any]], None],
        before_commit: Callable[[], None] | None,
        on_checkpoint: OnCheckpoint | None,
    ) -> None:
        self._checkpoints = checkpoints
        self._config = config
        self._snapshot = snapshot
        self._log = log
        self._before_commit = before_commit
        self._on_checkpoint = on_checkpoint
        self._last: tuple[TrainState, dict[str, Any]] | None = None
        self._newest: str | None = None
        self._failures_in_a_row = 0
        self.num_failed = 0

    def save(self, state: TrainState, row: dict[str, Any]) -> None:
        """Saves `state` in the background, and adds the snapshot's time to the row.

        Raises:
            SaveFailedError: if more saves in a row failed than allowed.
        """
        started = time.perf_counter()
        self._settle()
        snapshot = self._snapshot(state)
        row |= {"checkpoint_stall_s": time.perf_counter() - started, "num_failed_saves": self.num_failed}
        self._log(row)  # before the commit: a committed step must have its row
        self._last = state, row
        self._checkpoints.write(snapshot, self._before_commit)
        if 0 < self._config.max_failed_saves <= self._failures_in_a_row:
            self._settle()

    def finish(self) -> str | None:
        """Waits for the newest checkpoint, repeating failed saves."""
        self._settle()
        while self._failures_in_a_row and self._last is not None:
            time.sleep(self._config.retry_wait_s * 2 ** (self._failures_in_a_row - 1))
            self.save(*self._last)
            self._settle()
        return self._newest

    def _settle(self) -> None:
        try:
            uri = self._checkpoints.wait()
        except SaveFailedError as error:
            self.num_failed += 1
            self._failures_in_a_row += 1
            if self._failures_in_a_row > self._config.max_failed_saves:
                raise
            logger.warning(
                "%s; training continues: %d of %d saves in a row may fail (checkpoint.max_failed_saves)",
                *(error, self._failures_in_a_row, self._config.max_failed_saves),
            )
            return
        if uri is not None and self._last is not None:
            self._newest, self._failures_in_a_row = uri, 0
            logger.info("checkpoint %s committed", uri)
            if self._on_checkpoint is not None:
                self._on_checkpoint(uri, self._last[1])
