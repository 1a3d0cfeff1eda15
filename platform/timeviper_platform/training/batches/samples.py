"""Turns SAMPLES rows into tokenized samples with frame indices, or into rejects."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from timeviper_model.batching.batch import IGNORE_INDEX, Sample
from timeviper_model.batching.prompt import PROMPT_VERSION, TimeText, Turn, add_time_texts, build_sample, time_text
from timeviper_model.batching.tokenizer_template import chat_template
from timeviper_platform.data.store.reader import FeatureStore

MAX_CACHED_TEXTS = 65_536
"""Maximum cached texts; templates and stock questions repeat."""

RejectReason = Literal[
    "bad_weight",
    "no_features",
    "no_frames",
    "bad_media",
    "bad_conversation",
    "empty_answer",
    "no_targets",
    "too_long",
    "too_many_frames",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class FramesConfig:
    """Frames that a sample takes from each medium."""

    max_frames: int | None = None
    """Maximum frames per medium; None keeps all."""
    frame_selection: Literal["uniform", "first"] = "uniform"
    """Frames to keep. The paper trains with `uniform`."""
    time_text: TimeText = "temporal"
    """Samples whose prompts state, after each video, the length of its clip and the number of frames. In the paper,
    grounding and dense captions (`temporal`)."""


class TokenizedSample(NamedTuple):
    sample: Sample
    media_ids: list[str]
    frames: list[list[int]]
    """Frame indices taken from each medium."""

    @property
    def num_frames(self) -> int:
        return sum(map(len, self.frames))

    @property
    def num_targets(self) -> int:
        """Labelled positions."""
        return len(self.sample) - self.sample.labels.count(IGNORE_INDEX)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(tokens, vision tokens, frames, targets)."""
        return len(self.sample), self.sample.num_vision_tokens, self.num_frames, self.num_targets


class Reject(NamedTuple):
    sample_id: str
    reason: RejectReason
    detail: str


class SampleBuilder:
    """Builds equal samples for the plan and the loader. `template` is the model configuration's `chat_template`."""

    def __init__(self, store: FeatureStore, tokenizer: Any, template: str, frames: FramesConfig) -> None:
        self.store = store
        self._tokenizer = _CachingTokenizer(tokenizer)
        self._template = chat_template(template, tokenizer)
        self._frames = frames

    def build(self, row: dict[str, Any]) -> TokenizedSample | Reject:
        media_ids, frames, num_tokens = [], [], []
        for item in row["media"] or []:
            chosen = self._select_frames(item)
            if not isinstance(chosen, list):
                return Reject(row["sample_id"], *chosen)
            media_ids.append(item["media_id"])
            frames.append(chosen)
            num_tokens.append(len(chosen) * self.store.info(item["media_id"]).num_tokens_per_frame)
        try:
            turns = [Turn(role=turn["role"], text=turn["text"] or "") for turn in row["conversation"] or []]
            if empty := [n for n, turn in enumerate(turns, 1) if turn.role == "assistant" and not turn.text.strip()]:
                return Reject(row["sample_id"], "empty_answer", f"turn {empty[0]} of {len(turns)} is an empty answer")
            if turns and (self._frames.time_text == "always" or self._frames.time_text == row.get("kind")):
                media = zip(row["media"] or [], frames, strict=True)
                turns = add_time_texts(turns, [self._time_text(*each) for each in media])
            sample = build_sample(self._tokenizer, turns, num_tokens, template=self._template)
        except ValueError as error:
            return Reject(row["sample_id"], "bad_conversation", str(error))
        tokenized = TokenizedSample(sample, media_ids, frames)
        if not tokenized.num_targets:
            return Reject(row["sample_id"], "no_targets", "the conversation has no answer to learn from")
        return tokenized

    def digest(self) -> str:
        """Returns a hash of everything but the row that determines sizes."""
        parts = {
            "tokenizer": self._tokenizer.digest(),
            "template": asdict(self._template),
            "prompt_version": PROMPT_VERSION,
            "frames": asdict(self._frames),
            "store": [self.store.recipe_hash, self.store.index_digest()],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _select_frames(self, item: dict[str, Any]) -> list[int] | tuple[RejectReason, str]:
        media_id, start, end = item["media_id"], item["start_seconds"], item["end_seconds"]
        if media_id not in self.store:
            return "no_features", f"medium {media_id!r} is not in {self.store.uri}"
        try:
            frames = self.store.info(media_id).select(
                max_frames=self._frames.max_frames,
                frame_selection=self._frames.frame_selection,
                start_seconds=start,
                end_seconds=end,
            )
        except ValueError as error:
            return "bad_media", f"medium {media_id!r}: {error}"
        if not frames:
            return "no_frames", f"medium {media_id!r} has no frame in {start}..{end} s"
        return frames

    def _time_text(self, item: dict[str, Any], frames: list[int]) -> str:
        info = self.store.info(item["media_id"])
        if info.modality != "video":
            return ""
        return time_text(info.clip_seconds(item["start_seconds"], item["end_seconds"]), len(frames))


class _CachingTokenizer:
    def __init__(self, tokenizer: Any) -> None:
        self.pad_token_id = tokenizer.pad_token_id
        self._tokenizer = tokenizer

        @lru_cache(maxsize=MAX_CACHED_TEXTS)
        def encode(text: str, split_special_tokens: bool) -> tuple[int, ...]:
            encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=split_special_tokens)
            return tuple(encoded["input_ids"])

        self._encode = encode

    def __reduce__(self) -> tuple[Any, ...]:
        return _CachingTokenizer, (self._tokenizer,)

    def __call__(self, text: str, *, add_special_tokens: bool, split_special_tokens: bool) -> dict[str, Sequence[int]]:
        if add_special_tokens:
            raise ValueError("prompts contain their special tokens as text; add_special_tokens must be False")
        return {"input_ids": self._encode(text, split_special_tokens)}

    def digest(self) -> str:
        return hashlib.sha256(self._tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
