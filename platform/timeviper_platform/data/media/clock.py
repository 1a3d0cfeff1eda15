"""Places the packets of a video stream on the medium's clock, and finds its end.

0 s is the container's start_time where that is above 0. In formats whose clocks may restart (MPEG-TS, MPEG-PS, Ogg) it
is always start_time, and after a jump the clock continues where it was:

    PTS in the file     0  1  2 | 0  1  2  a second recording, joined
    PTS on the clock    0  1  2   3  4  5
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av

logger = logging.getLogger(__name__)

MAX_GAP_SECONDS = 10
"""A larger step forward in DTS is a jump, as with FFmpeg's dts_delta_threshold."""

MAX_STEP_BACK_SECONDS = Fraction(1, 10)
"""A larger step back in DTS is a jump. FFmpeg's tolerance."""


class StreamClock:
    """Seconds on the medium's clock to ticks of one stream, and back."""

    def __init__(self, container: Any, stream: Any) -> None:
        self.time_base = Fraction(stream.time_base)
        self.may_jump = bool(container.format.flags & av.format.Flags.ts_discont.value)
        self.has_stamps = not container.format.flags & av.format.Flags.no_timestamps.value
        """False for elementary streams, whose frames follow at the nominal rate."""
        has_only_dts = container.format.name in ("avi", "asf") and stream.codec_context.has_b_frames
        self.has_pts = self.has_stamps and not has_only_dts
        """False where FFmpeg guesses PTS in the order of decoding: the n-th frame shown has the n-th timestamp."""
        start = _exact_start(container, stream)
        self.start_seconds = start if self.may_jump else max(Fraction(0), start)
        """0 s, in the stream's own time."""
        rate = stream.average_rate or stream.base_rate
        self.frame_ticks = max(1, round(1 / (rate * self.time_base))) if rate else 1
        """Nominal duration of a frame."""

    def tick(self, seconds: Fraction) -> int:
        """Returns the last tick at or before `seconds`."""
        return math.floor((seconds + self.start_seconds) / self.time_base)

    def seconds(self, tick: int) -> Fraction:
        return tick * self.time_base - self.start_seconds

    def ticks_in(self, seconds: float | Fraction) -> int:
        return math.floor(seconds / self.time_base)


class VideoPackets:
    """Packets of one stream in decode order, from the container's current position.

    In joined recordings it rewrites their PTS and DTS. Packets of size 0 repeat the last picture: decoders take them
    for the end.
    """

    def __init__(self, container: Any, stream: Any, clock: StreamClock, *, name: str) -> None:
        self._clock, self._name = clock, name
        self._packets: Iterator[Any] = container.demux(stream)
        self._has_decode_durations = "mp4" in container.format.name
        """MP4 states the time to the next packet in decode order."""
        self.num_parts = 1
        """Joined recordings so far."""
        self.num_shown = 0
        """Packets so far, without those before an edit list's start."""
        self._offset = 0
        self._part_start: int | None = None
        self._waits_for_keyframe = False
        self._expected: int | None = None
        """DTS of the next packet."""
        self._reorder = 0
        """PTS - DTS of the last packet."""
        self._last_shown: tuple[int, int] | None = None
        """PTS and duration of the packet shown last."""
        self._last_duration = 0
        """Duration of the last packet in decode order."""

    def next(self) -> Any:
        """Returns the next packet; None at the end, or where the file cannot be read."""
        while True:
            try:
                packet = next(self._packets, None)
            except av.error.FFmpegError as error:
                logger.info("%s: reading ends early: %s", self._name, error)
                return None
            except IndexError:  # raised by PyAV at the end if streams appeared while reading
                return None
            if packet is None:
                return None
            if not self._clock.has_stamps and packet.size:
                packet.pts = packet.dts = self.num_shown * self._clock.frame_ticks
            stamp = packet.pts if packet.dts is None else packet.dts
            if stamp is None:
                if packet.size == 0:  # demux() ends with one
                    continue
                return packet
            if self._clock.may_jump and not self._place(packet, stamp):
                continue
            self._extend(packet)
            return packet

    def __iter__(self) -> Iterator[Any]:
        while (packet := self.next()) is not None:
            yield packet

    @property
    def end_tick(self) -> int:
        """When the last frame leaves the screen."""
        if self._last_shown is None:
            return self._clock.tick(Fraction(0))
        pts, duration = self._last_shown
        return pts + ((self._last_duration if self._has_decode_durations else duration) or self._clock.frame_ticks)

    def _place(self, packet: Any, stamp: int) -> bool:
        """Moves a packet to the medium's clock. Returns False for one that cannot be shown."""
        clock = self._clock
        if packet.pts is not None:
            if self._is_jump(packet.pts - stamp):  # FFmpeg guesses that of the last packet before a jump
                packet.pts = stamp + self._reorder
            self._reorder = packet.pts - stamp
        if self._expected is not None:
            ahead = stamp + self._offset - self._expected
            if self._is_jump(ahead):
                first = stamp if packet.pts is None else packet.pts
                self._part_start = self.end_tick
                self._offset = self._part_start - first
                self._waits_for_keyframe = True
                self.num_parts += 1
                logger.info("%s: the clock jumps by %.1f s; continuing", self._name, float(ahead * clock.time_base))
        self._expected = stamp + self._offset + (packet.duration or clock.frame_ticks)
        if self._offset:
            packet.pts = None if packet.pts is None else packet.pts + self._offset
            packet.dts = None if packet.dts is None else packet.dts + self._offset
        if self._waits_for_keyframe and not packet.is_keyframe:
            self._extend(packet)  # the previous recording's last picture stays until then
            return False
        self._waits_for_keyframe = False
        return self._part_start is None or packet.pts is None or packet.pts >= self._part_start

    def _is_jump(self, ticks: int) -> bool:
        return not -MAX_STEP_BACK_SECONDS <= ticks * self._clock.time_base <= MAX_GAP_SECONDS

    def _extend(self, packet: Any) -> None:
        if packet.is_discard:  # before an edit list's start: a reference that is never shown
            return
        self.num_shown += 1
        pts = packet.dts if packet.pts is None else packet.pts
        duration = packet.duration or 0
        self._last_duration = duration
        if self._last_shown is None or pts >= self._last_shown[0]:
            self._last_shown = pts, duration


def _exact_start(container: Any, stream: Any) -> Fraction:
    """Returns start_time in seconds, without the container's rounding to microseconds."""
    if container.start_time is None:
        return (stream.start_time or 0) * Fraction(stream.time_base)
    rounded = Fraction(container.start_time, av.time_base)
    starts = [s.start_time * Fraction(s.time_base) for s in (stream, *container.streams) if s.start_time is not None]
    return next((start for start in starts if abs(start - rounded) * av.time_base < 1), rounded)
