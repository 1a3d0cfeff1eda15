"""LookAhead equals brute force on random streams in decode order."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from timeviper_platform.data.video.packet_lookahead import LookAhead


def random_stream(seed: int) -> list[tuple[int, int]]:
    """(PTS, DTS) in decode order, with irregular steps and up to three B-frames."""
    draw = random.Random(seed)
    shown = sorted(draw.sample(range(120), draw.randint(2, 40)))
    order: list[int] = []
    while shown:
        count = min(len(shown), draw.randint(1, 4))
        group, shown = shown[:count], shown[count:]
        order += [group[-1], *draw.sample(group[:-1], count - 1)]
    lags = [min(order[i:]) for i in range(len(order))]  # the greatest DTS below all later PTS
    return list(zip(order, lags, strict=True))


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 10**9), st.lists(st.integers(0, 130), min_size=1, max_size=12), st.integers(1, 4))
def test_every_tick_gets_the_last_pts_before_it_and_no_needed_packet_is_dropped(
    seed: int, ticks: list[int], step: int
) -> None:
    stream = random_stream(seed)
    every_pts = sorted(pts for pts, _ in stream)
    ticks = sorted(ticks)
    ahead, position, dropped = LookAhead(), 0, set()
    waiting: list[int] = []
    for start in range(0, len(ticks), step):  # several calls in one pass
        chunk = ticks[start : start + step]
        ahead.want(chunk)
        while not ahead.is_resolved:
            if waiting and ahead.needed(waiting[0]) is not None:
                pts = waiting.pop(0)
                if not ahead.needed(pts):
                    dropped.add(pts)
            elif position < len(stream):
                ahead.add(*stream[position])
                waiting.append(stream[position][0])
                position += 1
            else:
                ahead.finish(None)
        for tick in chunk:
            assert ahead.pts_of[tick] == max((p for p in every_pts if p <= tick), default=every_pts[0])
            assert ahead.pts_of[tick] not in dropped
            assert ahead.may_want(ahead.pts_of[chunk[-1]])


def test_times_past_the_end_have_no_frame() -> None:
    ahead = LookAhead()
    ahead.want([0, 5, 6, 9])
    for pts in (0, 2, 4):
        ahead.add(pts, pts)
    ahead.finish(6)
    assert ahead.pts_of == {0: 0, 5: 4}


def test_an_empty_stream_resolves_to_nothing() -> None:
    ahead = LookAhead()
    ahead.want([0])
    ahead.finish(None)
    assert ahead.is_resolved
    assert ahead.pts_of == {}


def test_a_wrong_dts_is_an_error() -> None:
    ahead = LookAhead()
    ahead.want([0])
    ahead.add(8, 4)
    with pytest.raises(ValueError, match="PTS 3 follows DTS 4"):
        ahead.add(3, 5)
