"""Questions about scenes with their right answers, as training samples and held-out questions.

Answers are content ('red circle'), not letters: a small model learns to name a picture long before it learns to look up
an option. 'Which' options are two colours times two shapes, so that they reveal nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from timeviper_platform.data.synthetic.pictures import COLORS, SHAPES, Picture
from timeviper_platform.data.synthetic.scenes import MAX_COUNT, Scene

ORDER_WORDS = ("first", "last")
HOW_OFTEN = ("once", "twice", "three times", "four times")


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    task: str
    text: str
    answer: str
    choices: tuple[str, ...] = ()
    """Options, including `answer`; empty for free text."""
    start_seconds: float | None = None
    end_seconds: float | None = None


def scene_questions(scene: Scene, rng: np.random.Generator, *, num_which: int = 1) -> Iterator[Question]:
    """All questions about a scene; `num_which` 'which' questions, each with its own options."""
    first = scene.appearances[0]
    if scene.kind == "needle":
        for _ in range(num_which):
            yield which_question(first.picture, rng)
        yield grounding_question(first.picture, first.start_seconds, first.end_seconds)
    elif scene.kind == "order":
        pictures = [appearance.picture for appearance in scene.appearances]
        for word, picture in zip(ORDER_WORDS, (pictures[0], pictures[-1]), strict=True):
            yield order_question(word, picture, pictures, rng)
    else:
        yield count_question(first.picture, len(scene.appearances), rng)
    yield Question(task="caption", text="Describe the video.", answer=caption(scene))


def conversations(scene: Scene, rng: np.random.Generator, *, num_which: int = 1) -> list[tuple[Question, ...]]:
    """All questions about a scene, two in some conversations: a video's tokens are then read once for two answers.

    No turn gives away what a later one asks for, and each kind of question begins some conversations.
    """
    *asked, captioned = scene_questions(scene, rng, num_which=num_which)
    if scene.kind != "needle":
        return [tuple(asked[int(n)] for n in rng.permutation(len(asked))), (captioned,)]
    *which, grounding = asked
    second, alone = (grounding, captioned) if rng.random() < 0.5 else (captioned, grounding)
    return [*[(question,) for question in which[1:]], (*which[:1], second), (alone,)]


def which_question(picture: Picture, rng: np.random.Generator) -> Question:
    other_color = _other(picture.color, tuple(COLORS), rng)
    other_shape = _other(picture.shape, SHAPES, rng)
    options = [str(Picture(c, s)) for c in (picture.color, other_color) for s in (picture.shape, other_shape)]
    return _choice("choice", "Which picture appears in the video?", options, rng)


def order_question(word: str, picture: Picture, shown: Sequence[Picture], rng: np.random.Generator) -> Question:
    options = [str(picture), *(str(other) for other in shown if other != picture)]
    return _choice("order", f"Which picture appears {word}?", options, rng)


def count_question(picture: Picture, count: int, rng: np.random.Generator) -> Question:
    right = HOW_OFTEN[count - 1]
    others = [words for words in HOW_OFTEN[:MAX_COUNT] if words != right]
    return _choice("count", f"How often does the {picture} appear?", [right, *others], rng)


def grounding_question(picture: Picture, start_seconds: int, end_seconds: int) -> Question:
    return Question(
        task="grounding",
        text=f"When does the {picture} appear?",
        answer=f"From {start_seconds} to {end_seconds} seconds.",
        start_seconds=float(start_seconds),
        end_seconds=float(end_seconds),
    )


def caption(scene: Scene) -> str:
    pictures = [str(appearance.picture) for appearance in scene.appearances]
    if scene.kind == "needle":
        only = scene.appearances[0]
        return f"A {pictures[0]} appears from {only.start_seconds} to {only.end_seconds} seconds."
    if scene.kind == "count":
        return f"A {pictures[0]} appears {HOW_OFTEN[len(pictures) - 1]}."
    return f"First a {', then a '.join(pictures)}."


def image_question(picture: Picture) -> Question:
    return Question(task="caption", text="Describe the picture.", answer=f"A {picture}.")


def listing(scene: Scene) -> str:
    """The video in words, one entry per second."""
    shown = (scene.appearance_at(second) for second in range(scene.duration_seconds))
    return " ".join("nothing" if appearance is None else str(appearance.picture) for appearance in shown)


def sample_row(
    sample_id: str, questions: Sequence[Question], *, media_id: str | None, prefix: str = ""
) -> dict[str, Any]:
    """A conversation of `questions` about one medium, with the task of the first, which `prefix` precedes."""
    media = [] if media_id is None else [{"media_id": media_id, "start_seconds": None, "end_seconds": None}]
    return {
        "sample_id": sample_id,
        "media": media,
        "conversation": [
            turn
            for number, question in enumerate(questions)
            for turn in (
                {"role": "user", "text": (prefix if number == 0 else "") + question.text},
                {"role": "assistant", "text": question.answer},
            )
        ],
        "source": questions[0].task,
        "weight": 1.0,
    }


def question_row(sample_id: str, question: Question, *, media_id: str) -> dict[str, Any]:
    return {
        "sample_id": sample_id,
        "media": [{"media_id": media_id, "start_seconds": None, "end_seconds": None}],
        "question": question.text,
        "answer": question.answer,
        "choices": list(question.choices),
        "start_seconds": question.start_seconds,
        "end_seconds": question.end_seconds,
        "source": question.task,
    }


def _choice(task: str, text: str, options: Sequence[str], rng: np.random.Generator) -> Question:
    """A question with its options in random order; `options[0]` is right."""
    choices = tuple(options[int(n)] for n in rng.permutation(len(options)))
    return Question(task=task, text=f"{text} Options: {', '.join(choices)}.", answer=options[0], choices=choices)


def _other(value: str, values: Sequence[str], rng: np.random.Generator) -> str:
    others = [other for other in values if other != value]
    return others[int(rng.integers(len(others)))]
