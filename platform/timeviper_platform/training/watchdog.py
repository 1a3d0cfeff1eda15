"""Ends a rank that makes no progress, and says which rank the others wait for.

A rank that hangs in a collective cannot be told so by an exception: each one writes where it stands into the store that
torch.distributed was brought up with, and a thread of each reads the others' marks when its own has not moved for the
time-out. Knows steps and places by name; does not know what is done there.

    rank 0   step 8, computing      waits for rank 1
    rank 1   step 7, reading        is named
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
"""EX_SOFTWARE of sysexits.h; launchers start the group again after any code but 0"""
PLACES = ("reading", "computing", "saving", "evaluating")
"""of a step, in their order"""
BEATS = 8
"""signs of life in one time-out"""
STORE_TIMEOUT_S = 10.0
"""a store that answers no sooner is on a machine that hangs"""


class Mark(NamedTuple):
    """Where a rank stands."""

    step: int
    place: str
    beat: int
    """how often its watchdog has woken: a process that is stopped makes none"""


class Watchdog:
    """Watches the block; `mark` is called by the rank's main thread.

    Args:
        timeout_s: without a new mark for so long, the process ends.
        end: what then happens to this process, given the report.
    """

    def __init__(self, timeout_s: float, end: Callable[[str], None] | None = None) -> None:
        self._timeout_s = timeout_s
        self._end = end or _end_process
        self._store: Any = shared_store("timeviper-watchdog")
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._mark = Mark(0, PLACES[0], 0)
        self._moved = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._tell()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()

    def mark(self, step: int, place: str) -> None:
        """The rank enters this place of this step."""
        self._mark = Mark(step, place, self._mark.beat)
        self._moved = time.monotonic()

    def _watch(self) -> None:
        while self._beat():
            waited_s = time.monotonic() - self._moved
            if waited_s > self._timeout_s:
                report = self._agreed_report() or "the store on rank 0 does not answer"
                where = f"rank {self._rank} made no progress for {waited_s:.0f} s at {_place(self._mark)}"
                self._end(f"{where}: {report}")
                return

    def _beat(self) -> bool:
        """Waits a little and shows that this process lives; False when the block is left."""
        if self._closed.wait(self._timeout_s / BEATS):
            return False
        self._mark = self._mark._replace(beat=self._mark.beat + 1)
        _within(STORE_TIMEOUT_S, self._tell)
        return True

    def _tell(self) -> None:
        self._store.set(str(self._rank), json.dumps(self._mark))

    def _agreed_report(self) -> str | None:
        """The report of whichever rank was first: it has seen all of them before any ended."""
        report = self._report()
        first = [report]

        def agree() -> None:
            first[0] = self._store.compare_set("report", "", report or "").decode()

        return first[0] if _within(STORE_TIMEOUT_S, agree) and first[0] else report

    def _report(self) -> str | None:
        before = self._read_all()
        for _ in range(BEATS // 2):
            self._beat()  # the others look at this rank too
        after = self._read_all()
        if before is None or after is None:
            return None
        silent = [rank for rank in after if after[rank].beat == before[rank].beat]
        if silent:
            return f"no sign of life from {_ranks(silent)}: its process is stopped or its machine is gone"
        order = {rank: (mark.step, PLACES.index(mark.place)) for rank, mark in after.items()}
        last = [rank for rank in after if order[rank] == min(order.values())]
        if len(last) == len(after):
            return "all ranks are there; a collective hangs"
        return f"the others wait for {_ranks(last)} at {_place(after[last[0]])}"

    def _read_all(self) -> dict[int, Mark] | None:
        marks: dict[int, Mark] = {}

        def read() -> None:
            for rank in range(self._world_size):
                marks[rank] = Mark(*json.loads(self._store.get(str(rank))))

        return marks if _within(STORE_TIMEOUT_S, read) else None


def _within(timeout_s: float, act: Callable[[], None]) -> bool:
    """Runs `act` in a thread; False when it has not ended well by then."""
    ended_well = threading.Event()

    def run() -> None:
        with contextlib.suppress(RuntimeError):  # the store's own error: its process is gone
            act()
            ended_well.set()

    threading.Thread(target=run, name="watchdog-store", daemon=True).start()
    return ended_well.wait(timeout_s)


def _end_process(report: str) -> None:
    logger.error("%s", report)
    for handler in logging.getLogger().handlers:
        handler.flush()
    os._exit(HANG_EXIT_CODE)  # the main thread is inside a collective, where no exception reaches it


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def _place(mark: Mark) -> str:
    return f"step {mark.step}, {mark.place}"
