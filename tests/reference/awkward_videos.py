"""Synthetic videos that break naive sampling: B-frames, rare keyframes, late starts, variable frame rates."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

from reference.synthetic_media import make_video
from timeviper_platform.data.video.sampling import sample_times

SIZE = 32
"""Side of decoded frames in pixels."""


def seconds(count: int, fps: int = 1) -> list[Fraction]:
    """`count` sampling times from 0."""
    return sample_times(Fraction(0), Fraction(fps), 0, count)


def variable(path: Path) -> None:
    make_video(path, [0, 1, 2, 3, 8, 30, 31, 33, 40, 41, 60, 79], gop=250, b_frames=2)


def late_start(path: Path) -> None:
    make_video(path, range(5, 60), format="matroska")


def dts_first(path: Path) -> None:
    make_video(path, range(80), format="avi", codec="mpeg4")


KINDS: dict[str, Callable[[Path], None]] = {
    "b_frames.mp4": lambda p: make_video(p, range(80), gop=40, b_frames=3),
    "pyramid.mp4": lambda p: make_video(p, range(120), gop=60, b_frames=7, options={"b-pyramid": "normal"}),
    "all_keyframes.mp4": lambda p: make_video(p, range(40), gop=1, b_frames=0),
    "one_keyframe.mp4": lambda p: make_video(p, range(250), gop=1000),
    "ntsc.mp4": lambda p: make_video(p, [1001 * i for i in range(150)], time_base=Fraction(1, 30000)),
    "variable.mp4": variable,
    "late_start.mkv": late_start,
    "h264.ts": lambda p: make_video(p, range(80), format="mpegts"),
    "mpeg4.avi": dts_first,
    "mpeg4_b_frames.avi": lambda p: make_video(p, range(80), format="avi", codec="mpeg4", options={"bf": "2"}),
    "mpeg2.mkv": lambda p: make_video(p, range(100), codec="mpeg2video", time_base=Fraction(1, 25)),
}
