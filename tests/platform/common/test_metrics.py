"""metrics: one table of names, counters that count and gauges that are set."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from timeviper_model.inference.requests import EngineStats
from timeviper_platform.common.metrics import METRICS, RayMetrics, metrics_of, prometheus_metrics

PARTS = ("timeviper_gateway_", "timeviper_features_", "timeviper_engine_", "timeviper_plan_", "timeviper_preprocess_")


class Recorded:
    """A counter, gauge or histogram in the shape of Ray's, which need a cluster."""

    values: dict[str, float]

    def __init__(
        self, name: str, *, description: str, tag_keys: tuple[str, ...], boundaries: list[float] | None = None
    ) -> None:
        assert description
        self.name, self.tag_keys = name, tag_keys

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0
        assert set(tags) == set(self.tag_keys)
        self.values[self.name] = self.values.get(self.name, 0) + value

    def observe(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self.tag_keys)
        self.values[self.name] = value

    def set(self, value: float) -> None:
        self.values[self.name] = value


@pytest.fixture
def module() -> Any:
    recorded = type("Recorded", (Recorded,), {"values": {}})
    return SimpleNamespace(Counter=recorded, Gauge=recorded, Histogram=recorded, values=recorded.values)


def test_names_are_unique_and_every_part_has_some() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    assert sum(len(metrics_of(part)) for part in PARTS) == len(METRICS)


def test_every_field_of_the_engines_statistics_is_a_metric() -> None:
    metrics = metrics_of("timeviper_engine_")
    own = {name for name, metric in metrics.items() if metric.kind != "histogram"}
    assert own == {field.name for field in dataclasses.fields(EngineStats)}


def test_a_histogram_has_boundaries_and_takes_values(module: Any) -> None:
    """Before, the first tokens of all answers were one sum, whose tail nobody could see."""
    RayMetrics("timeviper_engine_", module=module).observe("first_token_seconds", 1.5)
    RayMetrics("timeviper_features_", module=module).observe("seconds", 2.5, origin="store")
    assert module.values == {"timeviper_engine_first_token_seconds": 1.5, "timeviper_features_seconds": 2.5}
    assert all(bool(metric.boundaries) == (metric.kind == "histogram") for metric in METRICS)
    assert all(list(metric.boundaries) == sorted(set(metric.boundaries)) for metric in METRICS)


def test_reported_totals_raise_counters_by_the_difference(module: Any) -> None:
    metrics = RayMetrics("timeviper_engine_", module=module)
    for completion_tokens, active_slots in ((3, 2), (3, 0), (8, 1)):
        metrics.report({"completion_tokens": completion_tokens, "active_slots": active_slots})
    assert module.values == {"timeviper_engine_completion_tokens": 8, "timeviper_engine_active_slots": 1}


def test_a_counter_takes_tags_and_ignores_zero(module: Any) -> None:
    metrics = RayMetrics("timeviper_preprocess_", module=module)
    metrics.add("segments", 2, store="s3://b/s", status="ok")
    metrics.add("segments", 0, store="s3://b/s", status="rejected")
    assert module.values == {"timeviper_preprocess_segments": 2}


def test_prometheus_metrics_register_under_their_full_names() -> None:
    registry = CollectorRegistry()
    prometheus_metrics("timeviper_gateway_", registry)["requests"].labels(route="/x", status="200").inc()
    assert registry.get_sample_value("timeviper_gateway_requests_total", {"route": "/x", "status": "200"}) == 1
