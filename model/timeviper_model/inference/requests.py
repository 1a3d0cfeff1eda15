"""What an engine is asked and what it answers: requests in, tokens and endings out, and counts of both.

Knows prompts, features and sampling parameters; nothing of slots, caches or steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, NewType

import numpy as np
import torch
from torch import Tensor

from timeviper_model.batching.batch import Sample, TokenKind
from timeviper_model.config import TimeViperConfig
from timeviper_model.inference.answer import FinishReason, SamplingParams, Usage

DEFAULT_CHUNK_TOKENS = 2048
"""tokens of a piece: 128 frames of 16 tokens; MLP activations of the 9B are 64 MB in bf16"""

RequestId = NewType("RequestId", int)


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
    prefix_key: str | None = None
    """names the system + vision tokens for the video-prefix cache: equal keys must mean equal tokens and features, for
    tenants who may share them (see prefix_cache); the engine adds the system ids and the number of vision tokens.
    No effect on a prompt in which text stands between or before media, as an earlier question does."""

    def __post_init__(self) -> None:
        if not len(self.prompt):
            raise ValueError("a prompt needs at least one token")


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


class QueueFull(RuntimeError):
    """All slots are taken and the queue is at its limit; try again later."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How much the engine works on at once."""

    num_slots: int = 8
    """requests decoded together; the cache is allocated for this many"""
    max_queued_requests: int = 32
    """requests that may wait for a slot; past it `submit` raises QueueFull"""
    max_prompt_tokens: int = 16384
    """text and vision tokens of one prompt"""
    max_prefill_tokens: int = DEFAULT_CHUNK_TOKENS
    """prompt tokens read in one step, and the most that go through the blocks together"""
    max_new_tokens: int = 1024
    """the most a request may ask for"""
    prefix_cache_bytes: int = 0
    """of the video-prefix cache; 0 = keep nothing"""
    pack_weights: bool = True
    """on a CPU in fp32: keep a copy of the weights as its kernels read them; few rows go through a third sooner, for
    twice the weights' memory"""

    def __post_init__(self) -> None:
        for name in ("num_slots", "max_prompt_tokens", "max_prefill_tokens", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.max_queued_requests < 0:
            raise ValueError(f"{self.max_queued_requests = } must be at least 0 (0 = only free slots)")
        if self.prefix_cache_bytes < 0:
            raise ValueError(f"{self.prefix_cache_bytes = } must be at least 0 (0 = keep nothing)")


class PromptTensors(NamedTuple):
    """A prompt as the model reads it, on the CPU."""

    input_ids: Tensor
    """(T,) int64"""
    token_kind: Tensor
    """(T,) int8 of TokenKind"""


def check_request(
    request: Request, limits: EngineConfig, model: TimeViperConfig, *, has_tokenizer: bool
) -> PromptTensors:
    """The request's prompt, when an engine with these limits can serve it with such a model.

    Raises:
        ValueError: when it never can.
    """
    prompt = request.prompt
    if len(prompt) > limits.max_prompt_tokens:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens ({prompt.num_vision_tokens} of them vision), the limit"
            f" is {limits.max_prompt_tokens}; ask with fewer frames or a shorter text"
        )
    if request.sampling.max_new_tokens > limits.max_new_tokens:
        raise ValueError(f"{request.sampling.max_new_tokens = } is past the limit of {limits.max_new_tokens}")
    if not has_tokenizer and any(isinstance(stop, str) for stop in request.sampling.stop):
        raise ValueError("stop strings need an engine with a tokenizer; pass token ids")
    if isinstance(request.vision_features, Tensor):
        expected = (prompt.num_vision_tokens, model.vision.row_size)
        if tuple(request.vision_features.shape) != expected:
            raise ValueError(f"vision features are {tuple(request.vision_features.shape)}, must be {expected}")
    return _prompt_tensors(prompt, model.text.vocab_size)


def _prompt_tensors(prompt: Sample, vocab_size: int) -> PromptTensors:
    # by way of numpy: 5 times as fast as a tensor from a list
    ids = np.array(prompt.input_ids, dtype=np.int64)
    if ids.min() < 0 or ids.max() >= vocab_size:
        wrong = int(ids.min() if ids.min() < 0 else ids.max())
        raise ValueError(f"token id {wrong} is outside the vocabulary of {vocab_size}; use the weights' own tokenizer")
    kinds, rows = np.array(prompt.token_kind, dtype=np.int8), np.array(prompt.vision_index, dtype=np.int64)
    if ((kinds == TokenKind.VISION) != (rows >= 0)).any():
        raise ValueError("token_kind must be VISION exactly where vision_index is not -1")
    rows = rows[rows >= 0]
    if (rows != np.arange(len(rows))).any():
        place = int((rows != np.arange(len(rows))).argmax())
        raise ValueError(
            f"vision token {place} reads row {int(rows[place])} of the features, which come in their order here;"
            " order the rows instead, so that vision_index counts from 0"
        )
    return PromptTensors(torch.from_numpy(ids), torch.from_numpy(kinds))
