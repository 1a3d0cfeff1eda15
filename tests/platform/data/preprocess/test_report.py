"""Speed of a run compared with its own costs, and the limit of consecutive failures."""

from __future__ import annotations

from dataclasses import replace

import pytest

from reference.synthetic_result import synthetic_result
from timeviper_platform.data.preprocess.failures import ConsecutiveFailureLimit
from timeviper_platform.data.preprocess.report import RunTotals, measure_speed, steady_rate


def test_fused_workers_are_compared_with_what_the_cores_allow() -> None:
    results = [synthetic_result(worker=w, decoder=w, encoder=w) for w in "ab"]
    speed = measure_speed(RunTotals(results), num_cores=2)
    assert speed.workers == {"decode": 2, "encode": 2, "write": 2}
    assert speed.ideal_frames_per_second == pytest.approx(20.0)  # 0.1 s per frame on two cores
    assert speed.utilisation == {"decode": 0.6, "encode": 0.3, "write": 0.1}
    assert speed.share_of_ideal == pytest.approx(1.0)
    assert speed.cores_per_encoder == pytest.approx(7 / 3, abs=0.01)
    idle = [replace(result, ended=20.0) for result in results]
    assert measure_speed(RunTotals(idle), num_cores=2).share_of_ideal == pytest.approx(0.5)
    assert measure_speed(RunTotals(idle), num_cores=2).utilisation == {"decode": 0.3, "encode": 0.15, "write": 0.05}
    waited = [replace(result, decode_cpu_seconds=1.0) for result in results]
    without_waits = measure_speed(RunTotals(waited), num_cores=2)
    assert without_waits.share_of_ideal == pytest.approx(0.5)  # waits are not counted as cost
    assert measure_speed(RunTotals(results), num_cores=1).ideal_frames_per_second == pytest.approx(10.0)
    assert measure_speed(RunTotals(results), num_cores=9).ideal_frames_per_second == pytest.approx(200 / 6, abs=0.01)


def test_split_workers_are_compared_with_their_slowest_stage() -> None:
    results = [synthetic_result(decoder=d, encoder="gpu", worker="w") for d in "abcd"]
    speed = measure_speed(RunTotals(results), num_cores=9)
    assert speed.workers == {"decode": 4, "encode": 1, "write": 1}
    assert speed.ideal_frames_per_second == pytest.approx(400 / 12.0, abs=0.01)  # the encoder's 12 s of work
    assert speed.utilisation == {"decode": 0.6, "encode": 1.2, "write": 0.4}
    assert speed.share_of_ideal == pytest.approx(steady_rate(RunTotals(results)) / (400 / 12.0), abs=0.001)


def test_the_steady_state_begins_with_the_first_finished_task() -> None:
    waited = [synthetic_result(num_frames=100, started=0.0, ended=11.0 + second) for second in range(2)]
    rest = [synthetic_result(num_frames=100, started=second, ended=second + 1.0) for second in range(12, 30)]
    rate = steady_rate(RunTotals([*waited, *rest]))
    assert rate == pytest.approx(100.0, rel=0.1)  # without the 11 s of loading the encoder
    long = [synthetic_result(num_frames=100, started=0.0, ended=10.0) for _ in range(2)]
    assert steady_rate(RunTotals(long)) == pytest.approx(20.0)


def test_a_run_without_frames_has_no_speed() -> None:
    assert measure_speed(RunTotals([]), num_cores=2).workers == {}
    assert measure_speed(RunTotals([synthetic_result(num_frames=0)]), num_cores=2).ideal_frames_per_second == 0


def test_too_many_failures_in_a_row_for_one_reason_are_an_error() -> None:
    limit = ConsecutiveFailureLimit(3)
    limit.add("abcd", ["x/not_found", "x/not_found", "", "x/not_found"], [""] * 4)
    limit.add("ef", ["x/not_found", "x/corrupt_file"], [""] * 2)  # another reason starts a new count
    limit.add("ggggg", ["x/corrupt_file"] * 5, [""] * 5)  # a film's segments are one medium
    with pytest.raises(RuntimeError) as raised:
        limit.add("hij", ["x/corrupt_file", "", ""], ["bad header", "", "of another"])
    text = str(raised.value)
    assert text.startswith("3 media in a row failed for one reason, x/corrupt_file: ")
    assert "The last was h (bad header)" in text
    assert "raise execution.max_consecutive_failures" in text


def test_without_a_limit_nothing_is_an_error() -> None:
    ConsecutiveFailureLimit(None).add((str(n) for n in range(1000)), ["x/not_found"] * 1000, [""] * 1000)


def test_the_steady_rate_excludes_both_ends() -> None:
    ends = [(0.0, 20.0, 0), (20.0, 80.0, 600), (80.0, 100.0, 0)]
    results = [synthetic_result(started=begin, ended=end, num_frames=frames) for begin, end, frames in ends]
    assert steady_rate(RunTotals(results)) == pytest.approx(10.0)
    assert steady_rate(RunTotals([])) == 0.0
