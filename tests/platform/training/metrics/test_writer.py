from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest

from timeviper_platform.training.metrics.writer import MetricsWriter, next_attempt, phase_report, read_metrics


def row(step: int, loss: float, phase: str = "align") -> dict[str, Any]:
    return {
        "phase": phase,
        "step": step,
        "global_step": step,
        "loss": loss,
        "lr": {"projector": 0.1},
        "num_vision_tokens": [8, 4],
        "seconds": 0.5,
        "num_samples": 2,
        "num_tokens": 30,
        "fill": 0.9,
        "data_wait_share": 0.1,
        "checkpoint_stall_s": 0.1,
    }


def write_attempt(uri: str, rows: list[dict[str, Any]], *, tensorboard: bool = False) -> None:
    with MetricsWriter(uri, next_attempt(uri), tensorboard=tensorboard) as writer:
        for item in rows:
            writer.write(item)


def test_the_joined_curve_takes_the_last_attempts_row_of_each_step(tmp_path: Path) -> None:
    write_attempt(str(tmp_path), [row(1, 5.0), row(2, 4.0), row(3, 3.0)])
    write_attempt(str(tmp_path), [row(3, 3.5), row(4, 2.0)])  # resumed after step 2
    curve = read_metrics(str(tmp_path))
    assert [(item["step"], item["attempt"], item["loss"]) for item in curve] == [
        (1, 1, 5.0),
        (2, 1, 4.0),
        (3, 2, 3.5),
        (4, 2, 2.0),
    ]


def test_a_line_cut_off_by_a_kill_is_ignored(tmp_path: Path) -> None:
    write_attempt(str(tmp_path), [row(1, 5.0)])
    with (tmp_path / "metrics" / "attempt-0001.jsonl").open("a") as file:
        file.write('{"global_step": 2, "lo')
    assert [item["step"] for item in read_metrics(str(tmp_path))] == [1]


def test_cut_lines_anywhere_and_damaged_bytes_are_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_attempt(str(tmp_path), [row(1, 5.0), row(2, 4.0)])
    file = tmp_path / "metrics" / "attempt-0001.jsonl"
    whole = file.read_bytes()
    file.write_bytes(b'{"global_step": 1, "lo\n' + whole[:20] + b"\xff\n[1]\n" + whole)  # a full disk cut lines off
    write_attempt(str(tmp_path), [row(3, 3.0)])
    assert [(item["step"], item["loss"]) for item in read_metrics(str(tmp_path))] == [(1, 5.0), (2, 4.0), (3, 3.0)]
    assert "attempt-0001.jsonl: skipping 3 damaged lines" in caplog.text


def test_rows_of_a_remote_run_arrive_with_each_flush() -> None:
    uri = "memory://runs/metrics-test"
    writer = MetricsWriter(uri, next_attempt(uri), tensorboard=False)
    writer.write(row(1, 5.0))
    writer.flush()
    assert [item["step"] for item in read_metrics(uri)] == [1]
    writer.close()
    assert next_attempt(uri) == 2
    fsspec.filesystem("memory").rm("/runs", recursive=True)


def test_tensorboard_has_the_metrics(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_attempt(str(tmp_path), [row(1, 5.0), row(2, 4.0)], tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "attempt-0001"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("align/loss")] == [(1, 5.0), (2, 4.0)]
    assert {"align/lr/projector", "align/num_vision_tokens/1"} <= set(events.Tags()["scalars"])


def test_a_phase_report_averages_the_first_and_last_losses() -> None:
    report = phase_report([row(step, float(10 - step)) for step in range(1, 9)])
    assert report["steps"] == 8
    assert (report["loss_first"], report["loss_last"]) == (8.5, 2.5)
    assert (report["seconds"], report["samples"], report["tokens"]) == (4.0, 16, 240)
    assert report["fill"] == pytest.approx(0.9)
    assert phase_report([])["loss_first"] is None
