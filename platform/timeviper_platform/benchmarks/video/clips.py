"""Generates H.264 videos from FFmpeg's test pattern (testsrc2) with x264's defaults unless set otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipSpec:
    seconds: int = 60
    fps: int = 30
    width: int = 640
    height: int = 360
    gop: int | None = None
    """Keyframe interval in frames; None = x264's default (250)."""
    is_variable: bool = False
    """Frames come after 1 to 9 ticks of 1 / fps, at random."""


def make_clip(path: Path, spec: ClipSpec = ClipSpec()) -> None:
    source = f"testsrc2=size={spec.width}x{spec.height}:rate={spec.fps}"
    with av.open(source, format="lavfi") as pattern, av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=spec.fps)
        stream.width, stream.height, stream.pix_fmt = spec.width, spec.height, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, spec.fps)
        if spec.gop is not None:
            stream.gop_size = spec.gop
            stream.options = {"x264-params": f"keyint={spec.gop}:min-keyint={spec.gop}:scenecut=0"}
        for tick, picture in zip(_ticks(spec), pattern.decode(video=0), strict=False):
            frame = picture.reformat(format="yuv420p")
            frame.pict_type = av.video.frame.PictureType.NONE  # the pattern marks every frame as a keyframe
            frame.pts, frame.time_base = tick, Fraction(1, spec.fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def repeat_clip(source: Path, target: Path, times: int) -> None:
    """Repeats `source` by stream copy; each repetition starts with its keyframe."""
    with av.open(str(source)) as clip, av.open(str(target), "w") as container:
        template = clip.streams.video[0]
        stream = container.add_stream_from_template(template)
        packets = [packet for packet in clip.demux(template) if packet.size]
        data = [(bytes(packet), packet.pts, packet.dts, packet.duration, packet.is_keyframe) for packet in packets]
        span = max(pts + duration for _, pts, _, duration, _ in data)
        for repetition in range(times):
            for payload, pts, dts, duration, is_keyframe in data:
                packet = av.Packet(payload)
                packet.stream, packet.time_base = stream, template.time_base
                packet.pts, packet.dts = pts + repetition * span, dts + repetition * span
                packet.duration, packet.is_keyframe = duration, is_keyframe
                container.mux(packet)


def _ticks(spec: ClipSpec) -> Sequence[int]:
    if not spec.is_variable:
        return range(spec.seconds * spec.fps)
    steps = np.random.default_rng(1).choice([1, 1, 2, 3, 9], size=spec.seconds * spec.fps)
    ticks = np.concatenate([[0], np.cumsum(steps)])
    return [int(tick) for tick in ticks[ticks < spec.seconds * spec.fps]]
