"""Generated answers with frames of their videos (Figure 7)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from timeviper_platform.common import storage
from timeviper_platform.data.media.container import DecodeError
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.data.video.reader import open_video
from timeviper_platform.evaluation.answering import Answerer
from timeviper_platform.evaluation.evaluator import AnsweringConfig
from timeviper_platform.evaluation.figures.sweeps import TaskPrompts, metric_name, score_text
from timeviper_platform.evaluation.outcomes import Question

FRAME_SIDE = 160
NUM_FRAMES = 8
"""Frames shown of a video, evenly spaced over those that the model read."""

_ROUNDING = Fraction(1, 1_000_000)


class AnsweredExample(NamedTuple):
    row: dict[str, Any]
    """Question, expected and generated answer, score, and the shown frames' times."""
    frames: list[np.ndarray]
    """(H, W, 3) uint8; empty where the video cannot be read any more."""


def answered_examples(
    answerer: Answerer, tasks: Sequence[TaskPrompts], store: FeatureStore, config: AnsweringConfig
) -> list[AnsweredExample]:
    """Answers the first question of each task."""
    return [_answered(answerer, task, store, config) for task in tasks]


def _answered(answerer: Answerer, task: TaskPrompts, store: FeatureStore, config: AnsweringConfig) -> AnsweredExample:
    question = task.questions[0]
    (text,) = answerer.generate(task.prompts[:1], max_new_tokens=config.max_new_tokens)
    seconds, frames, note = _frames(question, store, config)
    row = {
        "task": task.task,
        "sample_id": question["sample_id"],
        "question": question["question"],
        "expected": question["answer"],
        "generated": text,
        "metric": metric_name(question),
        "score": score_text(question, text),
        "frame_seconds": seconds,
        "note": note,
    }
    return AnsweredExample(row, frames)


def _frames(
    question: Question, store: FeatureStore, config: AnsweringConfig
) -> tuple[list[float], list[np.ndarray], str]:
    """Times and pixels of frames, and the reason if there are none."""
    media = question["media"] or []
    if not media:
        return [], [], "the question has no video"
    info = store.info(media[0]["media_id"])
    chosen = info.select(
        max_frames=config.max_frames,
        frame_selection=config.frame_selection,
        start_seconds=media[0]["start_seconds"],
        end_seconds=media[0]["end_seconds"],
    )
    count = min(NUM_FRAMES, len(chosen))
    times = [float(info.pts_seconds[chosen[index * len(chosen) // count]]) for index in range(count)]
    try:
        reader = open_video(info.uri, FRAME_SIDE)
        try:
            batch = reader.sample([Fraction(seconds) + _ROUNDING for seconds in times])
        finally:
            reader.close()
    except (DecodeError, OSError, ValueError, RuntimeError) as error:  # the answer is shown without frames
        return [], [], f"no frames of {storage.shown_uri(info.uri)}: {storage.shown_text(str(error))}"
    return [round(float(seconds), 3) for seconds in batch.pts_seconds], list(batch.frames), ""
