"""Answers about videos that are named by path and were preprocessed before. Does not import lmms-eval."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from torch import Tensor

from timeviper_model.batching.prompt import MEDIA_MARKER, time_text
from timeviper_platform.common import storage
from timeviper_platform.common.config import absolute_path
from timeviper_platform.data.media.medium import media_id_of
from timeviper_platform.evaluation.answering import Answer, Prompt
from timeviper_platform.evaluation.evaluator import AnsweringConfig, open_answerer
from timeviper_platform.evaluation.protocols import protocol_frames

FrameProtocol = Literal["paper", "whole"]

NUM_TOGETHER = 16
"""Prompts that are answered together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredVideo:
    path: str
    """Local path or URI."""
    start_seconds: float | None = None
    end_seconds: float | None = None

    @property
    def is_part(self) -> bool:
        return self.start_seconds is not None or self.end_seconds is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A question with its videos, in the order of the prompt."""

    parts: tuple[str | StoredVideo, ...]
    system: str = ""

    @property
    def videos(self) -> tuple[StoredVideo, ...]:
        return tuple(part for part in self.parts if not isinstance(part, str))


class _Clip(NamedTuple):
    media_id: str
    frames: tuple[int, ...]
    seconds: float


class StoredVideoAnswerer:
    """Finds a path in the feature store by its address in the manifest, else by its path below `media_root`.

    See `TimeViperSimple` for the arguments.
    """

    def __init__(
        self,
        *,
        weights: str,
        feature_store: str,
        config: AnsweringConfig,
        protocol: FrameProtocol = "paper",
        media_root: str = "",
        answer_prefix: str = "",
    ) -> None:
        if protocol not in ("paper", "whole"):
            raise ValueError(f"{protocol = } must be paper or whole")
        self._config, self._protocol, self._answer_prefix = config, protocol, answer_prefix
        self._media_root = absolute_path(media_root) if media_root else ""
        self._store, self._answerer, self._dim, self._time_text = open_answerer(weights, feature_store, config)

    def check(self, asked: Sequence[Asked]) -> None:
        """Raises ValueError if a video is missing, a clip has no frames, or features have the wrong width."""
        for video in dict.fromkeys(part for question in asked for part in question.parts if not isinstance(part, str)):
            self._see(video)

    def generate(self, asked: Sequence[Asked], *, max_new_tokens: int) -> Iterator[tuple[int, Answer]]:
        """Yields greedy answers with their indices, those about the same videos together."""
        for members, prompts in self._groups(asked):
            answers = self._answerer.answer(prompts, [()] * len(prompts), max_new_tokens=max_new_tokens)
            yield from zip(members, answers, strict=True)

    def losses(self, asked: Sequence[Asked], continuations: Sequence[str]) -> Iterator[tuple[int, float, bool]]:
        """Yields index, loss, and whether greedy decoding gives the continuation.

        The loss is the mean negative log-likelihood of its tokens, end token included.
        """
        for members, prompts in self._groups(asked):
            texts = [continuations[index].strip() for index in members]
            lengths = [
                len(self._answerer.sample(prompt, text)) - len(self._answerer.sample(prompt, None))
                for prompt, text in zip(prompts, texts, strict=True)
            ]
            answers = self._answerer.answer(prompts, [(text,) for text in texts], max_new_tokens=max(lengths))
            for index, text, length, answer in zip(members, texts, lengths, answers, strict=True):
                yield index, -answer.option_log_probs[0] / length, answer.text == text

    def _groups(self, asked: Sequence[Asked]) -> Iterator[tuple[list[int], list[Prompt]]]:
        """Yields indices and prompts, one group at a time, so that few features are in memory."""
        order = sorted(range(len(asked)), key=lambda index: str(asked[index].videos))
        for start in range(0, len(order), NUM_TOGETHER):
            members = order[start : start + NUM_TOGETHER]
            rows: dict[StoredVideo, Tensor] = {}
            yield members, [self._prompt(asked[index], rows) for index in members]

    def _prompt(self, asked: Asked, rows: dict[StoredVideo, Tensor]) -> Prompt:
        clips = [(video, self._see(video)) for video in asked.videos]
        for video, clip in clips:
            if video not in rows:
                rows[video] = self._store.read(clip.media_id, clip.frames).features.flatten(0, 1)
        text, after_text = "", False
        for part in asked.parts:
            if isinstance(part, str):
                text += ("\n" if after_text else "") + part.replace(MEDIA_MARKER, "")
            else:
                text += MEDIA_MARKER
            after_text = isinstance(part, str)
        lengths = [time_text(clip.seconds, len(clip.frames)) for _, clip in clips]
        return Prompt(
            text=text,
            media=tuple(rows[video] for video in asked.videos),
            time_texts=tuple(lengths) if self._time_text == "always" else (),
            media_key=tuple((clip.media_id, clip.frames) for _, clip in clips) or None,
            system=asked.system,
            answer_prefix=self._answer_prefix,
        )

    def _see(self, video: StoredVideo) -> _Clip:
        start, end = video.start_seconds, video.end_seconds
        if (media_id := self._find(video.path, start, end)) is not None:
            if video.is_part:  # preprocessed as a clip of its own
                start = end = None
        elif (media_id := self._find(video.path, None, None)) is None:
            raise ValueError(
                f"the feature store {self._store.uri} lacks {video.path}; preprocess it, or set media_root to the"
                " folder that was preprocessed"
            )
        info = self._store.info(media_id)
        if info.dim != self._dim:
            raise ValueError(f"{media_id} has features of width {info.dim}, the weights need {self._dim}")
        frames = protocol_frames(
            info, self._protocol, max_frames=self._config.max_frames, start_seconds=start, end_seconds=end
        )
        if not frames:
            raise ValueError(f"{video.path} has no frame in {start}..{end} s of {info.duration_seconds:g} s")
        return _Clip(media_id, tuple(frames), info.clip_seconds(start, end))

    def _find(self, path: str, start: float | None, end: float | None) -> str | None:
        uri = absolute_path(path)
        if start is None and end is None and (found := self._store.find_uri(uri)) is not None:
            return found
        if self._media_root and uri.startswith(f"{self._media_root}/"):
            media_id = media_id_of(uri.removeprefix(f"{self._media_root}/"), "", start, end)
            return media_id if media_id in self._store else None
        return None


def video_path(url: str) -> str:
    """'file:///a.mp4' and '/a.mp4' become '/a.mp4'; other URIs stay."""
    return str(Path(url.removeprefix("file://"))) if storage.is_local(url) else url
