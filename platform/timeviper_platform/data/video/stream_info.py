"""What a video's packets and its first frame say: what the readers that are not PyAV's are held against.

Reads all packets and decodes one frame, with PyAV. Does not know the other readers.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np

from timeviper_platform.data.media.container import (
    MediaLimits,
    clock_origin,
    open_container,
    reading,
    source_name,
    video_stream,
)
from timeviper_platform.data.video.frames import check_size
from timeviper_platform.data.video.orientation import UPRIGHT, Orientation, orientation_of


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """Of the first real video stream."""

    index: int
    num_video_streams: int
    """cover pictures among them"""
    time_base: Fraction
    origin: int
    """tick that is 0 s on the medium's clock"""
    starts_anywhere: bool
    """True for formats whose clock does"""
    ticks: np.ndarray
    """(F,) int64: PTS of the frames that are shown, ascending"""
    end_tick: int
    """when the last of them leaves the screen"""
    is_timed: bool
    """False where packets do not say when their frames are shown"""
    orientation: Orientation


def read_stream_info(source: str | bytes, limits: MediaLimits) -> StreamInfo:
    """Facts of a video.

    Raises:
        DecodeError: when it cannot be opened, has no video stream, or is past a limit.
    """
    name = source_name(source)
    with reading("decode_video", source, limits), open_container(source, limits) as container:
        num_video_streams = len(container.streams.video)
        stream = video_stream(container, "decode_video", name)
        context = stream.codec_context
        context.thread_type = "NONE"
        check_size(context.width, context.height, limits, "decode_video", name)
        time_base = Fraction(stream.time_base)
        frame_ticks = max(1, round(1 / (stream.average_rate * time_base))) if stream.average_rate else 1
        stamps, end_tick = [], 0
        # AVI has no PTS: with B frames, what FFmpeg states is the order of decoding
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
    """Those with data, up to the end or to damage."""
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
    """Of the first frame that there is when the decoder has got this packet too; None = not one yet."""
    try:
        frames = context.decode(packet)
    except av.error.FFmpegError:
        return None
    return orientation_of(frames[0]) if frames else None
