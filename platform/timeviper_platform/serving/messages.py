"""What gateway, feature service and engine service say to each other: small frozen values, nothing but data.

Torch-free, so that the gateway stays small. A refusal is a value too, not an exception: it crosses processes without
a traceback in the log, which could hold a user's text.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from timeviper_model.inference.answer import SamplingParams, Usage

Modality = Literal["video", "image"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """Why a request is not served, with the HTTP status it becomes."""

    status: int
    message: str
    code: str
    param: str | None = None
    retry_after_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFeatures:
    """A medium that the preprocessing job has put into the feature store."""

    media_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaFile:
    """An uploaded file, under the name that the server gave it."""

    uri: str
    sha256: str
    modality: Modality


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaBytes:
    """A medium from inside the request (data: URI), as large as the request's body may be."""

    data: bytes
    sha256: str
    modality: Modality

    def __repr__(self) -> str:
        return f"MediaBytes({len(self.data)} bytes, {self.modality})"  # a user's picture has no place in a log


MediaSource = StoredFeatures | MediaFile | MediaBytes


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureRequest:
    """One medium to turn into features. The limits lower the server's own, never raise them."""

    source: MediaSource
    max_frames: int | None = None
    fps: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureReference:
    """Where the features of one medium are. The array itself stays in the object store."""

    key: str
    """names content, encoder recipe and frames, wherever the features were made: equal keys, equal features"""
    ref: Any
    """Ray object reference to int16 bits of bfloat16, (num_frames, num_tokens_per_frame, dim); an array in tests"""
    num_frames: int
    num_tokens_per_frame: int
    modality: Modality
    duration_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTurn:
    """One message; its media stand before its text, as in training."""

    role: Literal["system", "user", "assistant"]
    text: str
    media: tuple[FeatureReference, ...] = ()

    def __repr__(self) -> str:
        return f"ChatTurn({self.role}, {len(self.text)} characters, {len(self.media)} media)"


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateRequest:
    """`n` answers to one conversation."""

    tenant: str
    """whose request it is: what was kept of another tenant's video is never used, so its time betrays nothing"""
    turns: tuple[ChatTurn, ...]
    sampling: SamplingParams
    """Options of the first answer; the seeds of the others count up from its seed."""
    n: int = 1
    """Number of answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprob:
    """A token's text and log-probability, with alternatives."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerDelta:
    """A further piece of one of the answers; the last one has a reason and the usage."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: Literal["stop", "length"] | None = None
    usage: Usage | None = None

    def __repr__(self) -> str:
        return f"AnswerDelta({self.index}, {len(self.text)} characters, {self.finish_reason})"


class FeatureClient(Protocol):
    """The feature service as the gateway sees it."""

    async def features(self, request: FeatureRequest) -> FeatureReference | Refusal:
        """The medium's features, or why there are none."""

    async def is_ready(self) -> bool:
        """True when a replica answers."""


class EngineClient(Protocol):
    """The engine service as the gateway sees it."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[AnswerDelta | Refusal]:
        """Parts as they come; a Refusal is always the last item. Closing the iterator cancels the answers."""

    async def is_ready(self) -> bool:
        """True when a replica answers."""
