"""An estimate is made from real segments, of which any is as likely, and adds up as the steps do."""

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
from timeviper_platform.data.encode.frame_encoder import FrameEncoder, VisionTowerConfig
from timeviper_platform.data.media.container import MediaLimits
from timeviper_platform.data.media.medium import Medium
from timeviper_platform.data.plan.segments import PlanSpec, WriteTask, plan_page, segments_of
from timeviper_platform.data.preprocess.calibrate import (
    BusySlots,
    Calibration,
    SegmentSample,
    calibrate,
    cost_of,
    sample_of,
)
from timeviper_platform.data.preprocess.worker import TaskProcessor, WorkerSpec
from timeviper_platform.data.video_worker.frame_source import DecodeConfig


def test_the_ideal_is_that_of_the_slowest_stage_and_never_more_than_the_cores_can_do() -> None:
    measured = Calibration(segments=1, frames=100, decode_seconds=0.7, encode_seconds=0.2, write_seconds=0.1)
    assert measured.ideal_frames_per_second(2, 2, is_fused=True, num_cores=2) == pytest.approx(200)
    assert measured.ideal_frames_per_second(1, 1, is_fused=True, num_cores=2) == pytest.approx(100 / 0.7)  # its child's
    assert measured.ideal_frames_per_second(9, 1, is_fused=True, num_cores=9) == pytest.approx(100 / 0.7)  # has no more
    slow = replace(measured, decode_seconds=0.25)
    assert slow.ideal_frames_per_second(1, 1, is_fused=True, num_cores=2) == pytest.approx(
        100 / 0.3
    )  # who encodes writes
    assert measured.ideal_frames_per_second(1, 1, is_fused=False, num_cores=2) == pytest.approx(100 / 0.7)
    assert measured.ideal_frames_per_second(2, 1, is_fused=False, num_cores=2) == pytest.approx(200)  # not 100 / 0.35
    assert measured.ideal_frames_per_second(8, 1, is_fused=False, num_cores=9) == pytest.approx(500)  # the encoder


def test_a_wait_for_a_core_is_no_frames_cost() -> None:
    found = cost_of([synthetic_result(num_frames=10), synthetic_result(num_frames=10, decode_seconds=60.0)])
    assert found.frames == 20
    assert (found.decode_seconds, found.encode_seconds, found.write_seconds) == (12.0, 6.0, 2.0)


def test_the_steps_are_split_where_a_gpu_would_wait_for_its_own_decoder() -> None:
    measured = Calibration(segments=1, frames=100, decode_seconds=0.8, encode_seconds=0.2)
    assert measured.best_mode(16, 1, num_cores=16, has_gpu=True) == "split"
    assert measured.best_mode(1, 4, num_cores=16, has_gpu=True) == "fused"  # too few decoders for four GPUs
    assert measured.best_mode(2, 2, num_cores=2, has_gpu=False) == "fused"  # the cores are all there is


def test_busy_slots_do_all_segments_together_and_leave_nothing(tmp_path: Path) -> None:
    encoder = VisionTowerConfig(
        model=str(make_encoder(tmp_path / "encoder")), num_tokens_per_frame=4, merge_heads=4, encode_batch_frames=8
    )
    for number in range(4):
        make_video(tmp_path / f"{number}.mp4", range(8 * (1 + number)))
    items = [Medium(str(tmp_path / f"{number}.mp4"), str(number)) for number in range(4)]
    segments = [s for table in plan_page(items, PlanSpec(fps=Fraction(1), recipe_hash="r")) for s in segments_of(table)]
    before = {path.name for path in tmp_path.iterdir()}
    with BusySlots(made_spec(encoder, image_size=32, store=str(tmp_path / "store")), 2) as slots:
        found = slots.measure(segments, seconds=0.0)
        with pytest.raises(ValueError, match="1 segments are too few for 2 slots"):
            slots.measure(segments[:1], seconds=0.0)
        gone = [replace(segment, uri="/nowhere/0.mp4") for segment in segments]
        with pytest.raises(
            RuntimeError, match=r"not one frame of /nowhere/0\.mp4 and its like decodes: .*no such file"
        ):
            slots.measure(gone, seconds=0.0)
    assert (found.segments, found.frames) == (4, 1 + 2 + 3 + 4)
    assert min(found.decode_seconds, found.encode_seconds, found.write_seconds) > 0
    assert {path.name for path in tmp_path.iterdir()} == before


def test_all_that_a_worker_and_its_child_compute_is_some_stages_cost(tmp_path: Path) -> None:
    encoder = VisionTowerConfig(model=str(make_encoder(tmp_path / "encoder")), num_tokens_per_frame=4, merge_heads=4)
    (tmp_path / "pictures").mkdir()
    items = []
    for number in range(600):
        path = tmp_path / "pictures" / f"{number}.png"
        Image.new("RGB", (48, 32), (number % 256, 7, 9)).save(path)
        items.append(Medium(str(path), str(number)))
    plan = PlanSpec(fps=Fraction(1), recipe_hash="r", decode=DecodeConfig(isolation="none"))
    segments = [segment for table in plan_page(items, plan) for segment in segments_of(table)]
    processor = TaskProcessor(made_spec(encoder, image_size=32, store=str(tmp_path / "store")))
    processor.process(WriteTask("first", tuple(segments[:8])))

    def spent() -> float:
        (child,) = (process for process in psutil.Process().children() if "child_main" in " ".join(process.cmdline()))
        times = child.cpu_times()
        return time.process_time() + float(times.user + times.system)

    before = spent()
    found = cost_of([processor.process(WriteTask("all", tuple(segments)))])
    stages = found.decode_seconds + found.encode_seconds + found.write_seconds
    assert stages == pytest.approx(spent() - before, rel=0.1)


def made_spec(encoder: VisionTowerConfig, *, image_size: int, store: str = "") -> WorkerSpec:
    return WorkerSpec(
        store=store,
        recipe_hash="r",
        encoder=encoder,
        image_size=image_size,
        fps=Fraction(1),
        decode=DecodeConfig(),
        limits=MediaLimits(),
        num_threads=1,
    )


def test_a_few_segments_are_tried_and_broken_ones_are_not_counted(tmp_path: Path) -> None:
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
    worker = made_spec(config, image_size=encoder.image_size)
    found = calibrate(sample.segments, worker, encoder)
    assert found is not None
    assert (found.segments, found.frames) == (4, sum(segment.num_frames for segment in sample.segments))
    (tmp_path / f"{sample.segments[1].media_id}.mp4").unlink()
    fewer = calibrate(sample.segments, worker, encoder)
    assert fewer is not None
    assert fewer.segments == 3
    assert calibrate(sample.segments[1:2], worker, encoder) is None
    assert calibrate([], worker, encoder) is None
