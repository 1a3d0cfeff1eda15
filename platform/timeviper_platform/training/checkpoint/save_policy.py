"""Checkpoints while a phase goes on: one is written behind the steps, and one that cannot be written is made again.

Knows when a failed save ends the run and whom to tell of a committed one. Does not know what is in a checkpoint, nor
how it is written (checkpoint.py). What storage refuses for a passing reason has been tried again there before.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from timeviper_platform.training.checkpoint.manager import Checkpoints, SaveFailedError, Snapshot

logger = logging.getLogger(__name__)

OnCheckpoint = Callable[[str, dict[str, Any]], None]
"""Called on every rank after a commit, with the checkpoint's URI and the row of its step. It is called when the next
checkpoint is due or the phase ends, since all ranks must be in the same place."""

FIRST_WAIT_S = 5.0
"""before a phase's last checkpoint is made again; doubled every time"""


class Checkpointer:
    """The checkpoints of one phase; every method is collective.

    Args:
        checkpoints: of the run.
        max_failed: saves in a row that may fail.
        before_commit: called on rank 0, for what must be stored before a checkpoint counts.
        on_checkpoint: see OnCheckpoint.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        *,
        max_failed: int,
        before_commit: Callable[[], None] | None,
        on_checkpoint: OnCheckpoint | None,
    ) -> None:
        self._checkpoints = checkpoints
        self._max_failed = max_failed
        self._before_commit = before_commit
        self._on_checkpoint = on_checkpoint
        self._row: dict[str, Any] = {}
        self._newest: str | None = None
        self._num_in_a_row = 0
        self.num_failed = 0
        """saves of this attempt at the phase that failed"""

    def start(self, snapshot: Snapshot, row: dict[str, Any]) -> None:
        """Writes the snapshot behind the next steps; call `settle` before. The last that may fail is waited for.

        Raises:
            SaveFailedError: see `settle`.
        """
        self._row = row
        self._checkpoints.write(snapshot, self._before_commit)
        if 0 < self._max_failed <= self._num_in_a_row:
            self.settle()

    def settle(self) -> str | None:
        """The checkpoint that was being written, once it is committed and told; None without one, or when it failed.

        Raises:
            SaveFailedError: when more saves in a row failed than may; the checkpoints before them are untouched.
        """
        try:
            uri = self._checkpoints.wait()
        except SaveFailedError as error:
            self.num_failed += 1
            self._num_in_a_row += 1
            if self._num_in_a_row > self._max_failed:
                raise
            logger.warning(
                "%s; training goes on: %d of %d saves in a row that may fail (checkpoint.max_failed_saves)",
                *(error, self._num_in_a_row, self._max_failed),
            )
            return None
        if uri is not None:
            self._newest, self._num_in_a_row = uri, 0
            logger.info("checkpoint %s committed", uri)
            if self._on_checkpoint is not None:
                self._on_checkpoint(uri, self._row)
        return uri

    def finish(self, save: Callable[[], None]) -> str | None:
        """The newest checkpoint, for a state that nothing follows: while it fails and may, `save` makes it again."""
        self.settle()
        while self._num_in_a_row:
            time.sleep(FIRST_WAIT_S * 2 ** (self._num_in_a_row - 1))
            save()
            self.settle()
        return self._newest
