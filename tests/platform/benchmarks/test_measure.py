from __future__ import annotations

from pathlib import Path

import pytest

from timeviper_platform.benchmarks.measure import Comparison, Row, StolenTime, compare, format_rows


def _row(value: float, bar: str | None) -> Row:
    return Row(name="speed", value=value, unit="x", bar=bar, command="python jobs/benchmark.py decode")


@pytest.mark.parametrize(
    ("value", "bar", "holds"), [(1.6, ">= 1.6", True), (1.59, ">= 1.6", False), (2, "<= 1.5", False), (1, None, None)]
)
def test_a_row_compares_its_value_with_its_bar(value: float, bar: str | None, holds: bool | None) -> None:
    assert _row(value, bar).holds is holds
    assert _row(value, bar).as_dict()["holds"] is holds


def test_a_malformed_bar_is_an_error() -> None:
    with pytest.raises(ValueError, match="NUMBER"):
        _ = _row(1.0, "about 3").holds


def test_both_sides_run_alternately_after_a_warm_up() -> None:
    order: list[str] = []
    comparison = compare(lambda: order.append("ours"), lambda: order.append("control"), repeats=3)
    assert order == ["ours", "control"] * 4
    assert len(comparison.ours_seconds) == len(comparison.control_seconds) == 3


def test_the_speedup_is_the_median_over_pairs_of_runs() -> None:
    comparison = Comparison(ours_seconds=(1.0, 1.0, 9.0), control_seconds=(2.0, 2.0, 2.0))
    assert comparison.speedup == 2.0
    assert comparison.noise == 8.0
    # the machine slows down while ours stays twice as fast; the ratio of medians would be 4
    assert Comparison(ours_seconds=(1.0, 1.0, 9.0, 10.0), control_seconds=(2.0, 2.0, 18.0, 20.0)).speedup == 2.0


def test_stolen_time_is_the_share_of_ticks_taken_by_the_host(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    assert StolenTime(stat).share() == 0.0  # the system has no such file
    stat.write_text("cpu  100 0 50 850 0 0 0 0 0 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    stolen = StolenTime(stat)
    stat.write_text("cpu  150 0 60 860 0 0 0 30 0 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    assert stolen.share() == 0.3


def test_fewer_than_three_repeats_are_refused() -> None:
    with pytest.raises(ValueError, match="repeats"):
        compare(lambda: None, lambda: None, repeats=2)


def test_the_table_marks_a_missed_bar() -> None:
    assert "| speed | 1 x | >= 2 | NO | `python jobs/benchmark.py decode` |" in format_rows([_row(1.0, ">= 2")])
