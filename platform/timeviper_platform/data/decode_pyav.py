"""Sampling with PyAV: exact, and without decoding what nothing refers to.

Walks packets in decode order; lookahead.py says which of them hold wanted frames. The others are sent with
`skip_frame = NONREF`: the decoder drops them when no other frame refers to them (most B frames), which changes no
pixel of what remains. Skipping non-reference frames everywhere, as players do, would return neighbours of the wanted
frames instead. Streams whose packets state no PTS, or none of use (H.264 in AVI), are decoded frame by frame.

    decode order   I0   P4   B2   b1   b3   P8 ...    t = 1 wants b1: I0, P4 and B2 are references and decoded
    sent with      skip skip skip ALL  skip skip      anyway, b1 is decoded because it is wanted, b3 is dropped
"""

from __future__ import annotations

import heapq
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from timeviper_platform.data.decode import MAX_TAIL_SECONDS, FrameBatch, check_size
from timeviper_platform.data.lookahead import LookAhead
from timeviper_platform.data.media import (
    MediaLimits,
    clock_origin,
    open_container,
    reading,
    source_name,
    video_stream,
)

logger = logging.getLogger(__name__)

SEEK_AHEAD_SECONDS = 20
"""A jump further ahead than this is a seek; a shorter one decodes on, which costs less than a way from a keyframe."""

STEP_BACK_SECONDS = 2
"""Containers seek by DTS or by byte and may land past the wanted PTS: step back, twice as far each time."""

MAX_REORDER = 16
"""Frames that H.264 and HEVC decoders may hold back; a frame that this many later ones overtook will not come."""


class _NoTimestamps(Exception):
    """Packets without PTS, or with a DTS that lied."""


@dataclass(slots=True)
class _Walk:
    """Where a reader stands between two keyframe jumps."""

    packets: Iterator[Any]
    every_frame: Iterator[tuple[int, Any]]
    """used by the plain way alone"""
    end_tick: int
    """when the last frame seen so far leaves the screen"""
    ahead: LookAhead = field(default_factory=LookAhead)
    pending: deque[Any] = field(default_factory=deque)
    """packets read but not sent, in decode order"""
    recent: dict[int, Any] = field(default_factory=dict)
    """decoded frames by PTS that may be wanted (again)"""
    emitted: deque[int] = field(default_factory=lambda: deque(maxlen=4 * MAX_REORDER))
    position: int | None = None
    """the last tick that was asked for"""
    at_end: bool = False
    is_flushed: bool = False
    shown: tuple[int, Any] | None = None
    next_frame: tuple[int, Any] | None = None
    """both used by the plain way alone"""


