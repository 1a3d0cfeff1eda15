from __future__ import annotations

import logging
from typing import Any

import pytest

from timeviper_platform.training.metrics.step_log import StepLogger, shown_rates

ROW: dict[str, Any] = {
    "step": 1,
    "loss": 2.0,
    "grad_norm": 0.5,
    "lr": {"projector decay": 1e-3, "projector no decay": 1e-3, "transv decay": 4e-3},
    "seconds": 1.5,
    "tokens_per_second": 800.0,
    "data_wait_share": 0.01,
    "peak_memory_bytes": 2.5e9,
}


def test_a_progress_line_shows_rates_by_rule_step_time_and_memory(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        StepLogger("align", 5, 1, 0).log(ROW)
        StepLogger("align", 5, 1, 0, steps_after=None).log(ROW)
    first, second = caplog.messages
    assert "lr projector 1.00e-03, transv 4.00e-03 1.50 s/step 800 tokens/s data wait 1.0 % memory 2.5 GB," in first
    assert first.endswith("0 s left")
    assert second.endswith("0 s left in this phase")  # later phases count epochs


def test_the_time_left_counts_later_phases(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 110.0])
    monkeypatch.setattr("timeviper_platform.training.metrics.step_log.time.perf_counter", lambda: next(times))
    with caplog.at_level(logging.INFO):
        StepLogger("align", 5, 1, 0, steps_after=356.0).log(ROW)
    assert caplog.messages[0].endswith("1 h 00 min left")  # 10 s a step, 4 + 356 steps


def test_one_rate_is_shown_once() -> None:
    assert shown_rates({"a decay": 1e-3, "a no decay": 1e-3, "b decay": 1e-3}) == "1.00e-03"
