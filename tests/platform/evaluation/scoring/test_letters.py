from __future__ import annotations

import pytest

from timeviper_platform.evaluation.scoring.letters import LetterRule, bare_option, find_letter

OPTIONS = ("A. a dog", "B. a cat", "C. a person walks in", "D. nothing")
FAILED = "[LMMS_EVAL_REQUEST_FAILED after 5 retries] timeout"

# what public scorers find in the same answers; "" = no letter
PUBLIC = [
    # answer, right letter, strict, lmms_eval, mvbench, videomme_v2, vlmevalkit
    ("A person walks in. The answer is B.", "B", "B", "A", "A", "B", "A"),
    ("The answer is D because A and B are wrong", "D", "D", "B", "D", "D", "D"),
    ("I think B, not A", "B", "", "A", "B", "", "B"),
    ("Best option: C", "C", "C", "C", "C", "C", "B"),
    ("(B)", "B", "B", "B", "B", "", "B"),
    ("b", "B", "B", "", "B", "B", ""),
    (FAILED, None, "", "D", "", "", "A"),
    ("Failed to obtain answer via API.", None, "", "A", "", "", "A"),
    ("", None, "", "", "", "", ""),
]


@pytest.mark.parametrize(("answer", "right", "strict", "lmms", "mvbench", "v2", "vlm"), PUBLIC)
def test_public_scorers_disagree_on_the_same_answer(
    answer: str, right: str | None, strict: str, lmms: str, mvbench: str, v2: str, vlm: str
) -> None:
    rules: tuple[LetterRule, ...] = (
        "strict",
        "lmms_eval",
        "lmms_eval_mvbench",
        "lmms_eval_videomme_v2",
        "vlmevalkit",
    )
    assert tuple(find_letter(rule, answer, OPTIONS) or "" for rule in rules) == (strict, lmms, mvbench, v2, vlm)
    assert strict in ("", right), "strict never finds a wrong letter here"


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B) a cat", "B"),
        ("B. a cat", "B"),
        ("**Answer**: C", "C"),
        ("The answer is **D**.", "D"),
        ("the correct answer would be (c)", "C"),
        ("The answer is A. No wait, the answer is B.", "B"),
        ("Option A is wrong. Best option: C", "C"),
        ("I choose option B.", "B"),
        ("Option A and option B are both plausible", None),
        ("The answer is a person walks in", "C"),
        ("The answer is A person walks in", "C"),
        ("It shows a cat.\nB", "B"),
        ("a cat", "B"),
        ("A CAT.", "B"),
        ("a", "A"),
        ("a zebra", None),
        ("A or B", None),
        ("The answer is A/B", None),
        ("(A), (B)", None),
        ("A\nthen\nB", None),
        ("E", None),
        ("The answer is F", None),
        ("A", "A"),
        ("   \n", None),
    ],
)
def test_strict_reads_one_letter_or_none(answer: str, letter: str | None) -> None:
    assert find_letter("strict", answer, OPTIONS) == letter


def test_strict_knows_only_the_questions_letters() -> None:
    assert find_letter("strict", "(F)", ("1", "2", "3", "4", "5", "6")) == "F"
    assert find_letter("lmms_eval", "(F)", ("1", "2", "3", "4", "5", "6")) is None, "lmms-eval knows A to D"
    assert find_letter("strict", "x", ()) is None
    assert find_letter("strict", "same", ("same", "same", "other")) is None


def test_letters_that_public_code_draws_are_the_same_every_time() -> None:
    for rule in ("lmms_eval_longvideobench", "lmms_eval_egoschema"):
        drawn = {find_letter(rule, "", OPTIONS) for _ in range(5)}  # type: ignore[arg-type]
        assert len(drawn) == 1
        assert drawn <= set("ABCD")


def test_option_letters_are_cut_off() -> None:
    assert [bare_option(text) for text in ("A. x", "(B) y.z", "C) w", "A dog", "D.nothing")] == [
        *("x", "y.z", "w", "A dog", "nothing")
    ]
