"""The `driver` rows at toy size."""

from __future__ import annotations

import pytest

from timeviper_platform.benchmarks.preprocess.driver import DriverSizes, driver_rows


@pytest.mark.cluster
@pytest.mark.slow
def test_the_driver_is_measured_with_workers_that_only_sleep(ray_address: str) -> None:
    rows = driver_rows(sizes=DriverSizes(num_units=200, num_processes=2, sleep_seconds=0.01))
    cost, demand, share, sent, growth, starts = rows
    assert 0 < cost.value < 100
    assert demand.value == pytest.approx(64 * 617 / 512, rel=0.01)  # docs/scale.md
    assert share.value == pytest.approx(demand.value * cost.value / 1e3)
    assert sent.unit == growth.unit == "MB"
    assert 0 < starts.value <= 1.0
