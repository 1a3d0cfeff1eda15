from __future__ import annotations

import pytest

from timeviper_platform.evaluation.scoring.spans import Span, SpanRule, find_span, parse_span, parse_spans, temporal_iou


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("From 7 to 12 seconds.", Span(7, 12)),
        ("It is there from 7.5 seconds to 12.25 seconds", Span(7.5, 12.25)),
        ("The event happens in 24.3 - 30.4 seconds.", Span(24.3, 30.4)),
        ("12–15", Span(12, 15)),
        ("00:03 to 1:02:05", Span(3, 3725)),
        ("0:15-0:19", Span(15, 19)),
        ("between 3s and 5.5s", Span(3, 5.5)),
        ("It starts at 3 and ends at 5", Span(3, 5)),
        ("start time: 3, end time: 5", Span(3, 5)),
        ('{"start": 3, "end": 5}', Span(3, 5)),
        ('{"start_seconds": 3.5, "end_seconds": 5}', Span(3.5, 5)),
        ("from 3s to 3 s, then from 8 to 9", Span(8, 9)),
        ("from 1 to 2. The answer is 3 to 4, I think", Span(3, 4)),
        ("the answer follows: from 1 to 2", Span(1, 2)),
        ("from 1 to 2, that is my answer", Span(1, 2)),
        ("From 12 to 7 seconds.", Span(12, 7)),
        ("-3 to 5", None),
        ("3 to -5", None),
        ("From the start to 7", None),
        ("", None),
    ],
)
def test_an_interval_is_read_from_the_words(text: str, span: Span | None) -> None:
    assert parse_span(text) == span


def test_an_interval_is_cut_at_the_duration() -> None:
    assert parse_span("from 50 to 99 seconds", 60) == Span(50, 60)
    assert parse_spans("1 - 2, 3 - 4 and 58 - 70", 60) == [Span(1, 2), Span(3, 4), Span(58, 60)]


@pytest.mark.parametrize(
    ("answer", "charades", "timelens", "extremewhen"),
    [
        ("From 5 to 3 seconds", Span(3, 5), Span(5, 3), Span(3, 5)),
        ("1 - 2, then 3 - 4", Span(1, 2), Span(1, 2), Span(3, 4)),
        ("Start: 3. End: 7", None, Span(3, 7), None),
        ("0:15-0:19", Span(15, 19), Span(15, 19), Span(0, 15)),
        ("none", None, None, None),
    ],
)
def test_public_rules_read_the_same_answer_in_their_ways(
    answer: str, charades: Span | None, timelens: Span | None, extremewhen: Span | None
) -> None:
    rules: tuple[SpanRule, ...] = ("lmms_eval_charades", "lmms_eval_timelens", "lmms_eval_extremewhen")
    assert [find_span(rule, answer) for rule in rules] == [charades, timelens, extremewhen]


def test_iou_of_worked_examples() -> None:
    assert temporal_iou(Span(2, 6), Span(2, 6)) == 1
    assert temporal_iou(Span(0, 4), Span(2, 6)) == pytest.approx(2 / 6)
    assert temporal_iou(Span(0, 2), Span(3, 6)) == 0
    assert temporal_iou(Span(0, 2), Span(2, 6)) == 0
    assert temporal_iou(Span(3, 3), Span(3, 3)) == 0
    assert temporal_iou(Span(6, 2), Span(2, 6)) == 0
    assert temporal_iou(Span(0, 10), Span(4, 5)) == pytest.approx(0.1)
