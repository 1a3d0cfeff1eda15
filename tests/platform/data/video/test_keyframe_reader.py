"""Each step of the grid gives its last keyframe, in any order of requests, with exact pixels."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from reference.synthetic_media import make_encoder, make_video
from timeviper_platform.data.encode.frame_encoder import VisionTowerConfig
from timeviper_platform.data.media.container import DecodeError, ErrorType, MediaLimits
from timeviper_platform.data.plan.segments import SamplingConfig
from timeviper_platform.data.preprocess.config import PreprocessConfig
from timeviper_platform.data.preprocess.run import run_in_process, run_preprocess
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.data.store.verify import verify_store
from timeviper_platform.data.video.keyframe_reader import KeyframeReader
from timeviper_platform.data.video.reader import open_video
from timeviper_platform.data.video.sampling import sample_times
from timeviper_platform.data.video_worker.frame_source import DecodeConfig, DecodeRequest, LocalFrames
from timeviper_platform.data.video_worker.isolated import IsolatedFrames

SIZE = 32
STEP = Fraction(1)


def keyframes_of(path: Path) -> list[Fraction]:
    """PTS in seconds of a file's keyframes, from all its packets."""
    with av.open(str(path)) as container:
        packets = container.demux(container.streams.video[0])
        return sorted(Fraction(p.pts) * p.time_base for p in packets if p.is_keyframe and p.pts is not None and p.size)


def expected(path: Path, times: list[Fraction], step: Fraction) -> list[tuple[float, float]]:
    """Time and PTS of every expected frame."""
    found = keyframes_of(path)
    shown = [(t, [pts for pts in found if t - step < pts <= t]) for t in times]
    return [(float(t), float(inside[-1])) for t, inside in shown if inside]


@pytest.fixture(params=[5, 12, 200])
def film(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """100 s at 8 frames per second, a keyframe every 5, 12 or 200 frames, B-frames between them."""
    make_video(tmp_path / "film.mp4", range(800), gop=request.param)
    return tmp_path / "film.mp4"


@pytest.mark.parametrize("step", [Fraction(1, 4), STEP, Fraction(3)])
def test_every_step_gives_its_last_keyframe_with_exact_pixels(film: Path, step: Fraction) -> None:
    times = sample_times(Fraction(0), 1 / step, 0, int(100 / step))
    batch = KeyframeReader(str(film), SIZE, step=step).sample(times)
    pairs = list(zip(batch.times_seconds.tolist(), batch.pts_seconds.tolist(), strict=True))
    assert pairs == expected(film, times, step)
    assert 4 <= len(pairs) < len(times) + 1
    assert batch.num_missing == 0
    whole = open_video(str(film), SIZE).sample([Fraction(pts).limit_denominator(1000) for _, pts in pairs])
    assert np.array_equal(batch.frames, whole.frames)


def test_segments_equal_the_whole_in_any_order(film: Path) -> None:
    times = sample_times(Fraction(0), STEP, 0, 100)
    whole = KeyframeReader(str(film), SIZE, step=STEP).sample(times)
    reader = KeyframeReader(str(film), SIZE, step=STEP)
    starts = [0, 7, 14, 84, 21, 63, 49, 0, 91]
    for start in starts:
        part = reader.sample(times[start : start + 7])
        inside = (whole.times_seconds >= start) & (whole.times_seconds < start + 7)
        assert part.pts_seconds.tolist() == whole.pts_seconds[inside].tolist()
        assert np.array_equal(part.frames, whole.frames[inside])
    with pytest.raises(ValueError, match="must ascend"):
        reader.sample([Fraction(2), Fraction(1)])
    assert len(reader.sample([]).frames) == 0


def test_a_child_returns_the_same_keyframes(film: Path) -> None:
    requests = [DecodeRequest(str(film), "video", sample_times(Fraction(0), STEP, k, 25)) for k in (0, 25, 50)]
    sources = (kind(SIZE, MediaLimits(), DecodeConfig(), STEP) for kind in (LocalFrames, IsolatedFrames))
    here, there = ([decoded.frames for decoded in source.decode(requests)] for source in sources)
    for mine, its in zip(here, there, strict=True):
        assert not isinstance(mine, DecodeError)
        assert not isinstance(its, DecodeError)
        assert np.array_equal(mine.frames, its.frames)


def test_a_damaged_keyframe_is_missing_and_an_invalid_file_an_error(tmp_path: Path) -> None:
    make_video(tmp_path / "film.mp4", range(160), gop=8)
    with av.open(str(tmp_path / "film.mp4")) as container:
        packets = [p for p in container.demux(container.streams.video[0]) if p.is_keyframe and p.size]
        offset, size = packets[5].pos, packets[5].size
    with (tmp_path / "film.mp4").open("r+b") as file:
        file.seek(offset + size // 4)
        file.write(b"\xff" * (size - size // 4))
    batch = KeyframeReader(str(tmp_path / "film.mp4"), SIZE, step=STEP).sample(sample_times(Fraction(0), STEP, 0, 20))
    assert (len(batch.frames), batch.num_missing) == (19, 1)
    assert 5.0 not in batch.times_seconds
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(DecodeError) as caught:
        KeyframeReader(str(tmp_path / "text.mp4"), SIZE, step=STEP)
    assert caught.value.error_type == ErrorType.UNKNOWN_FORMAT


def test_a_store_of_keyframes_refuses_other_sampling(film: Path, tmp_path: Path) -> None:
    make_encoder(tmp_path / "encoder")
    config = PreprocessConfig(
        input=str(film),
        feature_store=str(tmp_path / "store"),
        encoder=VisionTowerConfig(
            model=str(tmp_path / "encoder"), num_tokens_per_frame=4, merge_heads=4, encode_batch_frames=8
        ),
        sampling=SamplingConfig(frame_selection="keyframes"),
    )
    report = run_preprocess(config, run=run_in_process)
    keyframes = expected(film, sample_times(Fraction(0), STEP, 0, 100), STEP)
    assert (report.media.rejected, report.frames) == (0, len(keyframes))
    store = FeatureStore.open(config.feature_store)
    stored = store.read(store.media_ids[0])
    assert stored.pts_seconds.tolist() == [pts for _, pts in keyframes]
    assert verify_store(config.feature_store).problems == []
    with pytest.raises(ValueError, match=r"sampling\.rule: the store has 'last keyframe"):
        run_preprocess(replace(config, sampling=SamplingConfig()), run=run_in_process)
    with pytest.raises(ValueError, match=r"'keyframes' needs decode\.backend pyav, not 'decord'"):
        replace(config, decode=DecodeConfig(backend="decord"))
