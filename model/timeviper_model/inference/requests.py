"""Input and output of the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NewType

import numpy as np
import torch
from torch import Tensor

from timeviper_model.batching.batch import Sample, TokenKind
from timeviper_model.config import TimeViperConfig
from timeviper_model.inference.answer import FinishReason, SamplingParams, Usage
from timeviper_model.layers.cache import KEPT_BYTES

DEFAULT_CHUNK_TOKENS = 2048
"""128 frames of 16 tokens; the 9B's MLP activations take 64 MB in bfloat16."""

RequestId = NewType("RequestId", int)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Request:
    prompt: Sample
    """Prompt with an open assistant turn at its end (see build_sample)."""
    vision_features: Tensor | Callable[[], Iterable[Tensor]]
    """(num_vision_tokens, dim), or a function that yields blocks of rows; an empty block means 'not yet'.

    The engine calls the function again if it has to read the prompt a second time."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    prefix_key: str | None = None
    """Key in the video-prefix cache, unique per tenant and features; None = not cached."""

    def __post_init__(self) -> None:
        if not len(self.prompt):
            raise ValueError("a prompt needs at least one token")


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    request_id: RequestId
    id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]
    text: str
    """Text that became certain with this token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    request_id: RequestId
    reason: FinishReason
    text: str
    usage: Usage


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    request_id: RequestId
    error: str
    is_out_of_memory: bool = False


Event = Token | Finished | Failed


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """Current counts, and totals since the start."""

    num_slots: int
    active_slots: int
    queued_requests: int
    cache_bytes: int
    """Keys, values and Mamba states."""
    kv_bytes: int
    """Allocated keys and values."""
    reserved_kv_bytes: int
    """Keys and values of active requests, their whole answers included."""
    prompt_tokens: int
    """Total prefilled tokens, without cached prefixes."""
    completion_tokens: int
    vision_tokens: int
    """Total of prompts, those of cached prefixes included."""
    kept_vision_tokens: int
    """Total left after the last TransV site."""
    answers: int
    """Total answers that have produced a token."""
    prefix_hits: int
    prefix_misses: int
    prefix_evictions: int
    prefix_entries: int
    prefix_bytes: int
    prefix_host_hits: int
    """Those of `prefix_hits` that were restored from host memory."""
    prefix_host_entries: int
    prefix_host_bytes: int


class QueueFull(RuntimeError):
    """The queue is full; try again later."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    num_slots: int = 8
    """Requests decoded together."""
    max_queued_requests: int = 32
    """Maximum requests waiting for a slot; more are refused."""
    max_prompt_tokens: int = 16384
    """Maximum text and vision tokens of one prompt."""
    max_prefill_tokens: int = DEFAULT_CHUNK_TOKENS
    """Maximum prompt tokens per step and prefill chunk."""
    max_new_tokens: int = 1024
    """Maximum tokens of one answer."""
    prefix_cache_bytes: int = 0
    """Maximum bytes of the video-prefix cache; 0 = no cache."""
    prefix_host_bytes: int = 0
    """Maximum bytes of host memory for prefixes that the cache evicts, and questions bring back; 0 = none."""
    kv_cache_bytes: int = 0
    """Maximum bytes of keys and values, and of what TransV keeps of prompts being read; 0 = no limit. Requests wait for
    space for their prompt and whole answer."""
    kept_cache_bytes: int = KEPT_BYTES
    """Maximum bytes of keys and values per attention layer that stay allocated while idle."""
    pack_weights: bool = True
    """Whether to keep a second copy of the weights, for float32 on a CPU: small batches take a third less time."""
    max_graph_steps: int = 256
    """Maximum greedy decode steps per CUDA graph; 0 = no graphs."""

    def __post_init__(self) -> None:
        for name in ("num_slots", "max_prompt_tokens", "max_prefill_tokens", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.max_queued_requests < 0:
            raise ValueError(f"{self.max_queued_requests = } must be at least 0 (0 = only free slots)")
        if self.prefix_cache_bytes < 0:
            raise ValueError(f"{self.prefix_cache_bytes = } must be at least 0 (0 = no cache)")
        if self.prefix_host_bytes < 0 or (self.prefix_host_bytes and not self.prefix_cache_bytes):
            raise ValueError(f"{self.prefix_host_bytes = } must be 0 (none), or above 0 with prefix_cache_bytes")
        if self.kv_cache_bytes < 0:
            raise ValueError(f"{self.kv_cache_bytes = } must be at least 0 (0 = no limit)")
        if self.max_graph_steps < 0:
            raise ValueError(f"{self.max_graph_steps = } must be at least 0 (0 = no graphs)")


def check_request(
    request: Request, limits: EngineConfig, model: TimeViperConfig, *, has_tokenizer: bool
) -> tuple[Tensor, Tensor]:
    """Returns ids (T,) int64 and token kinds (T,) int8, or raises ValueError."""
    prompt, sampling = request.prompt, request.sampling
    if len(prompt) > limits.max_prompt_tokens:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens ({prompt.num_vision_tokens} of them vision), the limit"
            f" is {limits.max_prompt_tokens}; use fewer frames or a shorter text"
        )
    if sampling.max_new_tokens > limits.max_new_tokens:
        raise ValueError(f"{sampling.max_new_tokens = } exceeds the limit of {limits.max_new_tokens}")
    if not has_tokenizer and any(isinstance(stop, str) for stop in sampling.stop):
        raise ValueError("stop strings need an engine with a tokenizer; pass token ids")
    if not has_tokenizer and sampling.json_schema is not None:
        raise ValueError("a JSON schema needs an engine with a tokenizer")
    if isinstance(request.vision_features, Tensor):
        expected = (prompt.num_vision_tokens, model.vision.row_size)
        if tuple(request.vision_features.shape) != expected:
            raise ValueError(f"vision features are {tuple(request.vision_features.shape)}, must be {expected}")
    return _prompt_tensors(prompt, model.text.vocab_size)


def _prompt_tensors(prompt: Sample, vocab_size: int) -> tuple[Tensor, Tensor]:
    # 5 times as fast as torch.tensor
    ids = np.array(prompt.input_ids, dtype=np.int64)
    if ids.min() < 0 or ids.max() >= vocab_size:
        wrong = int(ids.min() if ids.min() < 0 else ids.max())
        raise ValueError(f"token id {wrong} is outside the vocabulary of {vocab_size}; use the weights' own tokenizer")
    kinds, rows = np.array(prompt.token_kind, dtype=np.int8), np.array(prompt.vision_index, dtype=np.int64)
    if ((kinds == TokenKind.VISION) != (rows >= 0)).any():
        raise ValueError("token_kind must be VISION exactly where vision_index is not -1")
    rows = rows[rows >= 0]
    if (rows != np.arange(len(rows))).any():
        index = int((rows != np.arange(len(rows))).argmax())
        raise ValueError(
            f"vision token {index} reads row {int(rows[index])} of the features; the engine reads rows in order:"
            " reorder the features so that vision_index counts from 0"
        )
    return torch.from_numpy(ids), torch.from_numpy(kinds)
