"""Scores answers to questions with and without their video. Does not import Ray."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from timeviper_model.batching.prompt import MEDIA_MARKER, TimeText, time_text
from timeviper_model.layers.backends import Backend, set_backend
from timeviper_model.timeviper import TimeViper
from timeviper_model.weights import weights_folder as weights
from timeviper_model.weights.metadata import trained_time_text
from timeviper_platform.common.devices import Dtype, torch_device, torch_dtype
from timeviper_platform.common.machine_cache import local_copy
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.evaluation.answering import (
    DEFAULT_MAX_PACK_TOKENS,
    DEFAULT_PREFIX_CACHE_BYTES,
    Answerer,
    Prompt,
)
from timeviper_platform.evaluation.outcomes import Outcome, Question, Status, question_hash
from timeviper_platform.evaluation.scoring.spans import Span, parse_span, temporal_iou

logger = logging.getLogger(__name__)


class QuestionFault(Exception):
    """A question that cannot be scored."""

    def __init__(self, status: Status, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


@dataclass(frozen=True, kw_only=True, slots=True)
class AnsweringConfig:
    max_frames: int | None = 256
    """Maximum frames per video; null = all. The paper uses 256."""
    frame_selection: Literal["uniform", "first"] = "uniform"
    """Frames to keep of a longer video. The paper takes the first."""
    max_new_tokens: int = 32
    """Maximum tokens per free answer."""
    max_pack_tokens: int = DEFAULT_MAX_PACK_TOKENS
    """Maximum tokens of (question, option) pairs that are scored together."""
    prefix_cache_bytes: int = DEFAULT_PREFIX_CACHE_BYTES
    """Maximum bytes of states after a video, kept for further questions about it."""
    dtype: Dtype = "float32"
    """Type of weights and features."""
    device: str = "cpu"
    """PyTorch device."""
    backend: Backend = "auto"
    """Implementation of scans, convolutions and attention."""
    num_threads: int = 1
    """PyTorch threads per worker."""


class OpenAnswerer(NamedTuple):
    store: FeatureStore
    answerer: Answerer
    dim: int
    """Width of the features."""
    time_text: TimeText
    """Which training prompts stated the length of their video."""


def open_answerer(weights_folder: str, feature_store: str, config: AnsweringConfig) -> OpenAnswerer:
    """Loads weights at any URI into this process, and opens the store."""
    torch.set_num_threads(config.num_threads)
    weights_folder = local_copy(weights_folder)
    model = load_model(weights_folder, config)
    answerer = Answerer(
        model,
        weights.load_tokenizer(weights_folder),
        max_pack_tokens=config.max_pack_tokens,
        prefix_cache_bytes=config.prefix_cache_bytes,
    )
    store, time_text = FeatureStore.open(feature_store), trained_time_text(weights_folder)
    return OpenAnswerer(store, answerer, model.config.vision.row_size, time_text)


class Evaluator:
    def __init__(self, *, weights_folder: str, feature_store: str, config: AnsweringConfig) -> None:
        """`weights_folder` may be any URI."""
        self._config = config
        self._store, self._answerer, self._dim, self._time_text = open_answerer(weights_folder, feature_store, config)

    def evaluate(self, questions: Sequence[Question]) -> list[Outcome]:
        """Returns one outcome per question, in order; a question that fails has the status of its cause.

        Raises:
            ValueError: for features of the wrong width.
        """
        outcomes: dict[int, Outcome] = {}
        with_choices: list[int] = []
        with_spans: list[int] = []
        prompts: dict[int, Prompt] = {}
        for index, question in enumerate(questions):
            try:
                prompts[index] = self._prompt(question)
            except QuestionFault as fault:
                outcomes[index] = _outcome(question, fault.status, detail=fault.detail)
            else:
                (with_choices if question["choices"] else with_spans).append(index)
        for indices, answer in ((with_choices, self._choose), (with_spans, self._generate)):
            outcomes |= _answer([(index, questions[index], prompts[index]) for index in indices], answer)
        return [outcomes[index] for index in range(len(questions))]

    def _prompt(self, question: Question) -> Prompt:
        check_truth(question, self._store)
        return read_prompt(self._store, question, self._config, dim=self._dim, trained=self._time_text)

    def _choose(self, questions: Sequence[Question], prompts: Sequence[Prompt]) -> list[str]:
        options = [question["choices"] for question in questions]
        scores = self._answerer.score_options(prompts, options)
        return [texts[row.index(max(row))] for texts, row in zip(options, scores, strict=True)]

    def _generate(self, questions: Sequence[Question], prompts: Sequence[Prompt]) -> list[str]:
        return self._answerer.generate(prompts, max_new_tokens=self._config.max_new_tokens)


def check_truth(question: Question, store: FeatureStore) -> None:
    """Raises QuestionFault for a question whose expected answer cannot be right."""
    if choices := question["choices"]:
        if question["answer"] not in choices or None in choices:
            raise QuestionFault("answer_is_no_choice", f"{question['answer']!r:.80} is not one of {choices!r:.200}")
        return
    start, end = question["start_seconds"], question["end_seconds"]
    if start is None or end is None:
        raise QuestionFault("no_answer_format", "the question has neither choices nor start_seconds and end_seconds")
    known = [store.info(medium["media_id"]) for medium in question["media"] or [] if medium["media_id"] in store]
    duration = max((info.duration_seconds for info in known), default=float("inf"))
    if not 0 <= start < end or start >= duration:
        raise QuestionFault("bad_times", f"the expected interval {start}..{end} s is not in a video of {duration:g} s")


def read_prompt(
    store: FeatureStore, question: Question, config: AnsweringConfig, *, dim: int, trained: TimeText
) -> Prompt:
    """Returns the prompt as in training.

    Args:
        trained: training prompts that stated the length of their video. Questions with an interval for an answer count
            as temporal.

    Raises:
        QuestionFault: see `read_media`.
        ValueError: for features of the wrong width.
    """
    media = read_media(store, question, config, dim=dim)
    time_texts: list[str] = []
    if trained == "always" or (trained == "temporal" and question["start_seconds"] is not None):
        for medium, rows in zip(question["media"] or [], media, strict=True):
            info = store.info(medium["media_id"])
            seconds = info.clip_seconds(medium["start_seconds"], medium["end_seconds"])
            is_video, num_frames = info.modality == "video", len(rows) // info.num_tokens_per_frame
            time_texts.append(time_text(seconds, num_frames) if is_video else "")
    key = json.dumps(question["media"], sort_keys=True) if media else None
    return Prompt(text=question["question"], media=media, time_texts=tuple(time_texts), media_key=key)


def read_media(store: FeatureStore, question: Question, config: AnsweringConfig, *, dim: int) -> tuple[Tensor, ...]:
    """Returns (tokens, dim) rows per medium.

    Raises:
        QuestionFault: when the store lacks a medium, a clip has no frames, or features cannot be read.
        ValueError: for features of the wrong width.
    """
    media = []
    for medium in question["media"] or []:
        media_id, start, end = medium["media_id"], medium["start_seconds"], medium["end_seconds"]
        if media_id not in store:
            raise QuestionFault("no_features", f"medium {media_id!r} is not in the feature store")
        info = store.info(media_id)
        if info.dim != dim:
            raise ValueError(
                f"{media_id} has features of width {info.dim}, the weights need {dim};"
                " evaluate on a store that the weights' own vision encoder filled"
            )
        if start is not None and end is not None and not start < end:
            raise QuestionFault("bad_times", f"the clip {start}..{end} s of {media_id} ends before it starts")
        frames = info.select(
            max_frames=config.max_frames,
            frame_selection=config.frame_selection,
            start_seconds=start,
            end_seconds=end,
        )
        if not frames:
            clip = f"{start}..{end} s of {info.duration_seconds:g} s"
            raise QuestionFault("no_frames", f"{media_id} has no frame in the clip {clip}")
        try:
            media.append(store.read(media_id, frames).features.flatten(0, 1))
        except (RuntimeError, OSError) as error:
            raise QuestionFault("failed", f"{media_id}: {error}") from error
    return tuple(media)


def load_model(weights_folder: str, config: AnsweringConfig) -> TimeViper:
    device, dtype = str(torch_device(config.device)), torch_dtype(config.dtype)
    model = weights.from_pretrained(weights_folder, dtype=dtype, device=device)
    set_backend(model, config.backend, device=device, dtype=dtype)
    return model.eval()


_Entry = tuple[int, Question, Prompt]
_AnswerQuestions = Callable[[Sequence[Question], Sequence[Prompt]], list[str]]


def _answer(entries: Sequence[_Entry], answer: _AnswerQuestions) -> dict[int, Outcome]:
    """Answers with and without media. After an error, answers each question alone, so that only a faulty one fails."""
    if not entries:
        return {}
    questions = [question for _, question, _ in entries]
    try:
        answers = answer(questions, [prompt for _, _, prompt in entries])
        texts = [question["question"].replace(MEDIA_MARKER, "") for question in questions]
        answers_without_video = answer(questions, [Prompt(text=text) for text in texts])
    except Exception as error:  # of one question, which must not end the evaluation; many failures do
        if len(entries) == 1:
            ((index, question, _),) = entries
            logger.warning("%s %s failed", question["source"], question["sample_id"], exc_info=error)
            return {index: _outcome(question, "failed", detail=f"{type(error).__name__}: {error}")}
    else:
        return {
            index: _outcome(question, _status(question, text), text, text_without_video)
            for (index, question, _), text, text_without_video in zip(
                entries, answers, answers_without_video, strict=True
            )
        }
    outcomes: dict[int, Outcome] = {}
    for entry in entries:
        outcomes |= _answer([entry], answer)
    return outcomes


def _status(question: Question, answer: str) -> Status:
    return "ok" if question["choices"] or parse_span(answer) is not None else "unparsable"


def _outcome(
    question: Question, status: Status, answer: str = "", answer_without_video: str = "", *, detail: str = ""
) -> Outcome:
    is_answered, choices = not detail, question["choices"]
    return Outcome(
        question_hash=question_hash(question),
        sample_id=question["sample_id"],
        task=question["source"],
        video=" ".join(medium["media_id"] for medium in question["media"] or []),
        status=status,
        detail=detail,
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
