"""Shows progress: a bar on a terminal, else log lines; and Ray metrics."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from timeviper_platform.common.logs import shown_time
from timeviper_platform.common.metrics import RayMetrics
from timeviper_platform.common.storage import shown_uri
from timeviper_platform.data.preprocess.report import RunTotals
from timeviper_platform.data.preprocess.tasks import TaskResult
from timeviper_platform.data.store.audit import Outcomes

logger = logging.getLogger(__name__)

BAR_FORMAT = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} segments{postfix}"


@dataclass(slots=True)
class Progress:
    num_segments: int
    num_frames: int
    every_seconds: float
    """seconds between log lines"""
    totals: RunTotals = field(default_factory=RunTotals)
    _last_logged: float = field(default_factory=time.monotonic)
    _segments: Outcomes = field(default_factory=Outcomes)
    _frames: int = 0
    _reasons: Counter[str] = field(default_factory=Counter)
    _started: float = math.inf
    _ended: float = -math.inf
    _bar: Any = None
    _log_redirection: Any = None
    """keeps log records and the bar on separate lines"""

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            self._bar = tqdm(total=self.num_segments, bar_format=BAR_FORMAT, dynamic_ncols=True, file=sys.stderr)
            self._log_redirection = logging_redirect_tqdm()
            self._log_redirection.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
            self._log_redirection.__exit__(*error)

    def add(self, result: TaskResult) -> None:
        self.totals.add(result)
        self._segments += result.segments
        self._frames += result.num_frames
        self._reasons.update(result.error_types)
        self._started, self._ended = min(self._started, result.started), max(self._ended, result.ended)
        if self._bar is not None:
            self._bar.set_postfix_str(self._rates(), refresh=False)
            self._bar.update(result.segments.planned)
            return
        now = time.monotonic()
        is_last = self._segments.planned == self.num_segments
        if is_last or now - self._last_logged >= self.every_seconds:
            self._last_logged = now
            logger.info("%s", self.line())

    def line(self) -> str:
        count = self._segments.planned
        return f"{count}/{self.num_segments} segments ({count / max(1, self.num_segments):.0%}): {self._rates()}"

    def _rates(self) -> str:
        rate = self._frames / max(1e-9, self._ended - self._started)
        left = max(0, self.num_frames - self._frames) / rate if rate else math.inf
        reasons = ", ".join(f"{count} {kind}" for kind, count in sorted(self._reasons.items()))
        counts = self._segments.parts() + (f" ({reasons})" if reasons else "")
        return f"{counts}; {rate:.1f} frames/s, {shown_time(left)} left"


def report_plan(store: str, errors: Mapping[str, int]) -> None:
    """Exports the number of media that planning rejected, by error type, once per run. Needs a connection to Ray."""
    metrics = RayMetrics("timeviper_plan_")
    for kind, count in errors.items():
        metrics.add("rejected_media", count, store=shown_uri(store), type=kind)


class RunMetrics:
    def __init__(self, store: str) -> None:
        self._metrics = RayMetrics("timeviper_preprocess_")
        self._store = shown_uri(store)

    def add(self, result: TaskResult) -> None:
        self._add("frames", result.num_frames)
        self._add("feature_bytes", result.feature_bytes)
        self._add("retries", result.retries)
        for status in ("ok", "partial", "rejected"):
            self._add("segments", getattr(result.segments, status), status=status)
        for kind in result.error_types:
            self._add("errors", 1, type=kind)
        for stage in ("decode", "encode", "write"):
            self._add("stage_seconds", getattr(result, f"{stage}_seconds"), stage=stage)

    def _add(self, name: str, amount: float, **tags: str) -> None:
        self._metrics.add(name, amount, store=self._store, **tags)