class PyAVReader:
    """A VideoReader of one video, on one thread: parallel work is the business of the workers around it.

    Raises:
        DecodeError: when the video cannot be opened.
    """

    def __init__(self, source: str | bytes, image_size: int, *, limits: MediaLimits | None = None) -> None:
        self._source = source
        self._name = source_name(source)
        self._image_size = image_size
        self._limits = limits or MediaLimits()
        self._reformatter = VideoReformatter()
        with reading("decode_video", source, self._limits):
            self._open()
        # AVI has no PTS: with B frames, what FFmpeg states is the order of decoding
        self._has_timestamps = self._container.format.name != "avi" or not self._context.has_b_frames

    def sample(self, times: Sequence[Fraction]) -> FrameBatch:
        """See `VideoReader.sample`."""
        ticks = [self._origin + int(t // self._time_base) for t in times]  # PTS <= t, in whole ticks
        if ticks != sorted(ticks):
            raise ValueError("sampling times must ascend")
        with reading("decode_video", self._source, self._limits):
            found = self._find(ticks) if ticks else {}
        kept = [(t, *found[tick]) for t, tick in zip(times, ticks, strict=True) if tick in found]
        size = self._image_size
        return FrameBatch(
            np.stack([pixels for _, _, pixels in kept]) if kept else np.empty((0, size, size, 3), np.uint8),
            np.array([float((pts - self._origin) * self._time_base) for _, pts, _ in kept]),
            np.array([float(t) for t, _, _ in kept]),
            sum(tick not in found and not self._is_tail(tick) for tick in ticks),
        )

    def close(self) -> None:
        """See `VideoReader.close`."""
        self._container.close()

    def _find(self, ticks: Sequence[int]) -> dict[int, tuple[int, np.ndarray]]:
        """For every tick whose frame decodes: the frame's PTS and pixels."""
        if self._has_timestamps:
            try:
                return {k: v for run in self._runs(ticks) for k, v in self._find_selectively(run).items()}
            except _NoTimestamps as error:
                logger.info("%s: %s; decoding every frame of it", self._name, error)
                self._has_timestamps = False
                self._reopen()
        return self._find_plainly(ticks)

    def _runs(self, ticks: Sequence[int]) -> Iterator[list[int]]:
        """`ticks` cut wherever the gap is worth a seek."""
        run: list[int] = []
        for tick in ticks:
            if run and (tick - run[-1]) * self._time_base > SEEK_AHEAD_SECONDS:
                yield run
                run = []
            run.append(tick)
        yield run

    def _is_tail(self, tick: int) -> bool:
        """True for a time after the last frame that the container still counts as its own."""
        return (
            self._walk.at_end and self._walk.end_tick <= tick < self._walk.end_tick + MAX_TAIL_SECONDS / self._time_base
        )

    def _scale(self, frame: Any) -> np.ndarray:
        check_size(frame.width, frame.height, self._limits, "decode_video", self._name)
        size = self._image_size
        # one thread: slices would make pixels depend on the number of cores, and cost twice as much for small pictures
        scaled = self._reformatter.reformat(frame, size, size, "rgb24", interpolation=Interpolation.BICUBIC, threads=1)
        return np.asarray(scaled.to_ndarray())

    # -- selective: what is wanted, and what that refers to -------------------------------------------------------

    def _find_selectively(self, ticks: Sequence[int]) -> dict[int, tuple[int, np.ndarray]]:
        if not self._is_near(ticks[0]):
            self._seek(ticks[0])
        self._walk.ahead.want(ticks)
        pixels: dict[int, np.ndarray] = {}
        self._collect(pixels)
        while not (self._walk.is_flushed or self._is_complete(pixels)):
            self._step()
            self._collect(pixels)
        self._walk.position = ticks[-1]
        return {tick: (pts, pixels[pts]) for tick, pts in self._walk.ahead.pts_of.items() if pts in pixels}

    def _is_complete(self, pixels: dict[int, np.ndarray]) -> bool:
        """True when every wanted frame is there, or was overtaken by so many later ones that it will not come."""
        return self._walk.ahead.is_resolved and all(
            sum(later > pts for later in self._walk.emitted) > MAX_REORDER
            for pts in self._walk.ahead.wanted - pixels.keys()
        )

    def _collect(self, pixels: dict[int, np.ndarray]) -> None:
        """Scales decoded frames that are wanted; keeps those that this call or the next may still want."""
        for pts in self._walk.recent.keys() & self._walk.ahead.wanted - pixels.keys():
            pixels[pts] = self._scale(self._walk.recent[pts])
        self._walk.recent = {pts: frame for pts, frame in self._walk.recent.items() if self._walk.ahead.may_want(pts)}

    def _step(self) -> None:
        """Sends the oldest packet to the decoder if its use is known; else reads one more."""
        if self._walk.pending:
            packet = self._walk.pending[0]
            needed = packet.pts is not None and not packet.is_discard and self._walk.ahead.needed(packet.pts)
            if needed is not None:
                self._walk.pending.popleft()
                self._decode(packet, needed)
                return
        if not self._walk.at_end:
            self._read()
        else:
            self._decode(None, True)
            self._walk.is_flushed = True

    def _read(self) -> None:
        packet = self._next_packet()
        if packet is None:
            self._walk.at_end = True
            self._walk.ahead.finish(self._walk.end_tick)
            return
        if packet.pts is None:
            raise _NoTimestamps("a packet has no PTS")
        self._walk.pending.append(packet)
        if packet.is_discard:  # before an edit list's start: referred to, but never shown
            return
        self._note_end(packet.pts, packet.duration)
        try:
            self._walk.ahead.add(packet.pts, packet.dts)
        except ValueError as error:
            raise _NoTimestamps(str(error)) from error

    def _decode(self, packet: Any, needed: bool) -> None:
        self._context.skip_frame = "DEFAULT" if needed else "NONREF"
        for frame in self._send(packet):
            if frame.pts is None:
                raise _NoTimestamps("a frame has no PTS")
            self._walk.emitted.append(frame.pts)
            if not frame.is_corrupt:
                self._walk.recent[frame.pts] = frame

    def _is_near(self, tick: int) -> bool:
        """True when walking on leads to `tick`, with no seek."""
        start = self._origin if self._walk.position is None else self._walk.position
        is_ahead = self._walk.position is None or tick >= self._walk.position
        return is_ahead and (tick - start) * self._time_base <= SEEK_AHEAD_SECONDS

    def _seek(self, tick: int) -> None:
        """Goes to a keyframe whose PTS is at or before `tick`, or to the start."""
        step = int(STEP_BACK_SECONDS / self._time_base)
        target = tick
        while target > self._origin:
            try:
                self._container.seek(target, stream=self._stream)
            except av.error.FFmpegError as error:
                logger.info("%s: cannot seek (%s); decoding from its start", self._name, error)
                break
            self._restart()
            self._read()
            # the frame of `tick` has a PTS of at least the keyframe's: nothing of it lies before the keyframe
            if self._walk.pending and self._walk.pending[0].is_keyframe and self._walk.pending[0].pts <= tick:
                return
            target -= step
            step *= 2
        self._reopen()

    # -- plain: every frame, for streams without timestamps --------------------------------------------------------

    def _find_plainly(self, ticks: Sequence[int]) -> dict[int, tuple[int, np.ndarray]]:
        if self._walk.position is not None and ticks[0] < self._walk.position:
            self._reopen()
        self._walk.position = ticks[-1]
        todo = deque(dict.fromkeys(ticks))
        found: dict[int, tuple[int, np.ndarray]] = {}
        while todo:
            if self._walk.next_frame is None and not self._walk.is_flushed:
                self._walk.next_frame = next(self._walk.every_frame, None)
                self._walk.is_flushed = self._walk.next_frame is None
            upcoming = self._walk.next_frame
            while todo and (upcoming is None or upcoming[0] > todo[0]):
                tick = todo.popleft()
                shown = self._walk.shown or upcoming
                if shown is not None and (upcoming is not None or tick < self._walk.end_tick):
                    found[tick] = (shown[0], self._scale(shown[1]))
            if upcoming is not None and todo:
                self._walk.shown, self._walk.next_frame = upcoming, None
        return found

    def _frames(self) -> Iterator[tuple[int, Any]]:
        """Every frame with the time at which it is shown.

        Decoders emit in the order of display whatever the packets say, so the n-th frame has the n-th smallest stamp.
        """
        self._context.skip_frame = "DEFAULT"
        stamps: list[int] = []
        while not self._walk.at_end:
            packet = self._next_packet()
            self._walk.at_end = packet is None
            stamp = None if packet is None else packet.dts if packet.pts is None else packet.pts
            if stamp is not None:
                heapq.heappush(stamps, stamp)
                self._note_end(stamp, packet.duration)
            for frame in self._send(packet):
                if stamps:
                    yield heapq.heappop(stamps), frame

    # -- the file ------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        self._container = open_container(self._source, self._limits)
        self._stream = video_stream(self._container, "decode_video", self._name)
        self._time_base = Fraction(self._stream.time_base)
        self._origin = clock_origin(self._container, self._stream)
        rate = self._stream.average_rate
        self._frame_ticks = max(1, round(1 / (rate * self._time_base))) if rate else 1
        self._context = self._stream.codec_context
        self._context.thread_type = "NONE"
        self._restart()

    def _reopen(self) -> None:
        self._container.close()
        self._open()

    def _restart(self) -> None:
        """Begins a walk where the demuxer stands."""
        self._walk = _Walk(self._container.demux(self._stream), self._frames(), self._origin)

    def _next_packet(self) -> Any:
        """The next packet with data, or None at the end."""
        try:
            packet = next(self._walk.packets, None)
        except av.error.FFmpegError as error:
            logger.info("%s: reading ends early: %s", self._name, error)
            return None
        return None if packet is None or packet.size == 0 else packet

    def _note_end(self, pts: int, duration: int | None) -> None:
        self._walk.end_tick = max(self._walk.end_tick, pts + (duration or self._frame_ticks))

    def _send(self, packet: Any) -> list[Any]:
        """What the decoder gives for a packet (None = give all you hold); damaged packets give nothing."""
        try:
            return list(self._context.decode(packet))
        except av.error.FFmpegError as error:
            logger.debug("%s: a packet does not decode: %s", self._name, error)
            return []
