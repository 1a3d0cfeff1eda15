"""A needle in a long video: accuracy by length and depth, on stored features."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from timeviper_model.analysis.dropping import with_plan
from timeviper_model.timeviper import TimeViper
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.evaluation.answering import Answerer, Prompt
from timeviper_platform.evaluation.figures.sweeps import score_text
from timeviper_platform.evaluation.outcomes import Question
from timeviper_platform.evaluation.scoring.intervals import interval_by_video, mean_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class NeedleConfig:
    """Questions about a few frames among thousands of others."""

    num_frames: tuple[int, ...] = (256, 1024, 4096, 10_000)
    """Lengths, in frames."""
    num_depths: int = 10
    """Number of positions of the needle, evenly spaced from the beginning to the end."""
    num_questions: int = 16
    """Questions per cell. Depths have different ones while there are enough; all lengths have the same."""
    task: str = "choice"
    """Questions, with choices, about what an interval shows."""
    intervals: str = "grounding"
    """Questions about the same media that name the interval: its frames are the needle, all others the haystack."""

    def __post_init__(self) -> None:
        if not self.num_frames or min(*self.num_frames, self.num_depths, self.num_questions) < 1:
            raise ValueError(f"{self}: lengths, depths and questions must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Needle:
    question: Question
    frames_FND: Tensor
    """Features of the interval."""


def find_needles(
    store: FeatureStore, questions: Sequence[Question], intervals: Sequence[Question], config: NeedleConfig
) -> tuple[list[Needle], Tensor]:
    """Returns questions with the features of their intervals, and (F, N, D) features without any interval.

    Raises:
        ValueError: if no question has an interval in a stored medium, or nothing lies outside of the intervals.
    """
    by_medium = {row["media"][0]["media_id"]: row for row in intervals if row["media"]}
    needles: list[Needle] = []
    haystack: list[Tensor] = []
    num_needles, needed = config.num_questions * config.num_depths, max(config.num_frames)
    for row in questions:
        medium: str = row["media"][0]["media_id"] if row["media"] else ""
        span = by_medium.get(medium)
        if span is None or medium not in store or span["start_seconds"] is None:
            continue
        features = store.read(medium)
        times = torch.from_numpy(features.info.times_seconds)
        inside = (times >= span["start_seconds"]) & (times < span["end_seconds"])
        near = (times >= span["start_seconds"] - 1) & (times < span["end_seconds"] + 1)
        if len(needles) < num_needles and bool(inside.any()):
            needles.append(Needle(question=row, frames_FND=features.features[inside]))
        if sum(map(len, haystack)) < needed:
            haystack.append(features.features[~near])
        elif len(needles) == num_needles:
            break
    if not needles or not sum(map(len, haystack)):
        raise ValueError(
            f"no {config.task!r} question of a stored medium has an interval in {config.intervals!r} with frames"
            " around it; set needle.task and needle.intervals to files about the same media"
        )
    return needles, torch.cat(haystack)


def place_needle(needle_FND: Tensor, haystack_FND: Tensor, num_frames: int, depth: float) -> Tensor:
    """(num_frames, N, D): the needle at `depth` (0 = first, 1 = last) of repeated haystack frames."""
    needle_FND = needle_FND[:num_frames]
    num_hay = num_frames - len(needle_FND)
    hay = haystack_FND[torch.arange(num_hay) % len(haystack_FND)]
    before = round(depth * num_hay)
    return torch.cat([hay[:before], needle_FND, hay[before:]])


def needle_rows(
    model: TimeViper,
    answerer_of: Callable[[TimeViper], Answerer],
    needles: Sequence[Needle],
    haystack_FND: Tensor,
    config: NeedleConfig,
    *,
    max_new_tokens: int,
) -> Iterator[dict[str, Any]]:
    """Yields accuracies by length, model and depth, with and without the model's own sites.

    `accuracy` is that of the most probable option, as in the evaluation; `generated` that of the generated answer,
    which may be none of the options.
    """
    models = {"without TransV": with_plan(model, ())}
    if model.config.transv:
        models = {"with TransV": model} | models
    chance = sum(1 / len(needle.question["choices"]) for needle in needles) / len(needles)
    for num_frames in config.num_frames:
        for name, one in models.items():
            answerer = answerer_of(one)
            for step in range(config.num_depths):
                depth = step / max(1, config.num_depths - 1)
                started = time.perf_counter()
                right, generated, videos = [], [], []
                for count in range(config.num_questions):
                    number = (step * config.num_questions + count) % len(needles)
                    needle = needles[number]
                    videos.append(needle.question["media"][0]["media_id"])
                    shifted = haystack_FND.roll(-number * (len(haystack_FND) // len(needles)), 0)
                    frames = place_needle(needle.frames_FND, shifted, num_frames, depth)
                    prompt = Prompt(text=needle.question["question"], media=(frames.flatten(0, 1),))
                    choices = needle.question["choices"]
                    (answer,) = answerer.answer([prompt], [choices], max_new_tokens=max_new_tokens)
                    best = max(range(len(choices)), key=answer.option_log_probs.__getitem__)
                    right.append(float(choices[best] == needle.question["answer"]))
                    generated.append(score_text(needle.question, answer.text))
                low, high = interval_by_video(mean_of(right), videos)
                yield {
                    "model": name,
                    "num_frames": num_frames,
                    "depth": round(depth, 4),
                    "num_questions": len(right),
                    "accuracy": sum(right) / len(right),
                    "low": low,
                    "high": high,
                    "generated": sum(generated) / len(generated),
                    "chance": chance,
                    "seconds": time.perf_counter() - started,
                }
