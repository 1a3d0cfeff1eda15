"""The preprocess suite at toy sizes: synthetic media, shares of the ideal rate, and equal work in all pipelines."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from reference.synthetic_media import make_video
from timeviper_platform.benchmarks.preprocess import other_pipelines as pipelines_benchmark
from timeviper_platform.benchmarks.preprocess import share_of_ideal as preprocess_benchmark
from timeviper_platform.benchmarks.preprocess.other_pipelines import (
    EncodeFrames,
    Pass,
    cut_film,
    make_clips,
    pipeline_speed_rows,
)
from timeviper_platform.benchmarks.preprocess.share_of_ideal import (
    IdealSizes,
    Media,
    RunRate,
    link,
    make_tiny_encoder,
    repeat_film,
)
from timeviper_platform.common.config import load_config
from timeviper_platform.data.encode.frame_encoder import FrameEncoder
from timeviper_platform.data.plan.segments import Segment
from timeviper_platform.data.preprocess.calibrate import Calibration
from timeviper_platform.data.preprocess.config import PreprocessConfig
from timeviper_platform.data.preprocess.run import run_in_process
from timeviper_platform.data.preprocess.worker import WorkerSpec
from timeviper_platform.data.video.reader import read_frames

TINY = Path(__file__).parents[4] / "ray_configs" / "tiny" / "preprocess.yaml"


def packets(path: Path) -> list[tuple[float, bool]]:
    """PTS in seconds of each packet and whether it is a keyframe, in decoding order."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return [(float(p.pts * p.time_base), p.is_keyframe) for p in container.demux(stream) if p.pts is not None]


def test_a_repeated_film_continues_without_a_gap(tmp_path: Path) -> None:
    make_video(tmp_path / "film.mp4", range(8 * 5), gop=16, audio_seconds=5.0)
    repeat_film(tmp_path / "film.mp4", tmp_path / "long.mp4", 3)
    once, long = read_frames(str(tmp_path / "film.mp4"), 32), read_frames(str(tmp_path / "long.mp4"), 32)
    assert np.array_equal(long.frames, np.concatenate([once.frames] * 3))
    assert long.pts_seconds.tolist() == list(range(15))


def test_clips_cut_from_a_film_start_at_keyframes_and_keep_all_frames(tmp_path: Path) -> None:
    make_video(tmp_path / "film.mp4", range(8 * 10), gop=12)
    (tmp_path / "cut").mkdir()
    clips = cut_film(tmp_path / "film.mp4", tmp_path / "cut", 3, max_seconds=100)
    found = [packets(clip) for clip in clips]
    assert [clip[0] for clip in found] == [(0.0, True)] * 4
    assert sum(len(clip) for clip in found) == 80
    frames = np.concatenate([read_frames(str(clip), 32).frames[:3] for clip in clips[:1]])
    assert np.array_equal(frames, read_frames(str(tmp_path / "film.mp4"), 32).frames[:3])
    (tmp_path / "less").mkdir()
    assert len(cut_film(tmp_path / "film.mp4", tmp_path / "less", 3, max_seconds=5)) == 2


def test_a_short_film_is_repeated_to_the_requested_length(tmp_path: Path) -> None:
    make_video(tmp_path / "film.mp4", range(8 * 6), gop=16)
    folder = make_clips(tmp_path, tmp_path / "film.mp4", film_seconds=10, clip_seconds=2)
    lengths = [len(packets(clip)) for clip in sorted(folder.iterdir())]
    assert lengths == [16] * 5  # three clips of the film, two of them twice


def test_the_tiny_encoder_matches_the_demo(tmp_path: Path) -> None:
    config = make_tiny_encoder(tmp_path / "encoder")
    demo = load_config(PreprocessConfig, TINY).encoder
    assert (config.num_tokens_per_frame, config.merge_heads) == (demo.num_tokens_per_frame, demo.merge_heads)
    assert (config.layer, config.dtype) == (demo.layer, demo.dtype)
    assert config.encode_batch_frames == demo.encode_batch_frames
    assert FrameEncoder(config).image_size == preprocess_benchmark.IMAGE_SIZE


def test_a_run_is_compared_with_its_neighbouring_calibrations() -> None:
    fast = Calibration(segments=1, frames=100, decode_seconds=0.9, encode_seconds=0.1)
    slow = Calibration(segments=1, frames=100, decode_seconds=1.8, encode_seconds=0.2)
    media = Media("images alone", lambda folder, count: None, 1, "images/s")
    # the machine is half as fast during the third and fourth runs
    costs = (fast, fast, fast, slow, slow)
    rates = {
        "fused": [RunRate(190.0, 0.0, 0.96), RunRate(120.0, 0.0, 0.92)],  # of 200, and of 150
        "split": [RunRate(90.0, 0.1, 0.9), RunRate(45.0, 0.1, 0.81)],  # of 200 and of 100; the host took a tenth
    }
    rows = preprocess_benchmark.speed_rows(media, rates, costs, num_cores=2, command="c")
    assert [(row.value, row.unit, row.holds) for row in rows] == [
        (pytest.approx((0.95 + 0.8) / 2), "", False),
        (pytest.approx(0.94), "", True),
        (155.0, "images/s", None),
        (pytest.approx(0.5), "", False),
        (pytest.approx(0.95), "", True),
        (67.5, "images/s", None),
        (pytest.approx(0.9), "", None),
    ]
    assert "(ideal 200 images/s, stolen 0%, noise 17%)" in rows[0].name


