"""An engine replica's counts for Prometheus, through Ray's own exporter (`timeviper_engine_*`, with Ray's prefix).

Knows names; what they count is EngineStats'. Ray Serve adds deployment and replica as tags.
"""

from __future__ import annotations

import dataclasses

from timeviper_model.inference.requests import EngineStats


class EngineMetrics:
    """A gauge for each field of EngineStats."""

    def __init__(self) -> None:
        from ray.serve.metrics import Gauge

        self._gauges = {
            field.name: Gauge(f"timeviper_engine_{field.name}", description=field.name.replace("_", " "))
            for field in dataclasses.fields(EngineStats)
        }

    def report(self, stats: EngineStats) -> None:
        """Sets them all."""
        for name, gauge in self._gauges.items():
            gauge.set(getattr(stats, name))
