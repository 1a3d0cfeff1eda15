"""An estimate is made from real segments, of which any is as likely, and adds up as the steps do."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from reference.made_media import make_encoder, make_video
from timeviper_platform.data.calibrate import Calibration, SegmentSample, calibrate
from timeviper_platform.data.encode import EncoderConfig, FrameEncoder
from timeviper_platform.data.manifest import MediaItem
from timeviper_platform.data.media import MediaLimits
from timeviper_platform.data.segment_frames import DecodeConfig
from timeviper_platform.data.segments import PlanSpec, plan_page
from timeviper_platform.data.steps import WorkerSpec


def test_time_is_the_sum_of_fused_steps_and_the_slower_of_split_ones() -> None:
    measured = Calibration(segments=1, frames=10, decode_seconds=4.0, encode_seconds=1.0)
    assert measured.seconds(100, 2, 2, is_fused=True) == pytest.approx(25)
    assert measured.seconds(100, 2, 1, is_fused=False) == pytest.approx(20)
    assert measured.seconds(100, 8, 1, is_fused=False) == pytest.approx(10)


def test_a_few_segments_are_tried_and_broken_ones_are_not_counted(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "encoder")
    config = EncoderConfig(encoder=str(folder), num_tokens_per_frame=4, merge_heads=4, encode_batch_frames=8)
    for number in range(9):
        make_video(tmp_path / f"{number}.mp4", range(8 * (1 + number)))
    spec = PlanSpec(fps=Fraction(1), recipe_hash="r")
    sample = SegmentSample(size=4)
    tables = [t for n in range(9) for t in plan_page([MediaItem(str(tmp_path / f"{n}.mp4"), str(n))], spec)]
    for table in tables:
        sample.add(table)
    chosen = [segment.segment_id for segment in sample.segments]
    assert chosen == sorted(table["segment_id"][0].as_py() for table in tables)[:4]
    encoder = FrameEncoder(config)
    worker = WorkerSpec(
        store="",
        recipe_hash="r",
        encoder=config,
        image_size=encoder.image_size,
        fps=Fraction(1),
        decode=DecodeConfig(),
        limits=MediaLimits(),
        num_threads=1,
    )
    found = calibrate(sample.segments, worker, encoder)
    assert found is not None
    assert (found.segments, found.frames) == (4, sum(segment.num_samples for segment in sample.segments))
    (tmp_path / f"{sample.segments[1].media_id}.mp4").unlink()
    fewer = calibrate(sample.segments, worker, encoder)
    assert fewer is not None
    assert fewer.segments == 3
    assert calibrate(sample.segments[1:2], worker, encoder) is None
    assert calibrate([], worker, encoder) is None
