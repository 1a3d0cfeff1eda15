"""What an engine is asked and what it answers: requests in, tokens and endings out, and counts of both.

Knows prompts, features and sampling parameters; nothing of slots, caches or steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, NewType

from torch import Tensor

from timeviper_model.batch import Sample
from timeviper_model.sampling import SamplingParams

RequestId = NewType("RequestId", int)
FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Request:
    """One answer to generate."""

    prompt: Sample
    """token ids with kinds; ends with the opening of the assistant's turn (prompt.build_sample)"""
    vision_features: Tensor | Callable[[], Iterable[Tensor]]
    """(num_vision_tokens, dim), or what yields it block by block; called once, when the prompt's first vision token is
    read, not at all on a hit in the video-prefix cache. A block of no rows says 'not yet' and costs the others nothing;
    an iterator that blocks holds up every slot."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_new_tokens: int = 128
    stop: tuple[str | int, ...] = ()
    """texts or token ids that end the answer, left out of its text; the template's end token always ends it"""
    seed: int = 0
    """of this request's own generator; nothing draws from it when temperature is 0"""
    prefix_key: str | None = None
    """names the system + vision tokens for the video-prefix cache: equal keys must mean equal tokens and features, for
    tenants who may share them (see prefix_cache); the engine adds the system ids and the number of vision tokens.
    No effect on a prompt in which text stands between or before media, as an earlier question does."""

    def __post_init__(self) -> None:
        if not len(self.prompt):
            raise ValueError("a prompt needs at least one token")
        if self.max_new_tokens < 1:
            raise ValueError(f"{self.max_new_tokens = } must be at least 1")
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"{self.seed = } must fit torch's generator, from -2**63 to 2**64 - 1")
        if "" in self.stop:
            raise ValueError("an empty stop string would end every answer before its first token")


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What one request took, in tokens."""

    prompt_tokens: int
    """text and vision"""
    completion_tokens: int
    """the end token, which has no text, included"""
    vision_tokens: int
    vision_tokens_kept: int
    """left after the last TransV site"""
    cached_tokens: int
    """prompt tokens taken from the video-prefix cache"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """One more token of a request's answer."""

    request_id: RequestId
    id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]
    text: str
    """text that became certain with this token, often "" while part of a character or of a stop string is held back"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """The last event of a request that ended as it should, or was cancelled."""

    request_id: RequestId
    reason: FinishReason
    text: str
    """held-back text that turned out to belong to the answer"""
    usage: Usage


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """The last event of a request that could not be served; others are untouched."""

    request_id: RequestId
    error: str


Event = Token | Finished | Failed


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """A snapshot for metrics and autoscaling."""

    num_slots: int
    active_slots: int
    queued_requests: int
    cache_bytes: int
    prompt_tokens: int
    """prefilled since the start, those of cached prefixes left out"""
    completion_tokens: int
    """decoded since the start"""
    prefix_hits: int
    prefix_misses: int
    prefix_evictions: int
    """of the video-prefix cache, since the start"""
    prefix_entries: int
    prefix_bytes: int
    """in it now"""
