"""Messages between the gateway and its two services, without torch.

A refusal is a message, because an exception's traceback may contain a user's text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from timeviper_model.inference.answer import SamplingParams, Usage

Modality = Literal["video", "image"]
FEATURE_SCHEME = "feature://"
"""Prefix of the address of a medium of the feature store."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """Reason for not serving a request, with its HTTP status."""

    status: int
    message: str
    code: str
    param: str | None = None
    retry_after_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFeatures:
    media_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaAddress:
    """A medium of the feature store, by its address in the manifest."""

    uri: str
    aliases: tuple[str, ...] = ()
    """The same address in other forms, such as the path with its symbolic links."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaFile:
    """A file that the feature service can read: an upload, a download, or a local file."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaFrames:
    """Pictures that are the frames of one video, in order."""

    frames: tuple[MediaFile | MediaBytes, ...]
    sha256: str

    @classmethod
    def of(cls, frames: Sequence[MediaFile | MediaBytes]) -> MediaFrames:
        joined = "frames " + " ".join(frame.sha256 for frame in frames)
        return cls(frames=tuple(frames), sha256=hashlib.sha256(joined.encode()).hexdigest())


MediaSource = StoredFeatures | MediaAddress | MediaFile | MediaBytes | MediaFrames


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureStream:
    """Where blocks of features are read while later frames are still being decoded."""

    board: Any
    """Actor handle of the feature replica's `BlockBoard`. Tests pass the board."""
    stream_id: str
    param: str | None = None
    """Dotted path of the medium in the request, for a refusal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureReference:
    key: str
    """Hash of content, encoder recipe and frames."""
    ref: Any
    """Ray object reference to bfloat16 as int16 bits, (num_frames, num_tokens_per_frame, dim). Tests pass an array.
    None while there is a `stream`."""
    stream: FeatureStream | None = None
    """Set while frames are being decoded. Damaged frames then still count in `num_frames`, and times are unknown."""
    num_frames: int
    num_tokens_per_frame: int
    modality: Modality
    duration_seconds: float
    times_seconds: tuple[float, ...] = ()
    """Presentation time of each frame."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureProgress:
    """Progress of a job's video. In stage `answering`, all frames are done."""

    stage: Literal["decoding", "encoding", "answering"]
    frames_done: int
    frames_total: int | None
    """None until the video is decoded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredMedium:
    media_id: str
    uri: str
    """Its address in the manifest."""
    modality: Modality
    duration_seconds: float
    num_frames: int
    num_tokens_per_frame: int
    pts_seconds: tuple[float, ...] | None = None
    """Time of each frame on the source's clock; None in a list of many media."""
    selected: tuple[int, ...] | None = None
    """Indices of the frames that answer a question without lower limits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaPage:
    media: tuple[StoredMedium, ...]
    has_more: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTurn:
    role: Literal["system", "user", "assistant"]
    text: str
    media: tuple[FeatureReference, ...] = ()
    offsets: tuple[int, ...] | None = None
    """Position of each medium in `text`, in characters, ascending; None = all before it."""

    def __post_init__(self) -> None:
        if self.offsets is not None and len(self.offsets) != len(self.media):
            raise ValueError(f"{len(self.media)} media need as many offsets, not {len(self.offsets)}")

    def marked_text(self, marker: str) -> str:
        """Returns the text with a marker for each medium."""
        pieces, end = [], 0
        for offset in self.offsets or (0,) * len(self.media):
            pieces += [self.text[end:offset], marker]
            end = offset
        return "".join([*pieces, self.text[end:]])

    def __repr__(self) -> str:
        return f"ChatTurn({self.role}, {len(self.text)} characters, {len(self.media)} media)"


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateRequest:
    tenant: str
    """Owner of the request. Tenants share no cached prefixes, because timing would reveal another tenant's videos."""
    turns: tuple[ChatTurn, ...]
    sampling: SamplingParams
    """Options of the first answer. Each further answer adds 1 to the seed."""
    n: int = 1
    """Number of answers."""
    time_text: bool | None = None
    """Whether the prompt states each video's length; None = as the weights' training did for such prompts."""
    is_temporal: bool = False
    """Whether the request is about times."""
    answer_prefix: str = ""
    """Text that the model continues, not repeated in the answers."""
    request_id: str = ""
    """Id of the HTTP request, for logs."""

    @property
    def media(self) -> list[FeatureReference]:
        return [medium for turn in self.turns for medium in turn.media]

    def with_media(self, media: Sequence[FeatureReference]) -> GenerateRequest:
        """Returns the request with other references of the same media."""
        references = iter(media)
        turns = tuple(replace(turn, media=tuple(next(references) for _ in turn.media)) for turn in self.turns)
        return replace(self, turns=turns)

    @property
    def num_frames(self) -> int:
        return sum(medium.num_frames for medium in self.media)

    @property
    def session_id(self) -> str | None:
        """Equal for a tenant's requests with the same first medium, so that they use one replica's cache."""
        if not self.media:
            return None
        return hashlib.sha256(json.dumps([self.tenant, self.media[0].key]).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprob:
    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerDelta:
    """The next text of an answer. The last delta has the finish reason and the usage."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: Literal["stop", "length"] | None = None
    usage: Usage | None = None

    def __repr__(self) -> str:
        return f"AnswerDelta({self.index}, {len(self.text)} characters, {self.finish_reason})"


class FeatureClient(Protocol):
    async def features(
        self,
        source: MediaSource,
        *,
        tenant: str = "",
        fps: float | None = None,
        max_frames: int | None = None,
        whole: bool = True,
    ) -> FeatureReference | Refusal:
        """Returns features. `fps` and `max_frames` can only lower the server's limits.

        Tenants share those of the feature store alone. Unless `whole`, returns once the first block exists: a
        reference with a `stream`.
        """

    def watch(
        self, source: MediaSource, *, tenant: str = "", fps: float | None = None, max_frames: int | None = None
    ) -> AsyncIterator[FeatureProgress | FeatureReference | Refusal]:
        """Yields the progress of `features`, and its result last."""

    async def list_media(self, *, after: str, prefix: str, limit: int) -> MediaPage | Refusal:
        """Returns stored media with ids that start with `prefix` and follow `after`, by id."""

    async def medium(self, media_id: str) -> StoredMedium | Refusal:
        """Returns a stored medium with the times of its frames."""

    async def is_ready(self, *, deep: bool) -> bool:
        """Returns whether replicas run or can start; with `deep`, whether one answers."""


class EngineClient(Protocol):
    def generate(self, request: GenerateRequest) -> AsyncIterator[AnswerDelta | Refusal]:
        """Yields deltas; a Refusal is last. Closing the iterator cancels the answers."""

    async def is_ready(self, *, deep: bool) -> bool:
        """See `FeatureClient.is_ready`."""
