"""The three ways that the decode suite times do the same work."""

from __future__ import annotations

from pathlib import Path

import pytest

from timeviper_platform.data import benchmark


def test_all_three_sample_every_second_of_the_made_clip(tmp_path: Path) -> None:
    benchmark.make_clip(tmp_path / "clip.mp4", seconds=3)
    for sample in (benchmark.sample_ours, benchmark.sample_sequentially, benchmark.sample_with_decord):
        assert sample(tmp_path / "clip.mp4") == 3, sample.__name__


def test_the_suite_has_a_row_for_each_control_and_film(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = benchmark.make_clip
    monkeypatch.setattr(benchmark, "make_clip", lambda path: made(path, seconds=1))
    made(tmp_path / "film.mp4", seconds=2)
    rows = benchmark.decode_suite(tmp_path / "film.mp4")
    assert [("decord" in row.name, "film.mp4" in row.name) for row in rows] == [
        (False, False),
        (True, False),
        (False, True),
        (True, True),
    ]
    assert all(row.value > 0 and row.command.startswith("python jobs/benchmark.py decode") for row in rows)
