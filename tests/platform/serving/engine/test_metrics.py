from __future__ import annotations

import dataclasses

import pytest
from ray.serve import metrics

from reference.tiny_serving import random_model
from timeviper_model.inference.engine import InferenceEngine
from timeviper_model.inference.requests import EngineConfig, EngineStats
from timeviper_platform.serving.engine.metrics import EngineMetrics


def test_every_count_of_the_engine_has_a_gauge(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, float] = {}

    class Gauge:
        def __init__(self, name: str, *, description: str) -> None:
            self.name = name
            assert description

        def set(self, value: float) -> None:
            seen[self.name] = value

    monkeypatch.setattr(metrics, "Gauge", Gauge)  # Ray's own needs a cluster to send to
    stats = InferenceEngine(random_model(), EngineConfig(num_slots=3)).stats()
    EngineMetrics().report(stats)
    assert set(seen) == {f"timeviper_engine_{field.name}" for field in dataclasses.fields(EngineStats)}
    assert seen["timeviper_engine_num_slots"] == 3
    assert {"timeviper_engine_prefix_hits", "timeviper_engine_prefix_bytes"} <= set(seen)
