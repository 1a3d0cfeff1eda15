"""Which packets hold the frames of given times, decided a few packets ahead of the decoder.

Purely integers: PTS and DTS of packets in decode order in, 'needed', 'not needed' or 'not known yet' out. Knows nothing
of files or pixels. It rests on one fact: DTS never decreases and no PTS is below its own DTS, so the last DTS bounds
every PTS still to come from below.

    packets (PTS/DTS)  0/-2  4/-1  2/0  1/1  3/2  8/3     wanted: tick 1
    after 2/0          front = 0: a PTS in 0..1 may still come, so tick 1 is open
    after 3/2          front = 2: nothing below 2 will come; the greatest PTS <= 1 is 1
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Sequence

_NO_PACKET_YET = -(1 << 62)
_NO_PACKET_LEFT = 1 << 62


class LookAhead:
    """State of one walk through a stream, from its start or from a keyframe on."""

    def __init__(self) -> None:
        self._seen: list[int] = []
        self._front = _NO_PACKET_YET
        self._end: int | None = None
        self._open: deque[int] = deque()
        self._last_tick = _NO_PACKET_YET
        self.pts_of: dict[int, int] = {}
        """tick -> PTS of its frame, for the ticks that are resolved"""
        self.wanted: set[int] = set()
        """the values of pts_of"""

    def want(self, ticks: Sequence[int]) -> None:
        """Starts on new ticks, ascending and none before those of the last call."""
        kept = bisect_right(self._seen, self._last_tick) - 1  # the frame on screen at the last tick may be wanted again
        del self._seen[: max(0, kept)]
        self._open = deque(dict.fromkeys(ticks))
        self._last_tick = ticks[-1]
        self.pts_of = {}
        self.wanted = set()
        self._resolve()

    def add(self, pts: int, dts: int | None) -> None:
        """Takes note of the next packet.

        Raises:
            ValueError: when its PTS is below an earlier DTS, so that nothing said so far can be trusted.
        """
        if pts < self._front:
            raise ValueError(f"PTS {pts} follows DTS {self._front}")
        insort(self._seen, pts)
        if dts is not None:
            self._front = max(self._front, dts)
        self._resolve()

    def finish(self, end: int | None) -> None:
        """There are no more packets; the last frame is on screen until `end` (ticks from there on have no frame)."""
        self._front = _NO_PACKET_LEFT
        self._end = end
        self._resolve()

    def restart(self) -> None:
        """The walk goes on elsewhere, from a keyframe that is shown at the first open tick or before."""
        self._seen = []
        self._front = _NO_PACKET_YET

    @property
    def next_open(self) -> int | None:
        """The first tick whose frame is not known yet."""
        return self._open[0] if self._open else None

    @property
    def is_resolved(self) -> bool:
        """True when every tick's frame is known, or known not to exist."""
        return not self._open

    def needed(self, pts: int) -> bool | None:
        """Must the frame with this PTS be decoded for its own sake? None = not known before more packets are seen.

        Frames past the last tick count as needed: the next call's ticks are not known yet.
        """
        if pts > self._last_tick or pts in self.wanted:
            return True
        if not self._open:
            return False
        if self._seen and self._open[0] < pts == self._seen[0]:
            return None  # perhaps the very first frame, shown for ticks before it
        tick = next((tick for tick in self._open if tick >= pts), None)
        if tick is None:
            return False
        after = bisect_right(self._seen, pts)
        return False if after < len(self._seen) and self._seen[after] <= tick else None

    def may_want(self, pts: int) -> bool:
        """True while this call's ticks, or later ones, may ask for the frame with this PTS (again)."""
        return pts >= self.pts_of.get(self._last_tick, self._last_tick + 1) or self.needed(pts) is None

    def _resolve(self) -> None:
        while self._open and self._seen and self._open[0] < self._front:
            tick = self._open[0]
            place = bisect_right(self._seen, tick)
            if place == 0 and self._seen[0] > self._front:
                return  # a smaller PTS may come and be the first frame
            self._open.popleft()
            if self._end is None or tick < self._end:
                self.pts_of[tick] = self._seen[max(0, place - 1)]
                self.wanted.add(self.pts_of[tick])
        if self._front == _NO_PACKET_LEFT and not self._seen:
            self._open.clear()
