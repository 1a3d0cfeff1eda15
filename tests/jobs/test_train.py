from __future__ import annotations

from timeviper_platform.cli.train import report_lines


def test_a_phase_without_steps_in_this_run_is_reported_without_losses() -> None:
    done_before = {"steps": 0, "loss_first": None, "loss_last": None, "samples": 0, "rejects": {"a": 3}, "seconds": 0.0}
    trained = {"steps": 2, "loss_first": 2.5, "loss_last": 1.25, "samples": 8, "rejects": {}, "seconds": 1.04}
    heading, first, second = report_lines({"align": done_before, "instruct": trained})
    assert heading.split() == ["phase", "steps", "first", "loss", "last", "loss", "samples", "rejects", "seconds"]
    assert first.split() == ["align", "0", "-", "-", "0", "3", "0.0"]
    assert second.split() == ["instruct", "2", "2.5000", "1.2500", "8", "0", "1.0"]
