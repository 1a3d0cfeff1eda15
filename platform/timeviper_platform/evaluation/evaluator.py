"""Scores answers to questions with and without their video. Does not import Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from timeviper_model.batching.prompt import TimeText, time_text
from timeviper_model.layers.backends import Backend, set_backend
from timeviper_model.timeviper import TimeViper
from timeviper_model.weights import weights_folder as weights
from timeviper_model.weights.metadata import trained_time_text
from timeviper_platform.common.devices import Dtype, torch_device, torch_dtype
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.evaluation.answering import DEFAULT_MAX_PACK_TOKENS, Answerer, Prompt
from timeviper_platform.evaluation.metrics import Span, parse_span, temporal_iou

Question = dict[str, Any]
"""A QUESTIONS row."""
_Entry = tuple[int, Question, Prompt]
Status = Literal["ok", "no_features", "no_answer_format"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AnsweringConfig:
    max_frames: int | None = 256
    """Maximum frames per video; null = all. The paper uses 256."""
    frame_selection: Literal["uniform", "first"] = "uniform"
    """Frames to keep of a longer video. The paper takes the first."""
    max_new_tokens: int = 32
    """Maximum tokens per free answer."""
    max_pack_tokens: int = DEFAULT_MAX_PACK_TOKENS
    """Maximum tokens per pack of (question, option) pairs."""
    dtype: Dtype = "float32"
    """Type of weights and features."""
    device: str = "cpu"
    """PyTorch device."""
    backend: Backend = "auto"
    """Implementation of scans, convolutions and attention."""
    num_threads: int = 1
    """PyTorch threads per worker."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    sample_id: str
    task: str
    status: Status
    """no_features: unknown medium; no_answer_format: neither choices nor a clip."""
    expected: str
    answer: str
    """Likeliest option, or generated text."""
    answer_without_video: str
    score: float
    """1 or 0 for choices; temporal IoU for grounding."""
    score_without_video: float
    chance: float | None
    """1 / number of choices."""


class Evaluator:
    def __init__(self, *, weights_folder: str, feature_store: str, config: AnsweringConfig) -> None:
        torch.set_num_threads(config.num_threads)
        self._config = config
        self._time_text = trained_time_text(weights_folder)
        self._store = FeatureStore.open(feature_store)
        model = load_model(weights_folder, config)
        self._dim = model.config.vision.row_size
        self._answerer = Answerer(model, weights.load_tokenizer(weights_folder), max_pack_tokens=config.max_pack_tokens)

    def evaluate(self, questions: Sequence[Question]) -> list[Outcome]:
        """Returns one outcome per question, in order.

        Raises:
            ValueError: for features of the wrong width.
        """
        outcomes: dict[int, Outcome] = {}
        with_choices: list[_Entry] = []
        with_spans: list[_Entry] = []
        for index, question in enumerate(questions):
            prompt = read_prompt(self._store, question, self._config, dim=self._dim, trained=self._time_text)
            if prompt is None:
                outcomes[index] = _outcome(question, "no_features")
            elif question["choices"]:
                with_choices.append((index, question, prompt))
            elif question["start_seconds"] is not None and question["end_seconds"] is not None:
                with_spans.append((index, question, prompt))
            else:
                outcomes[index] = _outcome(question, "no_answer_format")
        outcomes |= _answer(with_choices, self._choose)
        outcomes |= _answer(with_spans, self._generate)
        return [outcomes[index] for index in range(len(questions))]

    def _choose(self, questions: Sequence[Question], prompts: Sequence[Prompt]) -> list[str]:
        options = [question["choices"] for question in questions]
        scores = self._answerer.score_options(prompts, options)
        return [texts[row.index(max(row))] for texts, row in zip(options, scores, strict=True)]

    def _generate(self, questions: Sequence[Question], prompts: Sequence[Prompt]) -> list[str]:
        return self._answerer.generate(prompts, max_new_tokens=self._config.max_new_tokens)


def read_prompt(
    store: FeatureStore, question: Question, config: AnsweringConfig, *, dim: int, trained: TimeText
) -> Prompt | None:
    """Returns the prompt as in training; None when the store lacks a medium.

    Args:
        trained: prompts of the training that state the length of their video. Questions with an interval for an answer
            are the temporal ones.

    Raises:
        ValueError: for features of the wrong width.
    """
    media = read_media(store, question, config, dim=dim)
    if media is None:
        return None
    time_texts: list[str] = []
    if trained == "always" or (trained == "temporal" and question["start_seconds"] is not None):
        for medium, rows in zip(question["media"] or [], media, strict=True):
            info = store.info(medium["media_id"])
            seconds = info.clip_seconds(medium["start_seconds"], medium["end_seconds"])
            is_video, num_frames = info.modality == "video", len(rows) // info.num_tokens_per_frame
            time_texts.append(time_text(seconds, num_frames) if is_video else "")
    return Prompt(text=question["question"], media=media, time_texts=tuple(time_texts))


def read_media(
    store: FeatureStore, question: Question, config: AnsweringConfig, *, dim: int
) -> tuple[Tensor, ...] | None:
    """Returns (tokens, dim) rows per medium; None when the store lacks one.

    Raises:
        ValueError: for features of the wrong width.
    """
    media = []
    for medium in question["media"] or []:
        if medium["media_id"] not in store:
            return None
        info = store.info(medium["media_id"])
        if info.dim != dim:
            raise ValueError(
                f"{medium['media_id']} has features of width {info.dim}, the weights need {dim};"
                " evaluate on a store that the weights' own vision encoder filled"
            )
        frames = info.select(
            max_frames=config.max_frames,
            frame_selection=config.frame_selection,
            start_seconds=medium["start_seconds"],
            end_seconds=medium["end_seconds"],
        )
        media.append(store.read(medium["media_id"], frames).features.flatten(0, 1))
    return tuple(media)


def load_model(weights_folder: str, config: AnsweringConfig) -> TimeViper:
    device, dtype = str(torch_device(config.device)), torch_dtype(config.dtype)
    model = weights.from_pretrained(weights_folder, dtype=dtype, device=device)
    set_backend(model, config.backend, device=device, dtype=dtype)
    return model.eval()


def _answer(
    entries: Sequence[_Entry], answer: Callable[[Sequence[Question], Sequence[Prompt]], list[str]]
) -> dict[int, Outcome]:
    if not entries:
        return {}
    questions = [question for _, question, _ in entries]
    answers = answer(questions, [prompt for _, _, prompt in entries])
    answers_without_video = answer(questions, [Prompt(text=question["question"]) for question in questions])
    return {
        index: _outcome(question, "ok", text, text_without_video)
        for (index, question, _), text, text_without_video in zip(entries, answers, answers_without_video, strict=True)
    }


def _outcome(question: Question, status: Status, answer: str = "", answer_without_video: str = "") -> Outcome:
    is_answered, choices = status == "ok", question["choices"]
    return Outcome(
        sample_id=question["sample_id"],
        task=question["source"],
        status=status,
        expected=question["answer"],
        answer=answer,
        answer_without_video=answer_without_video,
        score=_score(answer, question) if is_answered else 0.0,
        score_without_video=_score(answer_without_video, question) if is_answered else 0.0,
        chance=1 / len(choices) if is_answered and choices else None,
    )


def _score(answer: str, question: Question) -> float:
    if question["choices"]:
        return float(answer == question["answer"])
    span = parse_span(answer)
    return 0.0 if span is None else temporal_iou(span, Span(question["start_seconds"], question["end_seconds"]))
