"""Calibration: a random sample of real segments, and costs that add up like the stages."""

from __future__ import annotations

import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import psutil
import pytest
from PIL import Image

from reference.synthetic_media import make_encoder, make_video
from reference.synthetic_result import synthetic_result
from timeviper_platform.data.encode.frame_encoder import FrameEncoder, VisionTowerConfig, describe_encoder
from timeviper_platform.data.media.container import MediaLimits
from timeviper_platform.data.media.medium import Medium
from timeviper_platform.data.plan.segments import PlanSpec, plan_page, segments_of
from timeviper_platform.data.preprocess.calibrate import (
    BusySlots,
    Calibration,
    SegmentSample,
    calibrate,
    cost_of,
    sample_of,
)
from timeviper_platform.data.preprocess.tasks import WriteTask
from timeviper_platform.data.preprocess.worker import FusedWorker, WorkerSpec
from timeviper_platform.data.video_worker.frame_source import DecodeConfig


def test_the_ideal_is_limited_by_the_slowest_stage_and_by_the_cores() -> None:
    measured = Calibration(segments=1, frames=100, decode_seconds=0.7, encode_seconds=0.2, write_seconds=0.1)
    assert measured.ideal_frames_per_second(2, 2, is_fused=True, num_cores=2) == pytest.approx(200)
    assert measured.ideal_frames_per_second(1, 1, is_fused=True, num_cores=2) == pytest.approx(100 / 0.7)
    assert measured.ideal_frames_per_second(9, 1, is_fused=True, num_cores=9) == pytest.approx(100 / 0.7)
    slow = replace(measured, decode_seconds=0.25)
    assert slow.ideal_frames_per_second(1, 1, is_fused=True, num_cores=2) == pytest.approx(100 / 0.3)  # and writing
    assert measured.ideal_frames_per_second(1, 1, is_fused=False, num_cores=2) == pytest.approx(100 / 0.7)
    assert measured.ideal_frames_per_second(2, 1, is_fused=False, num_cores=2) == pytest.approx(200)  # not 100 / 0.35
    assert measured.ideal_frames_per_second(8, 1, is_fused=False, num_cores=9) == pytest.approx(500)  # the encoder


def test_waits_for_a_core_are_not_counted_as_cost() -> None:
    found = cost_of([synthetic_result(num_frames=10), synthetic_result(num_frames=10, decode_seconds=60.0)])
    assert found.frames == 20
    assert (found.decode_seconds, found.encode_seconds, found.write_seconds) == (12.0, 6.0, 2.0)


def test_mode_auto_splits_the_steps_when_a_gpu_would_wait_for_its_decoder() -> None:
    measured = Calibration(segments=1, frames=100, decode_seconds=0.8, encode_seconds=0.2)
    assert measured.best_mode(16, 1, num_cores=16, has_gpu=True) == "split"
    assert measured.best_mode(1, 4, num_cores=16, has_gpu=True) == "fused"  # too few decoders for four GPUs
    assert measured.best_mode(2, 2, num_cores=2, has_gpu=False) == "fused"  # both modes share the same cores


@pytest.mark.slow
def test_busy_slots_process_all_segments_and_leave_no_files(tmp_path: Path) -> None:
    encoder = VisionTowerConfig(
        model=str(make_encoder(tmp_path / "encoder")), num_tokens_per_frame=4, merge_heads=4, encode_batch_frames=8
    )
    for number in range(4):
        make_video(tmp_path / f"{number}.mp4", range(8 * (1 + number)))
    media = [Medium(str(tmp_path / f"{number}.mp4"), str(number)) for number in range(4)]
    segments = [s for table in plan_page(media, PlanSpec(fps=Fraction(1), recipe_hash="r")) for s in segments_of(table)]
    before = {path.name for path in tmp_path.iterdir()}
    with BusySlots(worker_spec(encoder, image_size=32, feature_store=str(tmp_path / "store")), 2) as slots:
        found = slots.measure(segments, seconds=0.0)
        with pytest.raises(ValueError, match="1 segments are too few for 2 slots"):
            slots.measure(segments[:1], seconds=0.0)
        gone = [replace(segment, uri="/nowhere/0.mp4") for segment in segments]
        with pytest.raises(
            RuntimeError, match=r"no frame of 4 segments, such as /nowhere/0\.mp4, can be decoded: .*no such file"
        ):
            slots.measure(gone, seconds=0.0)
    assert (found.segments, found.frames) == (4, 1 + 2 + 3 + 4)
    assert min(found.decode_seconds, found.encode_seconds, found.write_seconds) > 0
    assert {path.name for path in tmp_path.iterdir()} == before


