"""Reads timestamps and orientation with PyAV, to check other backends."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np

from timeviper_platform.data.media.container import (
    MediaLimits,
    check_size,
    clock_origin,
    decode_errors,
    open_container,
    source_name,
    video_stream,
)
from timeviper_platform.data.video.orientation import UPRIGHT, Orientation, orientation_of


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """Timing and orientation of the `video_stream`."""

    index: int
    num_video_streams: int
    """Video streams, including cover pictures."""
    time_base: Fraction
    origin: int
    """Tick at 0 s."""
    starts_anywhere: bool
    """True when the clock need not start at 0."""
    ticks: np.ndarray
    """(F,) int64: PTS of the shown frames, ascending."""
    end_tick: int
    is_timed: bool
    """False when packets lack reliable PTS."""
    orientation: Orientation


def read_stream_info(source: str | bytes, limits: MediaLimits) -> StreamInfo:
    """Reads all packets and decodes one frame."""
    name = source_name(source)
    with decode_errors("decode_video", source, limits), open_container(source, limits) as container:
        num_video_streams = len(container.streams.video)
        stream = video_stream(container, "decode_video", name)
        context = stream.codec_context
        context.thread_type = "NONE"
        check_size(context.width, context.height, limits, "decode_video", name)
        time_base = Fraction(stream.time_base)
        frame_ticks = max(1, round(1 / (stream.average_rate * time_base))) if stream.average_rate else 1
        stamps, end_tick = [], 0
        # AVI has no PTS; FFmpeg's are in decode order
        is_timed = container.format.name != "avi" or not context.has_b_frames
        orientation = None
        for packet in _packets(container, stream):
            if orientation is None:
                orientation = _orientation(context, packet)
            if packet.is_discard:
                continue
            if packet.pts is None:
                is_timed = False
                continue
            stamps.append(packet.pts)
            end_tick = max(end_tick, packet.pts + (packet.duration or frame_ticks))
        return StreamInfo(
            index=stream.index,
            num_video_streams=num_video_streams,
            time_base=time_base,
            origin=clock_origin(container, stream),
            starts_anywhere=bool(container.format.flags & av.format.Flags.ts_discont.value),
            ticks=np.sort(np.array(stamps, np.int64)),
            end_tick=end_tick,
            is_timed=is_timed,
            orientation=orientation or UPRIGHT,
        )


def _packets(container: Any, stream: Any) -> Any:
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.error.FFmpegError:
            return
        if packet is None or packet.size == 0:
            return
        yield packet


def _orientation(context: Any, packet: Any) -> Orientation | None:
    try:
        frames = context.decode(packet)
    except av.error.FFmpegError:
        return None
    return orientation_of(frames[0]) if frames else None
