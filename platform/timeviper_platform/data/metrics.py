"""A run's counts for Prometheus, through Ray's own exporter (`timeviper_preprocess_*`, with Ray's prefix `ray_`).

Knows names, units and tags; report.py holds the same counts at the end of a run. Ray must be connected.
"""

from __future__ import annotations

from typing import Any

from timeviper_platform.data.steps import UnitOutcome


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

    def add(self, outcome: UnitOutcome) -> None:
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
