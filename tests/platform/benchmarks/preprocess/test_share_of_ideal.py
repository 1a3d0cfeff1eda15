"""The preprocess suite at toy sizes: media grow as asked, ideals are not flattered, pipelines do the same work."""

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
    make_pieces,
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
    """PTS in seconds of every picture, and whether it is a keyframe, in order of decoding."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return [(float(p.pts * p.time_base), p.is_keyframe) for p in container.demux(stream) if p.pts is not None]


def test_a_repeated_film_shows_its_pictures_again_right_behind_its_last(tmp_path: Path) -> None:
    make_video(tmp_path / "film.mp4", range(8 * 5), gop=16, audio_seconds=5.0)
    repeat_film(tmp_path / "film.mp4", tmp_path / "long.mp4", 3)
    once, long = read_frames(str(tmp_path / "film.mp4"), 32), read_frames(str(tmp_path / "long.mp4"), 32)
    assert np.array_equal(long.frames, np.concatenate([once.frames] * 3))
    assert long.pts_seconds.tolist() == list(range(15))


def test_pieces_of_a_film_begin_with_a_keyframe_at_zero_and_lose_nothing(tmp_path: Path) -> None:
    make_video(tmp_path / "film.mp4", range(8 * 10), gop=12)
    (tmp_path / "cut").mkdir()
    pieces = cut_film(tmp_path / "film.mp4", tmp_path / "cut", 3, most_seconds=100)
    found = [packets(piece) for piece in pieces]
    assert [piece[0] for piece in found] == [(0.0, True)] * 4
    assert sum(len(piece) for piece in found) == 80
    frames = np.concatenate([read_frames(str(piece), 32).frames[:3] for piece in pieces[:1]])
    assert np.array_equal(frames, read_frames(str(tmp_path / "film.mp4"), 32).frames[:3])
    (tmp_path / "less").mkdir()
    assert len(cut_film(tmp_path / "film.mp4", tmp_path / "less", 3, most_seconds=5)) == 2


def test_every_pipeline_is_given_as_much_film_as_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines_benchmark, "PIECE_SECONDS", 2)
    make_video(tmp_path / "film.mp4", range(8 * 6), gop=16)
    folder = make_pieces(tmp_path, tmp_path / "film.mp4", film_seconds=10)
    lengths = [len(packets(piece)) for piece in sorted(folder.iterdir())]
    assert lengths == [16] * 5  # the film's three pieces, and two of them again


def test_the_tiny_encoder_is_the_demos(tmp_path: Path) -> None:
    config = make_tiny_encoder(tmp_path / "encoder")
    demo = load_config(PreprocessConfig, TINY).encoder
    assert (config.num_tokens_per_frame, config.merge_heads) == (demo.num_tokens_per_frame, demo.merge_heads)
    assert (config.layer, config.dtype) == (demo.layer, demo.dtype)
    assert config.encode_batch_frames == demo.encode_batch_frames
    assert FrameEncoder(config).image_size == preprocess_benchmark.IMAGE_SIZE


def test_each_run_is_held_against_the_costs_around_it() -> None:
    fast = Calibration(segments=1, frames=100, decode_seconds=0.9, encode_seconds=0.1)
    slow = Calibration(segments=1, frames=100, decode_seconds=1.8, encode_seconds=0.2)
    media = Media("images alone", lambda folder, count: None, 1, "images/s")
    # the machine is half as fast while the third and fourth runs go on
    costs = (fast, fast, fast, slow, slow)
    rates = {
        "fused": [RunRate(190.0, 0.0, 0.96), RunRate(120.0, 0.0, 0.92)],  # of 200, and of 150
        "split": [RunRate(90.0, 0.1, 0.9), RunRate(45.0, 0.1, 0.81)],  # of 200 and of 100; the host left nine tenths
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
    """Where slots would be measured: 10 ms a frame of decoding."""

    def __init__(self, spec: WorkerSpec, num_slots: int) -> None:
        self.num_slots = num_slots

    def __enter__(self) -> KnownCosts:
        return self

    def __exit__(self, *_: object) -> None: ...

    def measure(self, segments: Sequence[Segment], seconds: float) -> Calibration:
        return Calibration(segments=len(segments), frames=100, decode_seconds=1.0, encode_seconds=0.0)


def test_as_many_media_are_run_as_the_seconds_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess_benchmark, "BusySlots", KnownCosts)
    monkeypatch.setattr(preprocess_benchmark.os, "cpu_count", lambda: 2)
    encoder = make_tiny_encoder(tmp_path / "encoder")
    make_video(tmp_path / "clip.mp4", range(8))
    preprocess_benchmark.save_first_frame(tmp_path / "clip.mp4", tmp_path / "image.jpg")
    media = Media("images", lambda folder, count: link(tmp_path / "image.jpg", folder, count), 8)
    rows = preprocess_benchmark.media_rows(tmp_path, media, encoder, IdealSizes(run_seconds=0.2), run=run_in_process)
    assert [row.bar for row in rows] == [">= 0.90", ">= 0.90", None, ">= 0.90", ">= 0.90", None, None]
    assert all(row.value > 0 for row in rows)
    assert len(list((tmp_path / "images").iterdir())) == 40  # 0.2 s of 200 a second
    (tmp_path / "images" / "bad.jpg").write_text("no image")
    execution = preprocess_benchmark.executions(2)["fused"]
    with pytest.raises(RuntimeError, match=r"1 of the 41 images were rejected: {'probe': "):
        preprocess_benchmark.media_rate(tmp_path, tmp_path / "images", encoder, execution, run_in_process)


def test_both_ways_to_spread_the_work_find_room_on_the_cores() -> None:
    for num_cores in (2, 3, 16):
        split = preprocess_benchmark.executions(num_cores)["split"]
        assert split.num_decode_workers == num_cores
        assert (num_cores + 1) * split.cpus_per_worker < num_cores


def test_the_steady_rate_of_moments_leaves_the_ends_out() -> None:
    backlog = [0.0] * 500 + list(np.arange(0, 100, 0.5)) + [100.0]  # what had waited for the encoder comes at once
    assert pipelines_benchmark.steady_rate_of(backlog) == pytest.approx(2.0, rel=0.02)
    with pytest.raises(ValueError, match="10 frames at 2 moments have no steady state"):
        pipelines_benchmark.steady_rate_of([1.0] * 5 + [2.0] * 5)


def test_pipelines_are_compared_by_medians_and_bars_are_a_films() -> None:
    passes = {"ours": [Pass(20.0, 0.9), Pass(10.0, 0.8), Pass(30.0, 0.7)], "Daft": [Pass(10.0), Pass(99.0), Pass(1.0)]}
    rows = pipeline_speed_rows(passes, {"Daft": ">= 1.2"}, "film", is_made=False)
    assert [(row.value, row.holds) for row in rows] == [(2.0, True), (0.8, True)]
    assert {row.command for row in rows} == {"python jobs/benchmark.py preprocess --only pipelines --film FILM"}
    assert [row.bar for row in pipeline_speed_rows(passes, {"Daft": ">= 1.2"}, "clip", is_made=True)] == [None, None]


def test_the_others_encode_as_we_do(tmp_path: Path) -> None:
    config = make_tiny_encoder(tmp_path / "encoder")
    frames = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    made = EncodeFrames(config)({"frame": frames, "path": np.array(["a"] * 5)})
    expected = FrameEncoder(config).encode(frames)
    found = torch.stack([torch.frombuffer(bytearray(f), dtype=torch.bfloat16) for f in made["features"]])
    assert torch.equal(found.view_as(expected).view(torch.int16), expected.view(torch.int16))
    assert len(made["made_at"]) == len(made["path"]) == 5


def test_without_daft_its_row_is_left_out_and_the_command_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("DO_NOT_TRACK", "DAFT_PROGRESS_BAR"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setitem(sys.modules, "daft", None)  # as if it were not installed
    caplog.set_level(logging.WARNING)
    assert not pipelines_benchmark.has_daft()
    assert "pip install --no-deps daft==" in caplog.text
