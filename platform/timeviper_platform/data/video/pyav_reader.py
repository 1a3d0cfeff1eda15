"""Sampling with PyAV: exact, and without decoding what nothing wanted refers to.

Walks packets in decode order; lookahead.py says which of them hold wanted frames. Those before are held back until a
wanted one is seen: when a keyframe comes between, none of them is decoded at all. The rest is sent with
`skip_frame = NONREF`: the decoder drops them when no other frame refers to them (most B frames), which changes no
pixel of what remains. Skipping non-reference frames everywhere, as players do, would return neighbours of the wanted
frames instead. keyframe_index.py says where a seek is cheaper than reading on.
Streams whose packets state no PTS, or none of use (H.264 in AVI), are decoded frame by frame.

    decode order   P8   b7   I0   P4   B2   b1   b3   P8 ...    t = 1 wants b1: I0, P4 and B2 are references and
    sent with       -    -   skip skip skip ALL  skip skip      decoded anyway, b1 because it is wanted, b3 is dropped
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

from timeviper_platform.data.media.container import (
    MediaLimits,
    clock_origin,
    is_local_file,
    open_container,
    reading,
    source_name,
    video_stream,
)
from timeviper_platform.data.video.frames import MAX_TAIL_SECONDS, FrameBatch, check_size
from timeviper_platform.data.video.keyframe_index import KeyframeIndex
from timeviper_platform.data.video.orientation import orientation_of, turn_upright
from timeviper_platform.data.video.packet_lookahead import LookAhead

logger = logging.getLogger(__name__)

MAX_HELD_PACKETS = 400
MAX_HELD_BYTES = 32 << 20
"""Of packets held back until a wanted one is seen."""

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
    ahead: LookAhead
    read_until: int | None = None
    """DTS of the last packet read"""
    reorder: int = 0
    """by how much PTS run ahead of DTS at the last keyframe"""
    pending: deque[Any] = field(default_factory=deque)
    """packets read but not sent, in decode order"""
    held: set[int] = field(default_factory=set)
    """their PTS"""
    held_bytes: int = 0
    is_cut: bool = False
    """True when packets before the first pending one are left out, so that the decoder must begin anew"""
    asked: int | None = None
    """the last tick for which a seek was considered"""
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


def scale_frame(
    frame: Any, image_size: int, reformatter: VideoReformatter, *, limits: MediaLimits, name: str
) -> np.ndarray:
    """A decoded frame as (image_size, image_size, 3) uint8 RGB, upright: turning a square changes no other pixel.

    Raises:
        DecodeError: when it is larger than `limits`.
    """
    check_size(frame.width, frame.height, limits, "decode_video", name)
    # one thread: slices would make pixels depend on the number of cores, and cost twice as much for small pictures
    scaled = reformatter.reformat(
        frame, image_size, image_size, "rgb24", interpolation=Interpolation.BICUBIC, threads=1
    )
    return turn_upright(np.asarray(scaled.to_ndarray()), orientation_of(frame))


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
        self._pixels: dict[int, np.ndarray] = {}  # of the frames wanted now, by PTS
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
                return self._find_selectively(ticks)
            except _NoTimestamps as error:
                logger.info("%s: %s; decoding every frame of it", self._name, error)
                self._has_timestamps = False
                self._reopen()
        return self._find_plainly(ticks)

    def _is_tail(self, tick: int) -> bool:
        """True for a time after the last frame that the container still counts as its own."""
        return (
            self._walk.at_end and self._walk.end_tick <= tick < self._walk.end_tick + MAX_TAIL_SECONDS / self._time_base
        )

    def _scale(self, frame: Any) -> np.ndarray:
        return scale_frame(frame, self._image_size, self._reformatter, limits=self._limits, name=self._name)

    # -- selective: what is wanted, and what that refers to -------------------------------------------------------

    def _find_selectively(self, ticks: Sequence[int]) -> dict[int, tuple[int, np.ndarray]]:
        if self._walk.position is not None and ticks[0] < self._walk.position:
            self._walk.ahead = LookAhead()
            self._seek(ticks[0], ticks[0])
        self._walk.ahead.want(ticks)
        self._pixels = {}
        self._collect()
        while not (self._walk.is_flushed or self._is_complete()):
            self._step()
            self._collect()
        self._walk.position = ticks[-1]
        return {tick: (pts, self._pixels[pts]) for tick, pts in self._walk.ahead.pts_of.items() if pts in self._pixels}

    def _is_complete(self) -> bool:
        """True when every wanted frame is there, or was overtaken by so many later ones that it will not come."""
        return self._walk.ahead.is_resolved and all(
            sum(later > pts for later in self._walk.emitted) > MAX_REORDER
            for pts in self._walk.ahead.wanted - self._pixels.keys()
        )

    def _collect(self) -> None:
        """Scales decoded frames that are wanted; keeps those that this call or the next may still want."""
        for pts in self._walk.recent.keys() & self._walk.ahead.wanted - self._pixels.keys():
            self._pixels[pts] = self._scale(self._walk.recent[pts])
        self._walk.recent = {pts: frame for pts, frame in self._walk.recent.items() if self._walk.ahead.may_want(pts)}

    def _step(self) -> None:
        """Sends the oldest packet to the decoder if it must be; else seeks or reads one more."""
        walk = self._walk
        if walk.pending and self._is_due():
            packet = walk.pending[0]
            needed = packet.pts is not None and not packet.is_discard and walk.ahead.needed(packet.pts)
            if needed is not None:
                self._begin_anew_after_cut()
                walk.pending.popleft()
                walk.held.discard(packet.pts)
                walk.held_bytes -= packet.size
                self._decode(packet, needed)
                return
        if walk.at_end:
            self._decode(None, True)
            walk.is_flushed = True
        elif not self._jump():
            self._take(self._next_packet())

    def _is_due(self) -> bool:
        """True when packets need not be held back any more: a wanted one is among them, or too many are."""
        walk = self._walk
        return (
            walk.ahead.is_resolved
            or walk.at_end
            or self._holds_wanted()
            or len(walk.pending) > MAX_HELD_PACKETS
            or walk.held_bytes > MAX_HELD_BYTES
        )

    def _holds_wanted(self) -> bool:
        return not self._walk.held.isdisjoint(self._walk.ahead.wanted)

    def _take(self, packet: Any) -> None:
        """Notes what was read; a keyframe that wanted frames lie behind makes the packets held before it useless."""
        walk = self._walk
        if packet is None:
            walk.at_end = True
            walk.ahead.finish(walk.end_tick)
            return
        if packet.pts is None:
            raise _NoTimestamps("a packet has no PTS")
        walk.read_until = packet.pts if packet.dts is None else packet.dts
        if packet.is_keyframe:
            walk.reorder = packet.pts - walk.read_until
            tick = walk.ahead.next_open
            if walk.pending and tick is not None and packet.pts <= tick and not self._holds_wanted():
                walk.pending.clear()
                walk.held.clear()
                walk.held_bytes = 0
                walk.is_cut = True
        walk.pending.append(packet)
        walk.held_bytes += packet.size
        if packet.is_discard:  # before an edit list's start: referred to, but never shown
            return
        walk.held.add(packet.pts)
        self._note_end(packet.pts, packet.duration)
        try:
            walk.ahead.add(packet.pts, packet.dts)
        except ValueError as error:
            raise _NoTimestamps(str(error)) from error

    def _begin_anew_after_cut(self) -> None:
        """Has the decoder give all it holds, and forget it: what comes next follows nothing that it has seen."""
        if self._walk.is_cut:
            self._walk.is_cut = False
            self._decode(None, True)
            self._collect()
            self._context.flush_buffers()

    def _decode(self, packet: Any, needed: bool) -> None:
        self._context.skip_frame = "DEFAULT" if needed else "NONREF"
        for frame in self._send(packet):
            if frame.pts is None:
                raise _NoTimestamps("a frame has no PTS")
            self._walk.emitted.append(frame.pts)
            if not frame.is_corrupt:
                self._walk.recent[frame.pts] = frame

    def _jump(self) -> bool:
        """Seeks to the next wanted frame where that is cheaper than reading on; considered once a frame."""
        tick = self._walk.ahead.next_open
        if tick is None or tick == self._walk.asked or self._holds_wanted():
            return False
        self._walk.asked = tick
        position = self._origin if self._walk.read_until is None else self._walk.read_until
        target = self._index.seek_target(position, tick, self._walk.reorder)
        if target is None:
            return False
        self._walk.is_cut = True
        self._begin_anew_after_cut()
        self._seek(target, tick)
        self._walk.asked = tick
        return True

    def _seek(self, target: int, tick: int) -> None:
        """Goes on from a keyframe whose PTS is at or before `tick`: that at `target`, an earlier one, or the start."""
        step = int(STEP_BACK_SECONDS / self._time_base)
        ahead = self._walk.ahead
        while target > self._origin:
            try:
                self._container.seek(target, stream=self._stream)
            except av.error.FFmpegError as error:
                logger.info("%s: cannot seek (%s); decoding from its start", self._name, error)
                break
            self._restart(ahead)
            packet = self._next_packet()
            # the frame of `tick` has a PTS of at least the keyframe's: nothing of it lies before the keyframe
            if packet is not None and packet.is_keyframe and packet.pts is not None and packet.pts <= tick:
                self._take(packet)
                return
            target -= step
            step *= 2
        self._container.close()
        self._open(ahead)

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

    def _open(self, ahead: LookAhead | None = None) -> None:
        self._container = open_container(self._source, self._limits)
        self._stream = video_stream(self._container, "decode_video", self._name)
        self._time_base = Fraction(self._stream.time_base)
        self._origin = clock_origin(self._container, self._stream)
        rate = self._stream.average_rate
        self._frame_ticks = max(1, round(1 / (rate * self._time_base))) if rate else 1
        self._context = self._stream.codec_context
        self._context.thread_type = "NONE"
        is_local = isinstance(self._source, bytes) or is_local_file(self._source)
        self._index = KeyframeIndex(self._stream, self._time_base, is_local=is_local)
        self._restart(ahead or LookAhead())

    def _reopen(self) -> None:
        self._container.close()
        self._open()

    def _restart(self, ahead: LookAhead) -> None:
        """Begins a walk where the demuxer stands; `ahead` keeps its ticks."""
        ahead.restart()
        self._walk = _Walk(self._container.demux(self._stream), self._frames(), self._origin, ahead)

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
