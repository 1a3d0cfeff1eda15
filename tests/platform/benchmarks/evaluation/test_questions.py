from __future__ import annotations

import pytest

from timeviper_platform.benchmarks.evaluation import questions
from timeviper_platform.evaluation.answering import Answer


@pytest.mark.slow
def test_questions_at_toy_sizes() -> None:
    (row,) = questions.question_rows(width=16, num_frames=8, repeats=3)
    assert (row.bar, row.unit, row.command) == ("<= 1.3", "x", questions.COMMAND)
    assert row.value > 0


def test_other_answers_are_an_error() -> None:
    answer = Answer(text="a", option_log_probs=(-1.0, -2.0), num_prompt_tokens=3, num_cached_tokens=0)
    other = Answer(text="a", option_log_probs=(-1.0, -2.1), num_prompt_tokens=3, num_cached_tokens=2)
    with pytest.raises(RuntimeError, match="with the prefix cache an answer is"):
        questions._check_same([other], [answer])
