"""Finds the packets of the frames at given ticks, ahead of the decoder.

DTS ascend and no PTS is below its DTS, so later PTS are at least the last DTS (the front).

    packets (PTS/DTS)  0/-2  4/-1  2/0  1/1  3/2  8/3     wanted: tick 1
    after 2/0          front = 0: PTS 1 may still come
    after 3/2          front = 2: the greatest PTS <= 1 is 1
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Sequence

_NO_PACKET_YET = -(1 << 62)
_NO_PACKET_LEFT = 1 << 62


class LookAhead:
    """State of one pass through a stream."""

    def __init__(self) -> None:
        self._seen: list[int] = []
        self._front = _NO_PACKET_YET
        self._end: int | None = None
        self._open: deque[int] = deque()
        self._last_tick = _NO_PACKET_YET
        self.pts_of: dict[int, int] = {}
        """Resolved ticks -> PTS of their frames."""
        self.wanted: set[int] = set()
        """Values of `pts_of`."""

    def want(self, ticks: Sequence[int]) -> None:
        """Sets ticks, ascending and not before the previous ones."""
        kept = bisect_right(self._seen, self._last_tick) - 1  # the last tick's frame may be wanted again
        del self._seen[: max(0, kept)]
        self._open = deque(dict.fromkeys(ticks))
        self._last_tick = ticks[-1]
        self.pts_of = {}
        self.wanted = set()
        self._resolve()

    def add(self, pts: int, dts: int | None) -> None:
        """Adds the next packet. Raises ValueError when its PTS is below an earlier DTS."""
        if pts < self._front:
            raise ValueError(f"PTS {pts} follows DTS {self._front}")
        insort(self._seen, pts)
        if dts is not None:
            self._front = max(self._front, dts)
        self._resolve()

    def finish(self, end: int | None) -> None:
        """Ends the stream. Ticks from `end` on have no frame."""
        self._front = _NO_PACKET_LEFT
        self._end = end
        self._resolve()

    def restart(self) -> None:
        self._seen = []
        self._front = _NO_PACKET_YET

    @property
    def next_open(self) -> int | None:
        return self._open[0] if self._open else None

    @property
    def is_resolved(self) -> bool:
        return not self._open

    def needed(self, pts: int) -> bool | None:
        """Returns whether the decoder must output this frame; None = unknown yet.

        Frames past the last tick are needed: the next ticks are unknown.
        """
        if pts > self._last_tick or pts in self.wanted:
            return True
        if not self._open:
            return False
        if self._seen and self._open[0] < pts == self._seen[0]:
            return None  # may be the first frame, which earlier ticks show
        tick = next((tick for tick in self._open if tick >= pts), None)
        if tick is None:
            return False
        after = bisect_right(self._seen, pts)
        return False if after < len(self._seen) and self._seen[after] <= tick else None

    def may_want(self, pts: int) -> bool:
        """Returns True while a current or later tick may want this frame."""
        return pts >= self.pts_of.get(self._last_tick, self._last_tick + 1) or self.needed(pts) is None

    def _resolve(self) -> None:
        while self._open and self._seen and self._open[0] < self._front:
            tick = self._open[0]
            index = bisect_right(self._seen, tick)
            if index == 0 and self._seen[0] > self._front:
                return  # a smaller PTS may still come first
            self._open.popleft()
            if self._end is None or tick < self._end:
                self.pts_of[tick] = self._seen[max(0, index - 1)]
                self.wanted.add(self.pts_of[tick])
        if self._front == _NO_PACKET_LEFT and not self._seen:
            self._open.clear()
