"""Saves the checkpoints of a phase while it trains, and tolerates saves that fail."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from timeviper_platform.training.checkpoint.manager import CheckpointConfig, Checkpoints, SaveFailedError, Snapshot
from timeviper_platform.training.checkpoint.state import TrainState

logger = logging.getLogger(__name__)

OnCheckpoint = Callable[[str, dict[str, Any]], None]
"""Called on every rank after a commit, with the checkpoint's URI and the metrics row of its step. The call comes when
the next checkpoint is due or the phase ends, where all ranks are at the same point."""


class Checkpointer:
    """The checkpoints of one phase; every method is collective.

    Args:
        checkpoints: Of the run.
        config: How many failed saves to tolerate.
        snapshot: Copies this rank's state.
        log: Receives the row of a saved step, complete with the time it cost.
        before_commit: Called on rank 0 for whatever must be stored before a checkpoint counts.
        on_checkpoint: See OnCheckpoint.
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
        """Failed saves of this attempt at the phase."""

    def save(self, state: TrainState, row: dict[str, Any]) -> None:
        """Snapshots `state` and writes it behind the next steps; adds `checkpoint_stall_s` to the step's row.

        The steps wait until the previous checkpoint is finished and this one is in memory; if one more failure would
        end the run, until it is committed.

        Raises:
            SaveFailedError: if more saves in a row failed than allowed; earlier checkpoints are untouched.
        """
        started = time.perf_counter()
        self._settle()
        snapshot = self._snapshot(state)
        row |= {"checkpoint_stall_s": time.perf_counter() - started, "num_failed_saves": self.num_failed}
        self._log(row)  # before the commit, which must not lack its row
        self._last = state, row
        self._checkpoints.write(snapshot, self._before_commit)
        if 0 < self._config.max_failed_saves <= self._failures_in_a_row:
            self._settle()

    def finish(self) -> str | None:
        """Waits for the newest checkpoint and repeats it while it fails; None if this attempt has saved none.

        Raises:
            SaveFailedError: see `save`.
        """
        self._settle()
        while self._failures_in_a_row and self._last is not None:
            time.sleep(self._config.retry_wait_s * 2 ** (self._failures_in_a_row - 1))
            self.save(*self._last)
            self._settle()
        return self._newest

    def _settle(self) -> None:
        """Waits for the checkpoint that is being written, and reports it once it is committed."""
        try:
            uri = self._checkpoints.wait()
        except SaveFailedError as error:
            self.num_failed += 1
            self._failures_in_a_row += 1
            if self._failures_in_a_row > self._config.max_failed_saves:
                raise
            logger.warning(
                "%s; training goes on: %d of %d saves in a row may fail (checkpoint.max_failed_saves)",
                *(error, self._failures_in_a_row, self._config.max_failed_saves),
            )
            return
        if uri is not None and self._last is not None:
            self._newest, self._failures_in_a_row = uri, 0
            logger.info("checkpoint %s committed", uri)
            if self._on_checkpoint is not None:
                self._on_checkpoint(uri, self._last[1])
