"""Answers a benchmark's questions about stored features, each video read once. Does not import Ray."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pyarrow as pa
from torch import Tensor

from timeviper_model.batching.prompt import MEDIA_MARKER, time_text
from timeviper_platform.data.store.reader import MediaInfo
from timeviper_platform.evaluation.answering import Prompt
from timeviper_platform.evaluation.benchmarks.prompts import PromptStyle, build_prompt, option_lines
from timeviper_platform.evaluation.benchmarks.question import BenchmarkQuestion, question_of
from timeviper_platform.evaluation.benchmarks.registry import BenchmarkName
from timeviper_platform.evaluation.benchmarks.subtitles import subtitle_text
from timeviper_platform.evaluation.evaluator import AnsweringConfig, open_answerer
from timeviper_platform.evaluation.outcomes import hash_of
from timeviper_platform.evaluation.protocols import Protocol, protocol_frames

logger = logging.getLogger(__name__)

AnswerStatus = Literal["ok", "no_features", "no_frames", "failed"]
"""no_features: the store lacks the video; no_frames: the clip has none; failed: see `detail`, tried again next time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkTask:
    question: BenchmarkQuestion
    protocol: Protocol

    @property
    def task_hash(self) -> str:
        return hash_of([asdict(self.question), self.protocol])


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkAnswer:
    """A raw answer, before any scoring."""

    task_hash: str
    question: str
    """The BenchmarkQuestion as JSON, so that answers can be scored without the benchmark's files."""
    protocol: Protocol
    status: AnswerStatus
    detail: str = ""
    answer: str = ""
    option_log_probs: tuple[float, ...] = ()
    """Of each option as the whole answer."""
    media_id: str = ""
    frame_seconds: tuple[float, ...] = ()
    """PTS of up to 8 of the frames, for reports."""
    num_frames: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Prompt tokens that an earlier question about the same video had read."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> BenchmarkAnswer:
        values = {name: row[name] for name in BENCHMARK_ANSWERS.names}
        for name in ("option_log_probs", "frame_seconds"):
            values[name] = tuple(values[name])
        return cls(**values)

    def asked(self) -> BenchmarkQuestion:
        return question_of(json.loads(self.question))


BENCHMARK_ANSWERS = pa.schema(
    [
        pa.field("task_hash", pa.string()),
        pa.field("question", pa.string()),
        pa.field("protocol", pa.string()),
        pa.field("status", pa.string()),
        pa.field("detail", pa.string()),
        pa.field("answer", pa.string()),
        pa.field("option_log_probs", pa.list_(pa.float64())),
        pa.field("media_id", pa.string()),
        pa.field("frame_seconds", pa.list_(pa.float64())),
        pa.field("num_frames", pa.int32()),
        pa.field("num_prompt_tokens", pa.int32()),
        pa.field("num_cached_tokens", pa.int32()),
    ]
)

NUM_SHOWN_FRAMES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """What the model sees of a clip."""

    media_id: str
    info: MediaInfo
    frames: tuple[int, ...]
    rows: Tensor
    """(tokens, dim)"""
    seconds: float
    """Length of the clip."""


