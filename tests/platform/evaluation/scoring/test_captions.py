from __future__ import annotations

import pytest

from timeviper_platform.evaluation.scoring.captions import rouge_l


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("A red circle.", "a red  circle", 1.0),
        ("", "a red circle", 0.0),
        ("", "", 1.0),
        ("the cat sat", "the dog sat", 2 / 3),
        ("circle red a", "a red circle", 1 / 3),  # one word in order
        ("A circle appears from 2 to 9 seconds.", "A circle appears from 3 to 9 seconds.", 7 / 8),
        ("police killed the gunman", "police kill the gunman", 0.75),  # section 2 of Lin 2004: 3 of 4 in order
    ],
)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(answer: str, reference: str, score: float) -> None:
    assert rouge_l(answer, reference) == pytest.approx(score)
    assert rouge_l(reference, answer) == pytest.approx(score)
