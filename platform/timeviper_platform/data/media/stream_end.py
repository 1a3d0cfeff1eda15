"""Reads the last packets of a video, and recognizes files that were cut."""

from __future__ import annotations

import logging
import struct
from fractions import Fraction
from typing import Any

import av

from timeviper_platform.data.media.clock import StreamClock, VideoPackets

logger = logging.getLogger(__name__)

TAIL_PACKETS = 64
"""Packets read at the end of an index of all packets: H.264 and HEVC show a frame at most 16 packets late."""

STEP_BACK_SECONDS = 2
"""First step back from the end by the header. Doubles each time."""

_EBML_HEADER, _SEGMENT = b"\x1aE\xdf\xa3", b"\x18\x53\x80\x67"


def read_to_end(container: Any, stream: Any, clock: StreamClock, *, name: str) -> VideoPackets:
    """Returns the stream's packets, read to the last.

    Starts near the end, except where clocks may jump and where no header has a duration.
    """
    if clock.may_jump or not clock.has_stamps or container.duration is None:
        return _exhausted(container, stream, clock, name)
    if has_full_index(container) and (count := len(stream.index_entries)) > TAIL_PACKETS:
        packets = _read_from(stream.index_entries[count - TAIL_PACKETS].timestamp, True, container, stream, clock, name)
        if packets is not None and packets.num_shown > TAIL_PACKETS // 2:
            return packets
    target, step = header_end_tick(container, stream, clock), clock.ticks_in(STEP_BACK_SECONDS)
    while target > clock.tick(Fraction(0)):
        packets = _read_from(target, False, container, stream, clock, name)
        if packets is None:
            break
        if packets.num_shown:
            return packets
        target, step = target - step, 2 * step
    packets = _read_from(clock.tick(Fraction(0)), False, container, stream, clock, name)
    return packets or _exhausted(container, stream, clock, name)


def header_end_tick(container: Any, stream: Any, clock: StreamClock) -> int:
    """Returns the end by the durations in headers, which may be wrong."""
    if stream.duration:
        return int((stream.start_time or 0) + stream.duration)
    start, duration = container.start_time or 0, container.duration or 0
    return int(Fraction(start + duration, av.time_base) / clock.time_base)


def is_cut_short(head: bytes, container: Any, stream: Any) -> bool:
    """Returns True when the index, or the size in the header, extends past the end of the file.

    Args:
        head: the file's first bytes.
    """
    entries = stream.index_entries if has_full_index(container) else ()
    last = entries[len(entries) - 1] if len(entries) else None
    return max(0 if last is None else last.pos + last.size, stated_size(head) or 0) > container.size


def stated_size(head: bytes) -> int | None:
    """Returns a file's size by its header: Matroska's segment, AVI's RIFF chunk, FLV's metadata."""
    if head.startswith(_EBML_HEADER):
        header = _ebml_size(head, 4)
        if header is None or head[header[1] + header[0] :][:4] != _SEGMENT:
            return None
        segment = _ebml_size(head, header[1] + header[0] + 4)
        return None if segment is None else segment[1] + segment[0]
    if head.startswith(b"RIFF"):
        return int.from_bytes(head[4:8], "little") + 8
    found = head.find(b"\x08filesize\x00") if head.startswith(b"FLV") else -1
    return int(struct.unpack_from(">d", head + bytes(8), found + 10)[0]) if found >= 0 else None


def has_full_index(container: Any) -> bool:
    """True for formats whose index has every packet."""
    return "mp4" in container.format.name or container.format.name == "avi"


def _ebml_size(head: bytes, position: int) -> tuple[int, int] | None:
    """Returns a size and the position after it; None when unknown, as in live streams (RFC 8794, section 6)."""
    first = head[position] if position < len(head) else 0
    length = 9 - first.bit_length()
    value = int.from_bytes(head[position : position + length], "big") & ((1 << 7 * length) - 1)
    return None if length > 8 or value == (1 << 7 * length) - 1 else (value, position + length)


def _read_from(
    tick: int, is_any_frame: bool, container: Any, stream: Any, clock: StreamClock, name: str
) -> VideoPackets | None:
    try:
        container.seek(tick, stream=stream, any_frame=is_any_frame)
    except av.error.FFmpegError as error:
        logger.info("%s: cannot seek (%s)", name, error)
        return None
    return _exhausted(container, stream, clock, name)


def _exhausted(container: Any, stream: Any, clock: StreamClock, name: str) -> VideoPackets:
    packets = VideoPackets(container, stream, clock, name=name)
    for _ in packets:
        pass
    return packets
