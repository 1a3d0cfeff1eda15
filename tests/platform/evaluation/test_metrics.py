from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from timeviper_platform.evaluation.metrics import Span, mean_interval, parse_span, temporal_iou, wilson_interval


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("From 7 to 12 seconds.", Span(7, 12)),
        ("It is there from 7.5 seconds to 12.25 seconds", Span(7.5, 12.25)),
        ("from 3s to 3 s, then from 8 to 9", Span(3, 3)),
        ("From 12 to 7 seconds.", None),
        ("From the start to 7", None),
        ("", None),
    ],
)
def test_an_interval_is_read_from_the_words(text: str, span: Span | None) -> None:
    assert parse_span(text) == span


def test_iou_of_worked_examples() -> None:
    assert temporal_iou(Span(2, 6), Span(2, 6)) == 1
    assert temporal_iou(Span(0, 4), Span(2, 6)) == pytest.approx(2 / 6)
    assert temporal_iou(Span(0, 2), Span(3, 6)) == 0
    assert temporal_iou(Span(0, 2), Span(2, 6)) == 0
    assert temporal_iou(Span(3, 3), Span(3, 3)) == 0
    assert temporal_iou(Span(0, 10), Span(4, 5)) == pytest.approx(0.1)


def test_wilson_interval_of_worked_examples() -> None:
    # the bounds solve (p - share)^2 = z^2 p (1 - p) / n: checked against that equation rather than the closed form
    for right, number in ((396, 440), (110, 440), (0, 20), (20, 20)):
        for bound in wilson_interval(right, number):
            share = right / number
            assert (bound - share) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / number, abs=1e-9)
    low, high = wilson_interval(396, 440)
    assert low < 0.9 < high
    assert wilson_interval(0, 20)[0] == 0
    with pytest.raises(ValueError, match="no interval"):
        wilson_interval(0, 0)


@given(st.integers(1, 2000), st.floats(0, 1))
def test_wilson_interval_holds_the_share_and_stays_in_range(number: int, part: float) -> None:
    right = math.floor(part * number)
    low, high = wilson_interval(right, number)
    assert 0 <= low <= right / number + 1e-12
    assert right / number - 1e-12 <= high <= 1


def test_mean_interval_shrinks_with_more_values() -> None:
    few, many = mean_interval([0.0, 1.0] * 5), mean_interval([0.0, 1.0] * 500)
    assert few[0] < many[0] < 0.5 < many[1] < few[1]
    assert mean_interval([0.25]) == (0.25, 0.25)
    with pytest.raises(ValueError, match="no interval"):
        mean_interval([])
