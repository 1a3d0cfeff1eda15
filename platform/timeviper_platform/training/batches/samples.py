"""Rows of SAMPLES joined with a feature store: each becomes a tokenised Sample and the frames it takes.

Knows conversations and which frames a sample takes. Reads the store's index and never its features; does not know files
(sample_rows.py), packs, steps or ranks, nor what the rows' sizes are for (sample_table.py). A row that cannot be used
is a counted reject with a reason, and no other row takes its place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from timeviper_model.batching.batch import IGNORE_INDEX, Sample
from timeviper_model.batching.prompt import TEMPLATES, Turn, build_sample, time_text
from timeviper_platform.data.store.reader import FeatureStore

MEMO_TEXTS = 65_536
"""Texts whose ids are remembered; templates and stock questions come again in every sample."""

RejectReason = Literal[
    "bad_weight",
    "no_features",
    "no_frames",
    "bad_media",
    "bad_conversation",
    "no_targets",
    "too_long",
    "too_many_frames",
    "damaged_features",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class FramesConfig:
    """Which of a medium's stored frames a sample takes."""

    max_frames: int | None = None
    """thin every medium to at most this many frames; None keeps all"""
    selection: Literal["uniform", "first"] = "uniform"
    """how to thin; the paper trains with `uniform`"""
    time_text: bool = False
    """open a sample that has exactly one video with the sentence that tells its length and number of frames"""


class MediaFrames(NamedTuple):
    """The frames of one medium that a sample takes."""

    media_id: str
    frames: list[int]


class TokenizedSample(NamedTuple):
    """One usable row."""

    sample: Sample
    media: list[MediaFrames]

    @property
    def num_frames(self) -> int:
        """Frames over all media."""
        return sum(len(item.frames) for item in self.media)


class Reject(NamedTuple):
    """One row that is left out, and why."""

    sample_id: str
    reason: RejectReason
    detail: str


class SampleBuilder:
    """Builds the same Sample from the same row, for the plan (its length) and for the loader (its tokens).

    Args:
        store: the feature store that the rows' media are in.
        tokenizer: a transformers fast tokenizer.
        chat_template: key of timeviper_model.batching.prompt.TEMPLATES.
        frames: which frames a sample takes.
    """

    def __init__(self, store: FeatureStore, tokenizer: Any, chat_template: str, frames: FramesConfig) -> None:
        self.store = store
        self._tokenizer = _MemoTokenizer(tokenizer)
        self._template = TEMPLATES[chat_template]
        self._frames = frames

    def build(self, row: dict[str, Any]) -> TokenizedSample | Reject:
        """The row's tokens and frames, or why it cannot be used."""
        media = []
        num_tokens = []
        for item in row["media"] or []:
            chosen = self._select(item)
            if not isinstance(chosen, MediaFrames):
                return Reject(row["sample_id"], *chosen)
            media.append(chosen)
            num_tokens.append(len(chosen.frames) * self.store.info(chosen.media_id).num_tokens_per_frame)
        try:
            turns = [Turn(role=turn["role"], text=turn["text"] or "") for turn in row["conversation"] or []]
            turns = self._with_time_text(turns, media)
            sample = build_sample(self._tokenizer, turns, num_tokens, template=self._template)
        except ValueError as error:
            return Reject(row["sample_id"], "bad_conversation", str(error))
        if sample.labels.count(IGNORE_INDEX) == len(sample):
            return Reject(row["sample_id"], "no_targets", "the conversation has no answer to learn from")
        return TokenizedSample(sample, media)

    def digest(self) -> str:
        """Hash of all that the sizes of a row's sample depend on, besides the row."""
        parts = {
            "tokenizer": self._tokenizer.digest(),
            "template": asdict(self._template),
            "frames": asdict(self._frames),
            "store": [self.store.recipe_hash, self.store.index_digest()],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _select(self, item: dict[str, Any]) -> MediaFrames | tuple[RejectReason, str]:
        media_id, start, end = item["media_id"], item["start_seconds"], item["end_seconds"]
        if media_id not in self.store:
            return "no_features", f"medium {media_id!r} is not in {self.store.uri}"
        try:
            frames = self.store.info(media_id).select(
                max_frames=self._frames.max_frames,
                frame_selection=self._frames.selection,
                start_seconds=start,
                end_seconds=end,
            )
        except ValueError as error:
            return "bad_media", f"medium {media_id!r}: {error}"
        if not frames:
            return "no_frames", f"medium {media_id!r} has no frame in {start}..{end} s"
        return MediaFrames(media_id, frames)

    def _with_time_text(self, turns: list[Turn], media: list[MediaFrames]) -> list[Turn]:
        first = next((number for number, turn in enumerate(turns) if turn.role == "user"), None)
        if not self._frames.time_text or len(media) != 1 or first is None:
            return turns
        info = self.store.info(media[0].media_id)
        if info.modality != "video":
            return turns
        sentence = time_text(info.duration_seconds, len(media[0].frames))
        return [*turns[:first], Turn(role="user", text=sentence + turns[first].text), *turns[first + 1 :]]


class _MemoTokenizer:
    """Looks like the tokenizer to `build_sample`, which calls it from one thread at a time; remembers the ids of texts
    that come again."""

    def __init__(self, tokenizer: Any) -> None:
        self.pad_token_id = tokenizer.pad_token_id
        self._tokenizer = tokenizer

        @lru_cache(maxsize=MEMO_TEXTS)
        def encode(text: str, split_special_tokens: bool) -> tuple[int, ...]:
            encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=split_special_tokens)
            return tuple(encoded["input_ids"])

        self._encode = encode

    def __reduce__(self) -> tuple[Any, ...]:
        return _MemoTokenizer, (self._tokenizer,)

    def __call__(self, text: str, *, add_special_tokens: bool, split_special_tokens: bool) -> dict[str, Sequence[int]]:
        if add_special_tokens:
            raise ValueError("prompts write their special tokens out")
        return {"input_ids": self._encode(text, split_special_tokens)}

    def digest(self) -> str:
        """Hash of the tokenizer's rules and vocabulary."""
        return hashlib.sha256(self._tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