def test_all_cpu_time_of_a_worker_and_its_child_is_counted_in_some_stage(tmp_path: Path) -> None:
    encoder = VisionTowerConfig(model=str(make_encoder(tmp_path / "encoder")), num_tokens_per_frame=4, merge_heads=4)
    (tmp_path / "pictures").mkdir()
    media = []
    for number in range(600):
        path = tmp_path / "pictures" / f"{number}.png"
        Image.new("RGB", (48, 32), (number % 256, 7, 9)).save(path)
        media.append(Medium(str(path), str(number)))
    plan = PlanSpec(fps=Fraction(1), recipe_hash="r", decode=DecodeConfig(isolation="none"))
    segments = [segment for table in plan_page(media, plan) for segment in segments_of(table)]
    others = set(psutil.Process().children())  # of other tests
    worker = FusedWorker(worker_spec(encoder, image_size=32, feature_store=str(tmp_path / "store")))
    worker.process(WriteTask("first", tuple(segments[:8])))
    (child,) = set(psutil.Process().children()) - others

    def cpu_seconds() -> float:
        times = child.cpu_times()
        return time.process_time() + float(times.user + times.system)

    before = cpu_seconds()
    found = cost_of([worker.process(WriteTask("all", tuple(segments)))])
    stages = found.decode_seconds + found.encode_seconds + found.write_seconds
    assert stages == pytest.approx(cpu_seconds() - before, rel=0.1)


def worker_spec(encoder: VisionTowerConfig, *, image_size: int, feature_store: str = "") -> WorkerSpec:
    return WorkerSpec(
        feature_store=feature_store,
        recipe_hash="r",
        encoder=encoder,
        encoder_recipe=describe_encoder(encoder).recipe,
        image_size=image_size,
        fps=Fraction(1),
        decode=DecodeConfig(),
        limits=MediaLimits(),
        num_threads=1,
    )


def test_a_sample_of_segments_is_measured_and_broken_ones_are_not_counted(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "encoder")
    config = VisionTowerConfig(model=str(folder), num_tokens_per_frame=4, merge_heads=4, encode_batch_frames=8)
    for number in range(9):
        make_video(tmp_path / f"{number}.mp4", range(8 * (1 + number)))
    spec = PlanSpec(fps=Fraction(1), recipe_hash="r", decode=DecodeConfig(isolation="none"))
    sample = SegmentSample(size=4)
    tables = [t for n in range(9) for t in plan_page([Medium(str(tmp_path / f"{n}.mp4"), str(n))], spec)]
    for table in tables:
        sample.add(table)
    chosen = [segment.segment_id for segment in sample.segments]
    assert chosen == sorted(table["segment_id"][0].as_py() for table in tables)[:4]
    assert sample_of((s for table in tables for s in segments_of(table)), size=4) == sample.segments
    encoder = FrameEncoder(config)
    worker = worker_spec(config, image_size=encoder.image_size)
    found = calibrate(sample.segments, worker, encoder)
    assert found is not None
    assert (found.segments, found.frames) == (4, sum(segment.num_frames for segment in sample.segments))
    (tmp_path / f"{sample.segments[1].media_id}.mp4").unlink()
    fewer = calibrate(sample.segments, worker, encoder)
    assert fewer is not None
    assert fewer.segments == 3
    assert calibrate(sample.segments[1:2], worker, encoder) is None
    assert calibrate([], worker, encoder) is None
