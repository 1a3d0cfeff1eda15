"""Samples only keyframes: for time t the last one with t - step < PTS <= t.

Steps without a keyframe have no frame, and do not count as missing.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from timeviper_platform.data.media.clock import StreamClock, VideoPackets
from timeviper_platform.data.media.container import (
    MediaFile,
    MediaLimits,
    decode_errors,
    source_name,
    video_stream,
)
from timeviper_platform.data.video.frames import FrameBatch, Resample
from timeviper_platform.data.video.pyav_reader import scale_frame

logger = logging.getLogger(__name__)

JUMP_SECONDS = 10
"""Distance from which a seek is cheaper than reading on."""


class KeyframeReader:
    """VideoReader of keyframes, on one thread."""

    def __init__(
        self,
        source: str | bytes,
        image_size: int,
        *,
        step: Fraction,
        limits: MediaLimits | None = None,
        joined_parts: int | None = None,
        resample: Resample = "bicubic",
        file: MediaFile | None = None,
    ) -> None:
        self._source, self._name = source, source_name(source)
        self._image_size, self._step = image_size, step
        self._limits = limits or MediaLimits()
        self._joined_parts = joined_parts  # 1 = a transport stream may be seeked by time
        self._reformatter = VideoReformatter()
        self._resample = resample
        self._packets: VideoPackets
        self._held: Any = None  # a packet past the last requested time
        self._position: int  # keyframes are read up to here
        with decode_errors("decode_video", source, self._limits):
            self._file = file or MediaFile(source, self._limits)
            self._open()

    def sample(self, times: Sequence[Fraction]) -> FrameBatch:
        ticks = [self._clock.tick(t) for t in times]
        if ticks != sorted(ticks):
            raise ValueError("sampling times must ascend")
        packets: dict[int, Any] = {}  # by index in `times`
        kept: list[tuple[Fraction, int, np.ndarray]] = []
        num_missing = 0
        with decode_errors("decode_video", self._source, self._limits):
            if ticks:
                for packet in self._keyframes(self._clock.tick(times[0] - self._step), ticks[-1]):
                    packets[bisect.bisect_left(ticks, _stamp(packet))] = packet  # the last keyframe of a step wins
            for index, packet in packets.items():
                try:
                    frame = self._decode(packet)
                except av.error.FFmpegError as error:
                    logger.debug("%s: a keyframe does not decode: %s", self._name, error)
                    num_missing += 1
                    continue
                if frame is None:  # it needs earlier frames, as with intra refresh
                    continue
                if frame.is_corrupt or (packet.is_corrupt and not self._clock.may_jump):
                    num_missing += 1
                else:
                    kept.append((times[index], _stamp(packet), self._scale(frame)))
        size = self._image_size
        return FrameBatch(
            np.stack([pixels for _, _, pixels in kept]) if kept else np.empty((0, size, size, 3), np.uint8),
            np.array([float(self._clock.seconds(pts)) for _, pts, _ in kept]),
            np.array([float(t) for t, _, _ in kept]),
            num_missing,
        )

    def close(self) -> None:
        self._container.close()

    def _keyframes(self, after: int, until: int) -> Iterator[Any]:
        """Yields packets with after < PTS <= until, ascending."""
        if after < self._position or after - self._position > self._clock.ticks_in(JUMP_SECONDS):
            self._seek(after)
        self._position = until
        while (packet := self._next_packet()) is not None:
            if not packet.is_keyframe or packet.is_discard:
                continue
            if _stamp(packet) > until:
                self._held = packet
                return
            if _stamp(packet) > after:
                yield packet

    def _next_packet(self) -> Any:
        packet, self._held = self._held or self._packets.next(), None
        while packet is not None and (packet.size == 0 or (packet.pts is None and packet.dts is None)):
            packet = self._packets.next()
        return packet

    def _seek(self, tick: int) -> None:
        target, back = tick, max(1, self._clock.ticks_in(2))
        may_seek = self._clock.has_stamps and (not self._clock.may_jump or self._joined_parts == 1)
        while may_seek and target > self._clock.tick(Fraction(0)):
            try:
                self._container.seek(target, stream=self._stream)
            except av.error.FFmpegError as error:
                logger.info("%s: cannot seek (%s); reading from its start", self._name, error)
                break
            self._packets, self._held = self._all_packets(), None
            packet = self._next_packet()
            if packet is not None and packet.is_keyframe and _stamp(packet) <= tick:
                self._held = packet
                return
            target, back = target - back, 2 * back
        self._container.close()
        self._open()

    def _decode(self, packet: Any) -> Any:
        context = self._stream.codec_context
        context.flush_buffers()
        return next(iter([*context.decode(packet), *context.decode(None)]), None)

    def _scale(self, frame: Any) -> np.ndarray:
        return scale_frame(
            frame, self._image_size, self._reformatter, limits=self._limits, name=self._name, resample=self._resample
        )

    def _open(self) -> None:
        self._container = self._file.open_container()
        self._stream = video_stream(self._container, "decode_video", self._name)
        self._stream.codec_context.thread_type = "NONE"
        self._clock = StreamClock(self._container, self._stream)
        self._packets = self._all_packets()
        self._held = None
        self._position = self._clock.tick(-self._step)

    def _all_packets(self) -> VideoPackets:
        return VideoPackets(self._container, self._stream, self._clock, name=self._name)


def _stamp(packet: Any) -> int:
    return int(packet.dts if packet.pts is None else packet.pts)
