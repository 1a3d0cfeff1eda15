"""Is the way to a wanted time shorter through a seek? Answered from the index that a container carries, by cost.

Knows timestamps, bytes and what a seek costs; nothing of packets or pixels. MP4 and AVI index every frame, Matroska its
keyframes (once something has sought), transport streams nothing.

    here     keyframe          wanted        walking on reads the packets of both gaps and decodes those of the second;
    P ------ K --------------- t             a seek to K decodes the same and reads no packet of the first
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

SEEK_PACKETS = 40
"""A seek in a local file costs about as much as reading so many packets (0.3 ms): emptied buffers, a new walk."""

REMOTE_SEEK_BYTES = 4 << 20
"""A seek in a remote file drops what was read ahead and asks anew: as long as 4 MB take to come."""

BLIND_SEEK_SECONDS = 20
"""Without an index a jump further ahead than this is a seek: keyframes are seldom further apart."""


class KeyframeIndex:
    """The index of one open stream; grows with what its container learns."""

    def __init__(self, stream: Any, time_base: Fraction, *, is_local: bool) -> None:
        self._entries = stream.index_entries
        self._time_base = time_base
        self._packets_per_second = float(stream.average_rate or 25)
        self._is_local = is_local

    def seek_target(self, position: int, tick: int, reorder: int) -> int | None:
        """The timestamp to seek to on the way from `position` to `tick`; None where walking on costs less.

        Args:
            position: DTS of the last packet that was read.
            tick: the time whose frame is wanted, after `position`.
            reorder: by how much PTS run ahead of DTS, which indices are in.
        """
        place = self._entries.search_timestamp(tick - reorder) if len(self._entries) else -1
        gap_seconds = float((tick - position) * self._time_base)
        if place < 0 or (place == len(self._entries) - 1 and self._entries[place].timestamp <= position):
            return tick if gap_seconds > BLIND_SEEK_SECONDS else None  # no index, or one that ends before the tick
        target = self._entries[place]
        skipped_seconds = float((target.timestamp - position) * self._time_base)
        if skipped_seconds <= 0:
            return None
        if self._is_local:
            return target.timestamp if skipped_seconds * self._packets_per_second > SEEK_PACKETS else None
        here = self._entries.search_timestamp(position)
        start = self._entries[here].pos if here >= 0 else 0
        return target.timestamp if target.pos - start > REMOTE_SEEK_BYTES else None
