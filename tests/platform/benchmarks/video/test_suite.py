"""The decode suite at toy sizes: all strategies give the same frames, files match their specs, rows are finite."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from timeviper_platform.benchmarks.video import suite
from timeviper_platform.benchmarks.video.clips import ClipSpec, make_clip, repeat_clip
from timeviper_platform.benchmarks.video.strategies import STRATEGIES, sample_keyframes, sample_ours
from timeviper_platform.data.video.reader import read_frames

TINY = ClipSpec(seconds=4, fps=10, width=64, height=64)
SPECS = {
    "plain": TINY,
    "all keyframes": ClipSpec(seconds=4, fps=10, width=64, height=64, gop=1),
    "variable": ClipSpec(seconds=4, fps=10, width=64, height=64, is_variable=True),
}


@pytest.mark.parametrize("kind", list(SPECS))
def test_all_strategies_give_the_same_frames(tmp_path: Path, kind: str) -> None:
    make_clip(tmp_path / "clip.mp4", SPECS[kind])
    repeat_clip(tmp_path / "clip.mp4", tmp_path / "long.mp4", 3)
    times = [Fraction(k, 2) for k in range(20)]
    ours = np.concatenate(list(sample_ours(tmp_path / "long.mp4", times, 64)))
    for name, strategy in STRATEGIES.items():
        theirs = np.concatenate(list(strategy(tmp_path / "long.mp4", times, 64)))
        if name == "decord":
            assert np.abs(ours.astype(int) - theirs.astype(int)).mean() < 4
        else:
            assert np.array_equal(ours, theirs), name


def test_a_repeated_clip_shows_the_same_frames_each_time(tmp_path: Path) -> None:
    make_clip(tmp_path / "clip.mp4", TINY)
    repeat_clip(tmp_path / "clip.mp4", tmp_path / "long.mp4", 3)
    once, thrice = (read_frames(str(tmp_path / name), 32) for name in ("clip.mp4", "long.mp4"))
    assert thrice.pts_seconds.tolist() == list(range(12))
    assert np.array_equal(thrice.frames, np.concatenate([once.frames] * 3))


def test_keyframes_alone_equal_the_frames_sampled_at_their_times(tmp_path: Path) -> None:
    make_clip(tmp_path / "clip.mp4", ClipSpec(seconds=9, fps=10, width=64, height=64, gop=30))
    times = [Fraction(k) for k in range(9)]
    alone = np.concatenate(list(sample_keyframes(tmp_path / "clip.mp4", times, 64)))
    at_keyframes = np.concatenate(list(sample_ours(tmp_path / "clip.mp4", times[::3], 64)))
    assert np.array_equal(alone, at_keyframes)


def test_the_keyframe_row_names_the_number_of_frames() -> None:
    clip = ClipSpec(seconds=20, fps=10, width=64, height=64, gop=100)
    (row,) = suite.keyframe_rows(None, suite.DecodeSizes(clip=clip, repetitions=3, image_size=64, repeats=3))
    assert "6 frames in place of 60" in row.name
    assert 0 < row.value < 1


@pytest.mark.slow
def test_sparse_samples_equal_those_of_a_dense_pass(tmp_path: Path) -> None:
    make_clip(tmp_path / "clip.mp4", ClipSpec(seconds=20, width=64, height=64))
    repeat_clip(tmp_path / "clip.mp4", tmp_path / "long.mp4", 6)
    times = [Fraction(k, 30) for k in range(3600)]
    whole = np.concatenate(list(sample_ours(tmp_path / "long.mp4", times, 32)))
    for step in (61, 113, 217, 400, 999):
        indices = list(range(step // 3, 3500, step))
        got = np.concatenate(list(sample_ours(tmp_path / "long.mp4", [times[k] for k in indices], 32)))
        assert np.array_equal(got, whole[indices])


def test_clips_have_the_keyframes_and_times_of_their_spec(tmp_path: Path) -> None:
    def facts(spec: ClipSpec) -> tuple[int, set[int]]:
        make_clip(tmp_path / "clip.mp4", spec)
        with av.open(str(tmp_path / "clip.mp4")) as container:
            stream = container.streams.video[0]
            packets = [packet for packet in container.demux(stream) if packet.size]
        pts = sorted(round(packet.pts * packet.time_base * spec.fps) for packet in packets)
        return sum(packet.is_keyframe for packet in packets), set(np.diff(pts).tolist())

    assert facts(ClipSpec(seconds=4, fps=10, width=64, height=64, gop=600)) == (1, {1})
    assert facts(SPECS["all keyframes"]) == (40, {1})
    assert facts(SPECS["variable"])[1] >= {1, 9}


def test_every_group_returns_rows_for_small_files(tmp_path: Path) -> None:
    sizes = suite.DecodeSizes(
        clip=TINY,
        repetitions=2,
        image_size=64,
        repeats=3,
        close_repeats=3,
        long_clip=TINY,
        long_repetitions=15,
        long_image_size=64,
        long_repeats=1,
    )
    make_clip(tmp_path / "film.mp4", TINY)
    small = [
        suite.Case(name="dense", clip=TINY),
        suite.Case(name="last", clip=TINY, repetitions=3, last_seconds=2, strategies=("seeks",)),
        suite.Case(name="few", clip=TINY, repetitions=3, num_frames=3, strategies=("seeks", "decord")),
    ]
    rows = suite.sampling_rows(tmp_path / "film.mp4", sizes)
    rows += suite.cost_rows(tmp_path / "film.mp4", sizes)
    rows += suite.keyframe_rows(tmp_path / "film.mp4", sizes)
    rows += suite.strategy_rows(None, small, sizes) + suite.long_rows(None, sizes)
    assert len(rows) == 3 + 2 + 2 + 3 + 3
    assert all(row.value > 0 and row.command.startswith("python jobs/benchmark.py decode --only ") for row in rows)
