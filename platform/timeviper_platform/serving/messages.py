"""Messages between the gateway, the feature service and the engine service: frozen values, without torch.

A refusal is a message, not an exception: an exception would cross processes with a traceback, which may hold a user's
text.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from timeviper_model.inference.answer import SamplingParams, Usage

Modality = Literal["video", "image"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """Why a request is not served, with its HTTP status."""

    status: int
    message: str
    code: str
    param: str | None = None
    retry_after_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFeatures:
    """A medium in the feature store."""

    media_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaFile:
    """An uploaded file, under the server's name for it."""

    uri: str
    sha256: str
    modality: Modality


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaBytes:
    """A medium from a data: URI."""

    data: bytes
    sha256: str
    modality: Modality

    def __repr__(self) -> str:
        return f"MediaBytes({len(self.data)} bytes, {self.modality})"  # keeps a user's picture out of logs


MediaSource = StoredFeatures | MediaFile | MediaBytes


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureReference:
    """Vision features of one medium, by reference."""

    key: str
    """Hash of content, encoder recipe and frames: equal keys mean equal features."""
    ref: Any
    """Ray object reference to int16 bits of bfloat16, (num_frames, num_tokens_per_frame, dim); an array in tests."""
    num_frames: int
    num_tokens_per_frame: int
    modality: Modality
    duration_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTurn:
    """One message of a conversation. Its media come before its text, as in training."""

    role: Literal["system", "user", "assistant"]
    text: str
    media: tuple[FeatureReference, ...] = ()

    def __repr__(self) -> str:
        return f"ChatTurn({self.role}, {len(self.text)} characters, {len(self.media)} media)"


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateRequest:
    """`n` answers to one conversation."""

    tenant: str
    """Owner of the request. Tenants share no cached prefixes, whose timing would reveal another's videos."""
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
    """The continuation of one of the answers; the last one has a finish reason and the usage."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: Literal["stop", "length"] | None = None
    usage: Usage | None = None

    def __repr__(self) -> str:
        return f"AnswerDelta({self.index}, {len(self.text)} characters, {self.finish_reason})"


class FeatureClient(Protocol):
    """Interface of the feature service."""

    async def features(
        self, source: MediaSource, *, fps: float | None = None, max_frames: int | None = None
    ) -> FeatureReference | Refusal:
        """The medium's features. `fps` and `max_frames` can lower the server's limits, not raise them."""

    async def is_ready(self) -> bool:
        """True when a replica answers."""


class EngineClient(Protocol):
    """Interface of the engine service."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[AnswerDelta | Refusal]:
        """Yields deltas as they come; a Refusal is always last. Closing the iterator cancels the answers."""

    async def is_ready(self) -> bool:
        """True when a replica answers."""