class _Missing(Exception):
    def __init__(self, status: AnswerStatus, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


class BenchmarkAnswerer:
    """Answers tasks in one process.

    Args:
        weights_folder: any URI.
        media_prefix: path from the preprocessed folder to the benchmark's folder.
        scores_options: whether to compute the options' log-probabilities.
    """

    def __init__(
        self,
        *,
        weights_folder: str,
        feature_store: str,
        config: AnsweringConfig,
        benchmark: BenchmarkName,
        prompts: PromptStyle,
        media_prefix: str = "",
        scores_options: bool = True,
    ) -> None:
        self._config, self._benchmark, self._style = config, benchmark, prompts
        self._media_prefix, self._scores_options = media_prefix, scores_options
        self._store, self._answerer, self._dim, self._time_text = open_answerer(weights_folder, feature_store, config)

    def answer(self, tasks: Sequence[BenchmarkTask]) -> list[BenchmarkAnswer]:
        """Returns one answer per task, in order. Tasks about one clip should be neighbours.

        Raises:
            ValueError: for features of the wrong width.
        """
        answers: list[BenchmarkAnswer] = []
        for group in _neighbours(tasks):
            try:
                seen = None if group[0].protocol == "without_video" else self._see(group[0])
            except _Missing as missing:
                answers += [_failed(task, missing.status, missing.detail) for task in group]
            else:
                answers += self._answer_together(group, seen)
        return answers

    def _answer_together(self, tasks: Sequence[BenchmarkTask], seen: _Seen | None) -> list[BenchmarkAnswer]:
        """After an error, answers each question alone, so that only the faulty one fails."""
        try:
            prompts = [self._prompt(task.question, seen) for task in tasks]
            options = [option_lines(task.question) if self._scores_options else () for task in tasks]
            found = self._answerer.answer(prompts, options, max_new_tokens=self._config.max_new_tokens)
        except Exception as error:  # of one question, which must not end the evaluation; many failures do
            if len(tasks) > 1:
                return [answer for task in tasks for answer in self._answer_together([task], seen)]
            logger.warning("%s failed", tasks[0].question.question_id, exc_info=error)
            return [_failed(tasks[0], "failed", f"{type(error).__name__}: {error}")]
        return [
            BenchmarkAnswer(
                task_hash=task.task_hash,
                question=json.dumps(asdict(task.question)),
                protocol=task.protocol,
                status="ok",
                answer=answer.text,
                option_log_probs=answer.option_log_probs,
                media_id="" if seen is None else seen.media_id,
                frame_seconds=() if seen is None else _shown_seconds(seen),
                num_frames=0 if seen is None else len(seen.frames),
                num_prompt_tokens=answer.num_prompt_tokens,
                num_cached_tokens=answer.num_cached_tokens,
            )
            for task, answer in zip(tasks, found, strict=True)
        ]

    def _see(self, task: BenchmarkTask) -> _Seen:
        clip = task.question.clip
        own_id, whole_id = clip.media_ids(self._media_prefix)
        start, end = clip.start_seconds, clip.end_seconds
        if own_id in self._store:  # preprocessed as a clip of its own
            media_id, start, end = own_id, None, None
        elif whole_id in self._store:
            media_id = whole_id
        else:
            raise _Missing("no_features", f"the feature store lacks {clip.path}")
        info = self._store.info(media_id)
        if info.dim != self._dim:
            raise ValueError(
                f"{media_id} has features of width {info.dim}, the weights need {self._dim};"
                " evaluate on a store that the weights' own vision encoder filled"
            )
        try:
            frames = protocol_frames(
                info, task.protocol, max_frames=self._config.max_frames, start_seconds=start, end_seconds=end
            )
        except ValueError as error:
            raise _Missing("no_frames", f"{clip.path}: {error}") from error
        if not frames:
            raise _Missing("no_frames", f"{clip.path} has no frame in {start}..{end} s of {info.duration_seconds:g} s")
        try:
            rows = self._store.read(media_id, frames).features.flatten(0, 1)
        except (RuntimeError, OSError) as error:
            raise _Missing("failed", f"{clip.path}: {error}") from error
        seconds = info.clip_seconds(start, end)
        return _Seen(media_id=media_id, info=info, frames=tuple(frames), rows=rows, seconds=seconds)

    def _prompt(self, question: BenchmarkQuestion, seen: _Seen | None) -> Prompt:
        seconds = question.duration_seconds or (0.0 if seen is None else seen.seconds)
        subtitles = ""
        if question.subtitles and seen is not None:
            subtitles = subtitle_text(
                question.subtitles,
                seen.info.pts_seconds[list(seen.frames)].tolist(),
                start_seconds=question.subtitles_start_seconds,
                duration_seconds=seconds,
            )
        prompt = build_prompt(
            self._benchmark,
            question,
            self._style,
            duration=question.duration or f"{seconds:.2f}",
            num_frames=0 if seen is None else len(seen.frames),
            subtitles=subtitles,
        )
        text = prompt.text.replace(MEDIA_MARKER, "")
        if seen is None:
            return Prompt(text=text, system=prompt.system, answer_prefix=prompt.answer_prefix)
        states_length = self._time_text == "always" and question.kind not in ("span", "windows", "dense")
        return Prompt(
            text=text,
            media=(seen.rows,),
            time_texts=(time_text(seen.seconds, len(seen.frames)),) if states_length else (),
            media_key=(seen.media_id, seen.frames),
            system=prompt.system,
            answer_prefix=prompt.answer_prefix,
        )


def _neighbours(tasks: Iterable[BenchmarkTask]) -> list[list[BenchmarkTask]]:
    """Groups consecutive tasks that have the same clip and protocol."""
    groups: list[list[BenchmarkTask]] = []
    for task in tasks:
        last = groups[-1][-1] if groups else None
        if last is not None and (last.question.clip, last.protocol) == (task.question.clip, task.protocol):
            groups[-1].append(task)
        else:
            groups.append([task])
    return groups


def _shown_seconds(seen: _Seen) -> tuple[float, ...]:
    """Spread from the first frame to the last."""
    last, count = len(seen.frames) - 1, min(len(seen.frames), NUM_SHOWN_FRAMES)
    shown = [seen.frames[round(number * last / max(1, count - 1))] for number in range(count)]
    return tuple(float(seen.info.pts_seconds[frame]) for frame in shown)


def _failed(task: BenchmarkTask, status: AnswerStatus, detail: str) -> BenchmarkAnswer:
    return BenchmarkAnswer(
        task_hash=task.task_hash,
        question=json.dumps(asdict(task.question)),
        protocol=task.protocol,
        status=status,
        detail=detail,
    )
