"""Held-out questions to outcomes: asks each with its video and without it.

Knows the weights folder, the feature store and the QUESTIONS schema; not Ray, nor how outcomes become a report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from timeviper_model.layers.backends import Backend, set_backend
from timeviper_model.timeviper import TimeViper
from timeviper_model.weights import weights_folder as weights
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.evaluation.answering import DEFAULT_MAX_PACK_TOKENS, Answerer, Prompt
from timeviper_platform.evaluation.metrics import Span, parse_span, temporal_iou

Status = Literal["ok", "no_features", "no_answer_format"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AnsweringConfig:
    """How questions are put to the model."""

    max_frames: int | None = 256
    """of a video; None = all. The paper evaluates on 256"""
    frame_mode: Literal["uniform", "first"] = "uniform"
    """which ones, where there are more; the paper's evaluation takes the first"""
    max_new_tokens: int = 32
    """of a free answer"""
    max_pack_tokens: int = DEFAULT_MAX_PACK_TOKENS
    """of (question, option) pairs that run together; bounds memory"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    backend: Backend = "auto"
    """what computes scans, convolutions and attention: CUDA kernels where they can be used (auto), torch, or kernels
    or an error"""
    num_threads: int = 1
    """of torch, in each worker"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of one question."""

    sample_id: str
    task: str
    status: Status
    """no_features: a medium is not in the store; no_answer_format: neither choices nor an interval to compare with"""
    expected: str
    answer: str
    """with the video: the likeliest option, or what the model wrote"""
    answer_without_video: str
    score: float
    """choices: 1 for the right option, else 0; grounding: temporal IoU"""
    score_without_video: float
    chance: float | None
    """choices: one over their number"""


class Evaluator:
    """Holds one model and one store; `evaluate` is called with one batch of questions after the other."""

    def __init__(self, *, weights_folder: str, features_uri: str, config: AnsweringConfig) -> None:
        """Loads both.

        Raises:
            ValueError: when either is missing, or the store's features are not of the width the weights want.
        """
        torch.set_num_threads(config.num_threads)
        self._config = config
        self._store = FeatureStore.open(features_uri)
        model = load_model(weights_folder, config)
        self._dim = model.config.vision.row_size
        self._answerer = Answerer(model, weights.load_tokenizer(weights_folder), max_pack_tokens=config.max_pack_tokens)

    def evaluate(self, questions: Sequence[dict[str, Any]]) -> list[Outcome]:
        """One outcome for each row of the QUESTIONS schema, in order."""
        outcomes: dict[int, Outcome] = {}
        with_choices: dict[int, tuple[Tensor, ...]] = {}
        with_spans: dict[int, tuple[Tensor, ...]] = {}
        for number, question in enumerate(questions):
            media = read_media(self._store, question, self._config, dim=self._dim)
            if media is None:
                outcomes[number] = _unanswered(question, "no_features")
            elif question["choices"]:
                with_choices[number] = media
            elif question["start_seconds"] is not None and question["end_seconds"] is not None:
                with_spans[number] = media
            else:
                outcomes[number] = _unanswered(question, "no_answer_format")
        outcomes |= self._choose(questions, with_choices) if with_choices else {}
        outcomes |= self._ground(questions, with_spans) if with_spans else {}
        return [outcomes[number] for number in range(len(questions))]

    def _choose(self, questions: Sequence[dict[str, Any]], media: dict[int, tuple[Tensor, ...]]) -> dict[int, Outcome]:
        rows = [questions[number] for number in media]
        options = [row["choices"] for row in rows]
        picked = []
        for prompts in _both_ways(rows, list(media.values())):
            scores = self._answerer.score_options(prompts, options)
            picked.append([texts[s.index(max(s))] for texts, s in zip(options, scores, strict=True)])
        return {
            number: Outcome(
                sample_id=row["sample_id"],
                task=row["source"],
                status="ok",
                expected=row["answer"],
                answer=seen,
                answer_without_video=blind,
                score=float(seen == row["answer"]),
                score_without_video=float(blind == row["answer"]),
                chance=1 / len(row["choices"]),
            )
            for number, row, seen, blind in zip(media, rows, *picked, strict=True)
        }

    def _ground(self, questions: Sequence[dict[str, Any]], media: dict[int, tuple[Tensor, ...]]) -> dict[int, Outcome]:
        rows = [questions[number] for number in media]
        written = [
            self._answerer.generate(prompts, max_new_tokens=self._config.max_new_tokens)
            for prompts in _both_ways(rows, list(media.values()))
        ]
        return {
            number: Outcome(
                sample_id=row["sample_id"],
                task=row["source"],
                status="ok",
                expected=row["answer"],
                answer=seen,
                answer_without_video=blind,
                score=_span_score(seen, row),
                score_without_video=_span_score(blind, row),
                chance=None,
            )
            for number, row, seen, blind in zip(media, rows, *written, strict=True)
        }


def read_media(
    store: FeatureStore, question: dict[str, Any], config: AnsweringConfig, *, dim: int
) -> tuple[Tensor, ...] | None:
    """The vision rows of each of the question's media; None when the store lacks one.

    Raises:
        ValueError: when a medium's features are not `dim` wide.
    """
    media = []
    for medium in question["media"] or []:
        if medium["media_id"] not in store:
            return None
        info = store.info(medium["media_id"])
        if info.dim != dim:
            raise ValueError(
                f"{medium['media_id']} has features of width {info.dim}, the weights want {dim};"
                " evaluate on a store that the weights' own vision encoder filled"
            )
        frames = info.select(
            max_frames=config.max_frames,
            frame_selection=config.frame_mode,
            start_seconds=medium["start_seconds"],
            end_seconds=medium["end_seconds"],
        )
        media.append(store.read(medium["media_id"], frames).features.flatten(0, 1))
    return tuple(media)


def load_model(weights_folder: str, config: AnsweringConfig) -> TimeViper:
    """The weights on the configured device, with the configured backend."""
    dtype = getattr(torch, config.dtype)
    model = weights.from_pretrained(weights_folder, dtype=dtype, device=config.device)
    set_backend(model, config.backend, device=config.device, dtype=dtype)
    return model.eval()


def _both_ways(
    rows: Sequence[dict[str, Any]], media: Sequence[tuple[Tensor, ...]]
) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts with their video, and without."""
    with_video = [Prompt(text=row["question"], media=rows_of) for row, rows_of in zip(rows, media, strict=True)]
    return with_video, [Prompt(text=row["question"]) for row in rows]


def _span_score(text: str, row: dict[str, Any]) -> float:
    """Temporal IoU; an answer without an interval scores 0."""
    span = parse_span(text)
    return 0.0 if span is None else temporal_iou(span, Span(row["start_seconds"], row["end_seconds"]))


def _unanswered(question: dict[str, Any], status: Status) -> Outcome:
    return Outcome(
        sample_id=question["sample_id"],
        task=question["source"],
        status=status,
        expected=question["answer"],
        answer="",
        answer_without_video="",
        score=0.0,
        score_without_video=0.0,
        chance=None,
    )
