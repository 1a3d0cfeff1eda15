"""Ends a rank that makes no progress, and names the rank that the others wait for.

A thread reads the marks of all ranks from torch.distributed's store:

    rank 0   step 8, computing      waits for rank 1
    rank 1   step 7, reading        is named in the log
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

import torch.distributed as dist

from timeviper_platform.training.distributed import shared_store

logger = logging.getLogger(__name__)

HANG_EXIT_CODE = 70
"""EX_SOFTWARE of sysexits.h; launchers restart the group."""
ACTIVITIES = ("reading", "computing", "saving", "evaluating")
BEATS = 8
"""Signs of life per timeout."""
STORE_TIMEOUT_S = 10.0
"""Maximum seconds for an answer of the store."""


class Mark(NamedTuple):
    step: int
    activity: str
    beat: int
    """Number of times the watchdog woke up; constant in a stopped process."""


class Watchdog:
    """Watches a `with` block whose main thread calls `mark`.

    Args:
        timeout_s: maximum seconds between two marks.
        end: called with the report; by default ends the process.
    """

    def __init__(self, timeout_s: float, end: Callable[[str], None] | None = None) -> None:
        self._timeout_s = timeout_s
        self._end = end or _end_process
        self._store: Any = shared_store("timeviper-watchdog")
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._mark = Mark(0, ACTIVITIES[0], 0)
        self._moved = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._publish()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()

    def mark(self, step: int, activity: str) -> None:
        self._mark = Mark(step, activity, self._mark.beat)
        self._moved = time.monotonic()

    def _watch(self) -> None:
        while self._wait_and_beat():
            waited_s = time.monotonic() - self._moved
            if waited_s > self._timeout_s:
                report = self._agreed_report() or "the store on rank 0 does not answer"
                where = f"rank {self._rank} made no progress for {waited_s:.0f} s at {_described(self._mark)}"
                self._end(f"{where}: {report}")
                return

    def _wait_and_beat(self) -> bool:
        """Waits and publishes a sign of life; returns False after the block."""
        if self._closed.wait(self._timeout_s / BEATS):
            return False
        self._mark = self._mark._replace(beat=self._mark.beat + 1)
        _completes_within(STORE_TIMEOUT_S, self._publish)
        return True

    def _publish(self) -> None:
        self._store.set(str(self._rank), json.dumps(self._mark))

    def _agreed_report(self) -> str | None:
        """Returns the first rank's report, made before any rank ended."""
        report = self._report()
        first = [report]

        def agree() -> None:
            first[0] = self._store.compare_set("report", "", report or "").decode()

        return first[0] if _completes_within(STORE_TIMEOUT_S, agree) and first[0] else report

    def _report(self) -> str | None:
        before = self._read_all()
        for _ in range(BEATS // 2):
            self._wait_and_beat()  # other ranks check this one too
        after = self._read_all()
        if before is None or after is None:
            return None
        silent = [rank for rank in after if after[rank].beat == before[rank].beat]
        if silent:
            return f"no sign of life from {_ranks(silent)}: the process is stopped or the machine is lost"
        order = {rank: (mark.step, ACTIVITIES.index(mark.activity)) for rank, mark in after.items()}
        last = [rank for rank in after if order[rank] == min(order.values())]
        if len(last) == len(after):
            return "all ranks are at the same point; a collective hangs"
        return f"the others wait for {_ranks(last)} at {_described(after[last[0]])}"

    def _read_all(self) -> dict[int, Mark] | None:
        marks: dict[int, Mark] = {}

        def read() -> None:
            for rank in range(self._world_size):
                marks[rank] = Mark(*json.loads(self._store.get(str(rank))))

        return marks if _completes_within(STORE_TIMEOUT_S, read) else None


def _completes_within(timeout_s: float, act: Callable[[], None]) -> bool:
    """Returns False if `act` fails or is late."""
    succeeded = threading.Event()

    def run() -> None:
        with contextlib.suppress(RuntimeError):  # the store's process is gone
            act()
            succeeded.set()

    threading.Thread(target=run, name="watchdog-store", daemon=True).start()
    return succeeded.wait(timeout_s)


def _end_process(report: str) -> None:
    logger.error("%s", report)
    for handler in logging.getLogger().handlers:
        handler.flush()
    os._exit(HANG_EXIT_CODE)  # the main thread hangs in a collective


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def _described(mark: Mark) -> str:
    return f"step {mark.step}, {mark.activity}"
