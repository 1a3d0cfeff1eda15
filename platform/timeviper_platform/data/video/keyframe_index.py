"""Decides whether a seek is cheaper than reading on.

MP4 and AVI index every frame, Matroska keyframes (after the first seek), transport streams nothing.

    P ------ K --------------- t    A seek skips P..K; both ways decode K..t.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

SEEK_PACKETS = 40
"""Cost of a local seek (0.3 ms), in packets."""

REMOTE_SEEK_BYTES = 4 << 20
"""Cost of a remote seek, which drops the read-ahead."""

BLIND_SEEK_SECONDS = 20
"""Minimum distance of a seek without an index."""


class KeyframeIndex:
    def __init__(self, stream: Any, time_base: Fraction, *, is_local: bool) -> None:
        self._entries = stream.index_entries
        self._time_base = time_base
        self._packets_per_second = float(stream.average_rate or 25)
        self._is_local = is_local

    def seek_target(self, position: int, tick: int, reorder: int) -> int | None:
        """Returns the timestamp to seek to; None = read on.

        Args:
            position: DTS of the last packet.
            tick: PTS to reach.
            reorder: PTS - DTS, as indices are in DTS.
        """
        entry = self._entries.search_timestamp(tick - reorder) if len(self._entries) else -1
        gap_seconds = float((tick - position) * self._time_base)
        if entry < 0 or (entry == len(self._entries) - 1 and self._entries[entry].timestamp <= position):
            return tick if gap_seconds > BLIND_SEEK_SECONDS else None  # no index, or it ends before the tick
        target = self._entries[entry]
        skipped_seconds = float((target.timestamp - position) * self._time_base)
        if skipped_seconds <= 0:
            return None
        if self._is_local:
            return target.timestamp if skipped_seconds * self._packets_per_second > SEEK_PACKETS else None
        here = self._entries.search_timestamp(position)
        start = self._entries[here].pos if here >= 0 else 0
        return target.timestamp if target.pos - start > REMOTE_SEEK_BYTES else None
