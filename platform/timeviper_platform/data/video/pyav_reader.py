"""Samples exactly with PyAV, and decodes only wanted frames and their references.

Packets are held until `LookAhead` finds a wanted one, and dropped if a keyframe comes first. `skip_frame = NONREF`
leaves out unwanted frames that no other refers to (most B-frames), until damage is found: decoders fill it from the
frames before. Streams without usable PTS are decoded in full.

    decode order   P8   b7   I0   P4   B2   b1   b3   P8 ...    t = 1 wants b1: its references I0, P4 and B2
    sent with       -    -   skip skip skip ALL  skip skip      are decoded, b3 is not
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

from timeviper_platform.data.media.clock import StreamClock, VideoPackets
from timeviper_platform.data.media.container import (
    MediaFile,
    MediaLimits,
    check_size,
    decode_errors,
    is_local_file,
    source_name,
    video_stream,
)
from timeviper_platform.data.media.stream_end import is_cut_short
from timeviper_platform.data.video.frames import MAX_TAIL_SECONDS, FrameBatch, Resample
from timeviper_platform.data.video.keyframe_index import KeyframeIndex
from timeviper_platform.data.video.orientation import orientation_of, turn_upright
from timeviper_platform.data.video.packet_lookahead import LookAhead

logger = logging.getLogger(__name__)

MAX_HELD_PACKETS = 400
MAX_HELD_BYTES = 32 << 20

STEP_BACK_SECONDS = 2
"""First step back when a seek lands past the wanted PTS. Doubles each time."""

MAX_REORDER = 16
"""Reordering limit of H.264 and HEVC: a frame overtaken by more is lost."""


class _NoTimestamps(Exception):
    """Packets without PTS, or with a wrong DTS."""


class _UncleanKeyframe(Exception):
    """A keyframe whose picture needs earlier ones, as in streams with intra refresh."""


class _SkippedDamage(Exception):
    """Damage while frames are skipped, which decoders would fill from other frames than without skipping."""


@dataclass(slots=True)
class _Walk:
    """State between two seeks. `every_frame`, `shown` and `next_frame` serve full decoding."""

    packets: VideoPackets
    every_frame: Iterator[tuple[int, Any]]
    ahead: LookAhead
    is_from_start: bool
    is_entry: bool = False
    """True when decoding starts inside the stream, at the first pending packet."""
    entry: int | None = None
    """PTS of that packet, until its frame is decoded."""
    read_until: int | None = None
    reorder: int = 0
    """PTS - DTS of the last keyframe."""
    pending: deque[Any] = field(default_factory=deque)
    held: set[int] = field(default_factory=set)
    """PTS of pending packets."""
    held_bytes: int = 0
    is_cut: bool = False
    """True when packets before the pending ones were dropped."""
    has_keyframe: bool = False
    """True when the decoder has received one."""
    is_damaged: bool = False
    """True after damage, until the frame of the next keyframe."""
    clean_from: int | None = None
    """PTS of that keyframe, once it is sent."""
    considered: int | None = None
    """Last tick for which a seek was considered."""
    recent: dict[int, Any] = field(default_factory=dict)
    """Decoded frames by PTS that may be wanted again."""
    emitted: deque[int] = field(default_factory=lambda: deque(maxlen=4 * MAX_REORDER))
    position: int | None = None
    at_end: bool = False
    is_flushed: bool = False
    shown: tuple[int, Any] | None = None
    next_frame: tuple[int, Any] | None = None


INTERPOLATIONS = {"bilinear": Interpolation.BILINEAR, "bicubic": Interpolation.BICUBIC}


def scale_frame(
    frame: Any,
    image_size: int,
    reformatter: VideoReformatter,
    *,
    limits: MediaLimits,
    name: str,
    resample: Resample = "bicubic",
) -> np.ndarray:
    """Returns (image_size, image_size, 3) uint8 RGB, upright."""
    check_size(frame.width, frame.height, limits, "decode_video", name)
    # one thread: slices would make pixels depend on the number of cores
    scaled = reformatter.reformat(
        frame, image_size, image_size, "rgb24", interpolation=INTERPOLATIONS[resample], threads=1
    )
    return turn_upright(np.asarray(scaled.to_ndarray()), orientation_of(frame))


class PyAVReader:
    """VideoReader on one thread.

    A transport stream is read from its start, unless `joined_parts` is 1: after a seek, its part would be unknown.
    """

    def __init__(
        self,
        source: str | bytes,
        image_size: int,
        *,
        limits: MediaLimits | None = None,
        joined_parts: int | None = None,
        resample: Resample = "bicubic",
        file: MediaFile | None = None,
    ) -> None:
        self._source = source
        self._name = source_name(source)
        self._image_size = image_size
        self._limits = limits or MediaLimits()
        self._reformatter = VideoReformatter()
        self._resample = resample
        self._pixels: dict[int, np.ndarray] = {}  # of the wanted frames, by PTS
        self._joined_parts = joined_parts
        self._has_clean_keyframes = True
        self._skips_frames = True
        self._first: tuple[int, np.ndarray] | None = None
        """The first frame that decodes, shown before its PTS."""
        self._starts_damaged = False
        self._damaged: set[int] = set()  # PTS of frames after damage
        with decode_errors("decode_video", source, self._limits):
            self._file = file or MediaFile(source, self._limits)
            self._open()
        self._has_timestamps = self._clock.has_pts

    def sample(self, times: Sequence[Fraction]) -> FrameBatch:
        ticks = [self._clock.tick(t) for t in times]  # PTS <= t, in whole ticks
        if ticks != sorted(ticks):
            raise ValueError("sampling times must ascend")
        with decode_errors("decode_video", self._source, self._limits):
            found = self._find(ticks) if ticks else {}
        kept = [(t, *found[tick]) for t, tick in zip(times, ticks, strict=True) if tick in found]
        size = self._image_size
        return FrameBatch(
            np.stack([pixels for _, _, pixels in kept]) if kept else np.empty((0, size, size, 3), np.uint8),
            np.array([float(self._clock.seconds(pts)) for _, pts, _ in kept]),
            np.array([float(t) for t, _, _ in kept]),
            sum(tick not in found and not self._is_past_end(tick) for tick in ticks),
            sum(pts in self._damaged for _, pts, _ in kept),
        )

    def close(self) -> None:
        self._container.close()

    def _find(self, ticks: Sequence[int]) -> dict[int, tuple[int, np.ndarray]]:
        while self._has_timestamps:
            try:
                return self._find_selectively(ticks)
            except _UncleanKeyframe:
                logger.info("%s: keyframes need earlier frames; decoding without seeks", self._name)
                self._has_clean_keyframes = False
                self._reopen()
            except _SkippedDamage:
                logger.info("%s: damaged; decoding again without skipping frames", self._name)
                self._skips_frames = False
                self._walk.ahead = LookAhead()
                self._seek(ticks[0], ticks[0])
            except _NoTimestamps as error:
                logger.info("%s: %s; decoding every frame", self._name, error)
                self._has_timestamps = False
                self._reopen()
        return self._find_fully(ticks)

    def _is_past_end(self, tick: int) -> bool:
        """Returns True after the end. In a cut file, only up to MAX_TAIL_SECONDS after it: later frames are missing."""
        end = self._walk.packets.end_tick
        if not self._walk.at_end or tick < end:
            return False
        return tick < end + self._clock.ticks_in(MAX_TAIL_SECONDS) or not self._is_cut_short

    def _scale(self, frame: Any) -> np.ndarray:
        return scale_frame(
            frame, self._image_size, self._reformatter, limits=self._limits, name=self._name, resample=self._resample
        )

    # -- selective decoding ------------------------------------------------------------------------------------------

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
        pts_of = self._walk.ahead.pts_of
        found = {tick: (pts, self._pixels[pts]) for tick, pts in pts_of.items() if pts in self._pixels}
        if len(found) < len(pts_of) and (first := self._first_frame()) is not None:
            found |= {tick: first for tick, pts in pts_of.items() if pts < first[0]}
        return found

    def _first_frame(self) -> tuple[int, np.ndarray] | None:
        """Returns the first frame that decodes; None when it is damage that hides the earlier ones."""
        while self._first is None and self._walk.is_from_start and not self._walk.is_flushed:
            self._step()
            self._collect()
        return None if self._starts_damaged else self._first

    def _is_complete(self) -> bool:
        return self._walk.ahead.is_resolved and all(
            sum(later > pts for later in self._walk.emitted) > MAX_REORDER
            for pts in self._walk.ahead.wanted - self._pixels.keys()
        )

    def _collect(self) -> None:
        for pts in self._walk.recent.keys() & self._walk.ahead.wanted - self._pixels.keys():
            self._pixels[pts] = self._scale(self._walk.recent[pts])
        self._walk.recent = {pts: frame for pts, frame in self._walk.recent.items() if self._walk.ahead.may_want(pts)}

    def _step(self) -> None:
        walk = self._walk
        if walk.pending and self._is_due():
            packet = walk.pending[0]
            needed = packet.pts is not None and not packet.is_discard and walk.ahead.needed(packet.pts)
            if needed is not None:
                if walk.is_cut:
                    self._flush_after_cut()
                if walk.is_entry:
                    walk.is_entry, walk.entry = False, None if packet.is_discard else packet.pts
                walk.pending.popleft()
                if not packet.is_discard:  # an edit list may show the same time later
                    walk.held.discard(packet.pts)
                walk.held_bytes -= packet.size
                self._decode(packet, needed)
                return
        if walk.at_end:
            self._decode(None, True)
            walk.is_flushed = True
        elif not self._jump():
            self._take(self._walk.packets.next())

    def _is_due(self) -> bool:
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
        """Adds a packet. A keyframe at or before the next tick drops held ones."""
        walk = self._walk
        if packet is None:
            walk.at_end = True
            walk.ahead.finish(walk.packets.end_tick)
            return
        if packet.pts is None:
            raise _NoTimestamps("a packet has no PTS")
        walk.read_until = packet.pts if packet.dts is None else packet.dts
        if packet.size == 0:
            return
        if packet.is_keyframe:
            walk.reorder = packet.pts - walk.read_until
            tick = walk.ahead.next_open
            if walk.pending and tick is not None and packet.pts <= tick and self._may_skip():
                walk.pending.clear()
                walk.held.clear()
                walk.held_bytes = 0
                walk.is_cut, walk.is_entry, walk.is_from_start = True, True, False
        walk.pending.append(packet)
        walk.held_bytes += packet.size
        if packet.is_discard:  # before an edit list's start: a reference that is never shown
            return
        walk.held.add(packet.pts)
        try:
            walk.ahead.add(packet.pts, packet.dts)
        except ValueError as error:
            raise _NoTimestamps(str(error)) from error

    def _may_skip(self) -> bool:
        """Returns False while a held packet, or the first frame that decodes, may be wanted."""
        seeks_first = self._first is None and self._walk.is_from_start and bool(self._walk.ahead.wanted)
        return self._has_clean_keyframes and not self._holds_wanted() and not seeks_first

    def _flush_after_cut(self) -> None:
        self._walk.is_cut = False
        self._decode(None, True)
        self._collect()
        self._context.flush_buffers()

    def _decode(self, packet: Any, needed: bool) -> None:
        walk = self._walk
        self._context.skip_frame = "NONREF" if self._skips_frames and not needed else "DEFAULT"
        for frame in self._send(packet):
            if frame.pts is None:
                raise _NoTimestamps("a frame has no PTS")
            self._check_entry(frame.pts)
            walk.emitted.append(frame.pts)
            if frame.is_corrupt:
                self._note_damage()
                continue
            walk.recent[frame.pts] = frame
            self._mark(frame.pts)
            if self._first is None and walk.is_from_start:
                self._first = frame.pts, self._scale(frame)
        if packet is None:
            self._check_entry(None)

    def _check_entry(self, pts: int | None) -> None:
        """Raises _UncleanKeyframe when a later frame, or the end (None), comes before the keyframe's own."""
        entry = self._walk.entry
        if entry is not None and (pts is None or pts >= entry):
            self._walk.entry = None
            if pts != entry:
                raise _UncleanKeyframe

    def _note_damage(self) -> None:
        walk = self._walk
        walk.entry = None  # not the keyframe's fault
        if walk.has_keyframe:  # else it begins inside a group of pictures
            walk.is_damaged, walk.clean_from = True, None
            self._starts_damaged |= self._first is None and walk.is_from_start
            if self._skips_frames and self._has_timestamps:
                raise _SkippedDamage

    def _mark(self, pts: int) -> None:
        walk = self._walk
        if walk.is_damaged and walk.clean_from is not None and pts >= walk.clean_from:
            walk.is_damaged = False
        if walk.is_damaged:
            self._damaged.add(pts)

    def _jump(self) -> bool:
        tick = self._walk.ahead.next_open
        if tick is None or tick == self._walk.considered or not (self._may_seek and self._may_skip()):
            return False
        self._walk.considered = tick
        position = self._clock.tick(Fraction(0)) if self._walk.read_until is None else self._walk.read_until
        target = self._index.seek_target(position, tick, self._walk.reorder)
        if target is None:
            return False
        self._flush_after_cut()
        self._seek(target, tick)
        self._walk.considered = tick
        return True

    def _seek(self, target: int, tick: int) -> None:
        """Continues from a keyframe at or before `tick`."""
        step = self._clock.ticks_in(STEP_BACK_SECONDS)
        ahead = self._walk.ahead
        while self._may_seek and self._has_clean_keyframes and target > self._clock.tick(Fraction(0)):
            try:
                self._container.seek(target, stream=self._stream)
            except av.error.FFmpegError as error:
                logger.info("%s: cannot seek (%s); decoding from its start", self._name, error)
                break
            self._restart(ahead, is_from_start=False)
            packet = self._walk.packets.next()
            if packet is not None and packet.is_keyframe and packet.pts is not None and packet.pts <= tick:
                self._take(packet)
                self._walk.is_entry = True
                return
            target -= step
            step *= 2
        self._container.close()
        self._open(ahead)

    # -- full decoding, for streams without timestamps ---------------------------------------------------------------

    def _find_fully(self, ticks: Sequence[int]) -> dict[int, tuple[int, np.ndarray]]:
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
                has_ended = upcoming is None and tick >= self._walk.packets.end_tick
                if shown is not None and not has_ended and not shown[1].is_corrupt:
                    found[tick] = (shown[0], self._scale(shown[1]))
            if upcoming is not None and todo:
                self._walk.shown, self._walk.next_frame = upcoming, None
        return found

    def _frames(self) -> Iterator[tuple[int, Any]]:
        """Yields frames in display order; without PTS, the n-th has the n-th smallest timestamp."""
        self._context.skip_frame = "DEFAULT"
        stamps: list[int] = []
        last = None
        while not self._walk.at_end:
            packet = self._walk.packets.next()
            self._walk.at_end = packet is None
            if packet is not None and packet.size == 0:
                continue
            stamp = None if packet is None else packet.dts if packet.pts is None else packet.pts
            if stamp is not None and not packet.is_discard:
                heapq.heappush(stamps, stamp)
            for frame in self._send(packet):
                pts = frame.pts if self._clock.has_pts else None
                if pts is None and stamps:
                    pts = heapq.heappop(stamps)
                if pts is not None:
                    if frame.is_corrupt:
                        self._note_damage()
                    self._mark(pts)
                    if last is None or pts >= last:  # players drop a frame that comes too late
                        last = pts
                        yield pts, frame

    # -- container and decoder ---------------------------------------------------------------------------------------

    def _open(self, ahead: LookAhead | None = None) -> None:
        self._container = self._file.open_container()
        self._stream = video_stream(self._container, "decode_video", self._name)
        self._clock = StreamClock(self._container, self._stream)
        self._may_seek = not self._clock.may_jump or self._joined_parts == 1
        self._context = self._stream.codec_context
        self._context.thread_type = "NONE"
        is_local = isinstance(self._source, bytes) or is_local_file(self._source)
        self._index = KeyframeIndex(self._stream, self._clock.time_base, is_local=is_local)
        self._restart(ahead or LookAhead())

    def _reopen(self) -> None:
        self._container.close()
        self._open()

    def _restart(self, ahead: LookAhead, *, is_from_start: bool = True) -> None:
        ahead.restart()
        packets = VideoPackets(self._container, self._stream, self._clock, name=self._name)
        self._walk = _Walk(packets, self._frames(), ahead, is_from_start)

    @property
    def _is_cut_short(self) -> bool:
        return is_cut_short(self._file.head, self._container, self._stream)

    def _send(self, packet: Any) -> list[Any]:
        """Decodes a packet; None drains the decoder."""
        if packet is not None and packet.is_keyframe:
            self._walk.has_keyframe = True
            self._walk.clean_from = packet.dts if packet.pts is None else packet.pts
        if packet is not None and packet.is_corrupt and not self._clock.may_jump:
            self._note_damage()  # cut; in transport streams also whole packets before a join
        try:
            return list(self._context.decode(packet))
        except av.error.FFmpegError as error:
            logger.debug("%s: a packet does not decode: %s", self._name, error)
            self._note_damage()
            return []