class KnownCosts:
    """Stands in for measured slots: 10 ms of decoding per frame."""

    def __init__(self, spec: WorkerSpec, num_slots: int) -> None:
        self.num_slots = num_slots

    def __enter__(self) -> KnownCosts:
        return self

    def __exit__(self, *_: object) -> None: ...

    def measure(self, segments: Sequence[Segment], seconds: float) -> Calibration:
        return Calibration(segments=len(segments), frames=100, decode_seconds=1.0, encode_seconds=0.0)


@pytest.mark.slow
def test_the_number_of_media_fills_the_requested_seconds(tmp_path: Path) -> None:
    encoder = make_tiny_encoder(tmp_path / "encoder")
    make_video(tmp_path / "clip.mp4", range(8))
    preprocess_benchmark.save_first_frame(tmp_path / "clip.mp4", tmp_path / "image.jpg")
    media = Media("images", lambda folder, count: link(tmp_path / "image.jpg", folder, count), 8)
    rows = preprocess_benchmark.media_rows(
        tmp_path,
        media,
        encoder,
        IdealSizes(run_seconds=0.2, repeats=2),
        run=run_in_process,
        slots=KnownCosts,
        num_cores=2,
    )
    assert [row.bar for row in rows] == [">= 0.90", ">= 0.90", None, ">= 0.90", ">= 0.90", None, None]
    assert all(row.value > 0 for row in rows)
    assert len(list((tmp_path / "images").iterdir())) == 40  # 0.2 s at 200 images/s
    (tmp_path / "images" / "bad.jpg").write_text("no image")
    execution = preprocess_benchmark.executions(2)["fused"]
    with pytest.raises(RuntimeError, match=r"images: 41 planned = 40 ok \+ 0 partial \+ 1 rejected: {'probe': "):
        preprocess_benchmark.media_rate(tmp_path, tmp_path / "images", encoder, execution, run_in_process)


def test_the_workers_of_split_mode_fit_on_the_cores() -> None:
    for num_cores in (2, 3, 16):
        split = preprocess_benchmark.executions(num_cores)["split"]
        assert split.num_decode_workers == num_cores
        assert (num_cores + 1) * split.cpus_per_worker < num_cores


def test_the_steady_rate_excludes_start_and_end() -> None:
    backlog = [0.0] * 500 + list(np.arange(0, 100, 0.5)) + [100.0]  # a backlog is encoded at once
    assert pipelines_benchmark.steady_rate_of(backlog) == pytest.approx(2.0, rel=0.02)
    with pytest.raises(ValueError, match="10 frames at 2 times have no steady state"):
        pipelines_benchmark.steady_rate_of([1.0] * 5 + [2.0] * 5)


def test_pipelines_are_compared_by_medians_with_bars_for_films_only() -> None:
    passes = {"ours": [Pass(20.0, 0.9), Pass(10.0, 0.8), Pass(30.0, 0.7)], "Daft": [Pass(10.0), Pass(99.0), Pass(1.0)]}
    rows = pipeline_speed_rows(passes, {"Daft": ">= 1.2"}, "film", is_synthetic=False)
    assert [(row.value, row.holds) for row in rows] == [(2.0, True), (0.8, True)]
    assert {row.command for row in rows} == {"python jobs/benchmark.py preprocess --only pipelines --film FILM"}
    assert [row.bar for row in pipeline_speed_rows(passes, {"Daft": ">= 1.2"}, "clip", is_synthetic=True)] == [
        None,
        None,
    ]


def test_the_other_pipelines_encode_to_the_same_bits(tmp_path: Path) -> None:
    config = make_tiny_encoder(tmp_path / "encoder")
    frames = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    encoded = EncodeFrames(config)({"frame": frames, "path": np.array(["a"] * 5)})
    expected = FrameEncoder(config).encode(frames)
    found = torch.stack([torch.frombuffer(bytearray(f), dtype=torch.bfloat16) for f in encoded["features"]])
    assert torch.equal(found.view_as(expected).view(torch.int16), expected.view(torch.int16))
    assert len(encoded["encoded_at"]) == len(encoded["path"]) == 5


def test_a_missing_daft_is_logged_with_its_install_command(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("DO_NOT_TRACK", "DAFT_PROGRESS_BAR"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setitem(sys.modules, "daft", None)  # not installed
    caplog.set_level(logging.WARNING)
    assert not pipelines_benchmark.has_daft()
    assert "pip install --no-deps daft==" in caplog.text
