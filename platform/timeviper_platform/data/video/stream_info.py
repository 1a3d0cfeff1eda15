"""Reads timestamps and orientation with PyAV, to check other backends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import av
import numpy as np

from timeviper_platform.data.media.clock import StreamClock, VideoPackets
from timeviper_platform.data.media.container import (
    MediaFile,
    MediaLimits,
    check_size,
    decode_errors,
    source_name,
    video_stream,
)
from timeviper_platform.data.media.stream_end import is_cut_short
from timeviper_platform.data.video.frames import BackendUnfitError
from timeviper_platform.data.video.orientation import UPRIGHT, Orientation, orientation_of


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """Timing and orientation of the `video_stream`."""

    index: int
    num_video_streams: int
    """Video streams, including cover pictures."""
    clock: StreamClock
    ticks: np.ndarray
    """(F,) int64: PTS of the shown frames, ascending."""
    end_tick: int
    is_cut_short: bool
    """True when the header states more bytes than the file has."""
    orientation: Orientation


def read_stream_info(source: str | bytes, limits: MediaLimits) -> StreamInfo:
    """Reads all packets and decodes one frame.

    Raises:
        DecodeError: when the file cannot be read.
        BackendUnfitError: for streams that only PyAVReader reads exactly.
    """
    name = source_name(source)
    with decode_errors("decode_video", source, limits):
        file = MediaFile(source, limits)
        return _stream_info(file, limits, name)


def _stream_info(file: MediaFile, limits: MediaLimits, name: str) -> StreamInfo:
    with file.open_container() as container:
        num_video_streams = len(container.streams.video)
        stream = video_stream(container, "decode_video", name)
        context = stream.codec_context
        context.thread_type = "NONE"
        check_size(context.width, context.height, limits, "decode_video", name)
        clock = StreamClock(container, stream)
        if not clock.has_pts:
            raise BackendUnfitError("its packets lack reliable PTS")
        packets = VideoPackets(container, stream, clock, name=name)
        stamps, num_keyframes, orientation = [], 0, None
        for packet in packets:
            if packet.pts is None:
                raise BackendUnfitError("its packets lack reliable PTS")
            if packet.size == 0:
                raise BackendUnfitError("empty packets repeat frames")
            if not (num_keyframes or packet.is_keyframe):
                raise BackendUnfitError("it begins inside a group of pictures")
            num_keyframes += packet.is_keyframe
            if orientation is None:
                orientation = _orientation(context, packet)
            elif packet.is_keyframe and num_keyframes == 2:
                _check_keyframe(context, packet)
            if not packet.is_discard:
                stamps.append(packet.pts)
        if packets.num_parts > 1:
            raise BackendUnfitError("its clock jumps")
        return StreamInfo(
            index=stream.index,
            num_video_streams=num_video_streams,
            clock=clock,
            ticks=np.sort(np.array(stamps, np.int64)),
            end_tick=packets.end_tick,
            is_cut_short=is_cut_short(file.head, container, stream),
            orientation=orientation or UPRIGHT,
        )


def _orientation(context: Any, packet: Any) -> Orientation | None:
    try:
        frames = context.decode(packet)
    except av.error.FFmpegError:
        return None
    return orientation_of(frames[0]) if frames else None


def _check_keyframe(context: Any, packet: Any) -> None:
    try:
        context.flush_buffers()
        is_clean = bool([*context.decode(packet), *context.decode(None)])
    except av.error.FFmpegError:  # damage
        return
    if not is_clean:
        raise BackendUnfitError("its keyframes need earlier frames")
