"""Damaged files of every format: no exception, no child past its deadline, and no frame that is not in the file."""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from reference.damaged_files import damaged_file, make_originals
from reference.fuzz_media import Fuzz, FuzzResult
from reference.plain_decode import not_in, plain_decode
from reference.synthetic_media import make_video
from timeviper_platform.data.video.reader import read_frames

SEED = 20


@pytest.mark.parametrize("num_files", [60, pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_damaged_files_are_errors_or_frames_that_they_hold(tmp_path: Path, num_files: int) -> None:
    result = Fuzz(tmp_path, SEED).run(range(num_files))
    text = "\n".join(result.lines())
    print(text)  # noqa: T201 - the seed, for a failure in another environment
    assert result.is_good, text
    assert result.files == num_files
    assert result.frames > num_files  # most damage leaves something to compare
    assert result.uncompared == 0


@pytest.mark.slow
def test_every_undamaged_format_is_read_whole(tmp_path: Path) -> None:
    originals = make_originals()
    names = sorted(originals)
    result = Fuzz(tmp_path, 0, lambda _, index: (f"{index}-{names[index]}", originals[names[index]])).run(
        range(len(names))
    )
    assert result.is_good, "\n".join(result.lines())
    assert result.outcomes == collections.Counter(ok=len(names))


def test_a_seed_gives_the_same_files() -> None:
    assert damaged_file(7, 3) == damaged_file(7, 3)
    assert damaged_file(7, 3) != damaged_file(8, 3)


def test_a_foreign_frame_and_a_wrong_time_are_found(tmp_path: Path) -> None:
    make_video(tmp_path / "film.mp4", range(24))
    batch, plain = read_frames(str(tmp_path / "film.mp4"), 32), plain_decode(str(tmp_path / "film.mp4"))
    assert not_in(batch, plain) == []
    foreign = np.array(batch.frames)
    foreign[1] ^= 1
    assert not_in(dataclasses.replace(batch, frames=foreign), plain) == ["the frame for t = 1 s, PTS 1 s"]
    late = batch.pts_seconds + np.array([0.0, 0.0, 0.125])
    assert not_in(dataclasses.replace(batch, pts_seconds=late), plain) == [f"the times {late.tolist()}"]
    assert FuzzResult(0, files=60).is_good
    assert not FuzzResult(0, files=10_000, invented=["a frame"]).is_good
    assert not FuzzResult(0, files=10_000, job_ends=["an exception"]).is_good
