"""What a run has done so far and how long it will take: a bar on a terminal, elsewhere a line in the log now and then.

Knows outcomes of units and the clock. Does not know what a run says when it has ended (report.py).
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from timeviper_platform.data.preprocess.worker import TaskResult

logger = logging.getLogger(__name__)

BAR_FORMAT = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} segments{postfix}"


@dataclass(slots=True)
class Progress:
    """Counts outcomes inside a `with`, and shows them."""

    num_segments: int
    num_frames: int
    every_seconds: float
    """between lines of the log; a bar is drawn anew with every unit"""
    outcomes: list[TaskResult] = field(default_factory=list)
    """without what grows with their segments; a plan of ten million has 300 000 units"""
    _last: float = field(default_factory=time.monotonic)
    _segments: int = 0
    _frames: int = 0
    _reasons: Counter[str] = field(default_factory=Counter)
    _begin: float = math.inf
    _end: float = -math.inf
    _bar: Any = None
    _redirection: Any = None
    """of log records, so that they and the bar do not share lines"""

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            self._bar = tqdm(total=self.num_segments, bar_format=BAR_FORMAT, dynamic_ncols=True, file=sys.stderr)
            self._redirection = logging_redirect_tqdm()
            self._redirection.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
            self._redirection.__exit__(*error)

    def add(self, outcome: TaskResult) -> None:
        """Takes note of a finished unit."""
        self.outcomes.append(replace(outcome, media=[], reasons=[], error_types=[], last_error=""))
        num_segments = outcome.num_ok + outcome.num_partial + outcome.num_error
        self._segments += num_segments
        self._frames += outcome.num_frames
        self._reasons.update(outcome.error_types)
        self._begin, self._end = min(self._begin, outcome.started), max(self._end, outcome.ended)
        if self._bar is not None:
            self._bar.set_postfix_str(self._rates(), refresh=False)
            self._bar.update(num_segments)
            return
        now = time.monotonic()
        is_last = self._segments == self.num_segments
        if is_last or now - self._last >= self.every_seconds:
            self._last = now
            logger.info("%s", self.line())

    def line(self) -> str:
        """done/total segments, frames a second, rejects by reason, time left."""
        share = self._segments / max(1, self.num_segments)
        return f"{self._segments}/{self.num_segments} segments ({share:.0%}), {self._rates()}"

    def _rates(self) -> str:
        rate = self._frames / max(1e-9, self._end - self._begin)
        left = max(0, self.num_frames - self._frames) / rate if rate else math.inf
        rejects = ", ".join(f"{count} {kind}" for kind, count in sorted(self._reasons.items())) or "none"
        return f"{rate:.1f} frames/s, rejected: {rejects}, {left:.0f} s left"


class RunMetrics:
    """Counters that grow as units finish."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter

        def counter(name: str, description: str, *tags: str) -> Counter:
            return Counter(f"timeviper_preprocess_{name}", description=description, tag_keys=tags)

        self._frames = counter("frames", "frames encoded and committed")
        self._bytes = counter("feature_bytes", "bytes of features committed")
        self._segments = counter("segments", "segments committed, by status", "status")
        self._errors = counter("errors", "segments with status partial or error, by type", "type")
        self._seconds = counter("stage_seconds", "seconds that workers were busy, by stage", "stage")
        self._retries = counter("retries", "requests to storage that failed for a passing reason")

    def add(self, outcome: TaskResult) -> None:
        """Counts a finished unit."""
        _add(self._frames, outcome.num_frames)
        _add(self._bytes, outcome.feature_bytes)
        _add(self._retries, outcome.retries)
        for status in ("ok", "partial", "error"):
            _add(self._segments, getattr(outcome, f"num_{status}"), status=status)
        for kind in outcome.error_types:
            _add(self._errors, 1, type=kind)
        for stage in ("decode", "encode", "write"):
            _add(self._seconds, getattr(outcome, f"{stage}_seconds"), stage=stage)


def _add(counter: Any, value: float, **tags: str) -> None:
    if value > 0:  # Ray refuses to add nothing
        counter.inc(value, tags=tags)
