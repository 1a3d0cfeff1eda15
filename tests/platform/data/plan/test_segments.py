"""Planning: frame counts, reproducible ids, and error rows."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from PIL import Image

from reference.synthetic_media import make_video
from timeviper_platform.data.media.container import ErrorType, MediaLimits
from timeviper_platform.data.media.medium import Medium, exact
from timeviper_platform.data.plan.segments import (
    PlanSpec,
    SamplingConfig,
    Segment,
    plan_page,
    segments_of,
)
from timeviper_platform.data.video.sampling import count_frames
from timeviper_platform.data.video_worker.frame_source import DecodeConfig


def plan(media: list[Medium], fps: str = "1", **changes: object) -> pa.Table:
    arguments = {"recipe_hash": "r", "decode": DecodeConfig(isolation="none")} | changes
    return pa.concat_tables(plan_page(media, PlanSpec(fps=Fraction(fps), **arguments)))  # type: ignore[arg-type]


def segments(media: list[Medium], fps: str = "1", **changes: object) -> list[Segment]:
    return segments_of(plan(media, fps, **changes))


def test_every_started_second_has_one_frame() -> None:
    assert count_frames(Fraction(0), Fraction("596.4583"), Fraction(1)) == 597
    assert count_frames(Fraction(0), Fraction(596), Fraction(1)) == 596
    assert count_frames(Fraction(1, 2), Fraction(3), Fraction(2)) == 5
    assert count_frames(Fraction(3), Fraction(3), Fraction(1)) == 0


def test_a_video_is_cut_into_segments_of_64_frames(tmp_path: Path) -> None:
    make_video(tmp_path / "clip.mp4", range(0, 1040), gop=100)
    found = segments([Medium(str(tmp_path / "clip.mp4"), "clip")])
    assert [s.num_frames for s in found] == [64, 64, 2]
    assert [s.first_frame for s in found] == [0, 64, 128]
    assert [(s.segment_index, s.num_segments) for s in found] == [(0, 3), (1, 3), (2, 3)]
    assert len({s.segment_id for s in found}) == 3
    assert found[2].times(Fraction(1)) == [128, 129]
    assert (found[0].width, found[0].height, found[0].codec) == (64, 48, "h264")


def test_ids_depend_only_on_content_recipe_and_clip(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    make_video(path, range(40))
    medium = Medium(str(path), "clip")

    def first_id(medium: Medium = medium, **changes: object) -> str:
        return segments([medium], **changes)[0].segment_id

    before = first_id()
    assert first_id() == before
    assert first_id(recipe_hash="other") != before
    assert first_id(Medium(str(path), "clip", 1.0, 3.0)) != before
    hashed = first_id(hash_mode="sha256")
    os.utime(path, ns=(1, 1))
    assert first_id() != before
    assert first_id(hash_mode="sha256") == hashed  # the bytes are the same


def test_a_clip_is_sampled_on_the_clock_of_its_source(tmp_path: Path) -> None:
    make_video(tmp_path / "clip.mp4", range(80))
    times = segments([Medium(str(tmp_path / "clip.mp4"), "clip", 2.5, 99.0)], fps="2")[0].times(Fraction(2))
    assert (times[0], times[-1], len(times)) == (Fraction(5, 2), Fraction(19, 2), 15)


def test_a_short_video_is_sampled_at_the_middles_of_equal_parts(tmp_path: Path) -> None:
    """The public code fills up to a multiple of 4 first, so that 29 frames become 32 without new times."""
    make_video(tmp_path / "28.mp4", range(0, 28 * 8), gop=100)
    make_video(tmp_path / "29.mp4", range(0, 29 * 8), gop=100)
    short, long = (Medium(str(tmp_path / name), name) for name in ("28.mp4", "29.mp4"))
    (segment,) = segments([short], min_frames=32)
    assert segment.times(Fraction(1)) == [Fraction(28, 32) * k + Fraction(28, 64) for k in range(32)]
    assert segment.time(32, Fraction(1)) - segment.time(0, Fraction(1)) == 28
    assert [s.num_frames for s in segments([long], min_frames=32)] == [29]
    (clip,) = segments([Medium(str(tmp_path / "28.mp4"), "clip", 4.0, 8.0)], min_frames=32)
    assert clip.times(Fraction(1))[:2] == [Fraction("4.0625"), Fraction("4.1875")]
    assert [s.num_frames for s in segments([short])] == [28]


def test_bad_media_become_error_rows_in_order(tmp_path: Path) -> None:
    make_video(tmp_path / "clip.mp4", range(40))
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    (tmp_path / "text.mp4").write_text("text")
    paths = ("image.png", "text.mp4", "nowhere.mp4", "clip.mp4")
    media = [Medium(str(tmp_path / name), name) for name in paths]
    media.append(Medium(str(tmp_path / "clip.mp4"), "late", 50.0))
    table = plan(media)
    assert table["error_type"].to_pylist() == [
        None,
        ErrorType.UNKNOWN_FORMAT,
        ErrorType.NOT_FOUND,
        None,
        ErrorType.EMPTY_RANGE,
    ]
    assert table["status"].to_pylist() == ["planned", "error", "error", "planned", "error"]
    assert table.filter(pc.field("status") == "error")["media_id"].to_pylist() == ["text.mp4", "nowhere.mp4", "late"]
    long = plan([Medium(str(tmp_path / "clip.mp4"), "long")], limits=MediaLimits(max_frames=4))
    assert long["error_type"].to_pylist() == [ErrorType.TOO_MANY_FRAMES]


def test_fps_is_the_decimal_number_in_the_configuration() -> None:
    assert exact(0.1) == Fraction(1, 10)
    assert exact(-1.5) == Fraction(-3, 2)
    assert [exact(1e-7), exact(1e22)] == [Fraction(1, 10**7), 10**22]
    assert exact(SamplingConfig(fps=29.97).fps) == Fraction(2997, 100)
    with pytest.raises(ValueError, match="fps"):
        SamplingConfig(fps=0)
