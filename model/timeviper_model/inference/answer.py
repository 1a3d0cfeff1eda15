"""Options and token counts of an answer. Does not import torch, for HTTP gateways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MAX_LOGPROBS = 20
"""OpenAI's limit of `top_logprobs`."""

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    max_new_tokens: int = 128
    """Maximum tokens of the answer, its end token included."""
    temperature: float = 0.0
    """Softmax temperature in [0, 2]; 0 = greedy."""
    top_p: float = 1.0
    """Probability mass of the tokens to draw from, most likely first."""
    top_k: int = 0
    """Number of most likely tokens to draw from; 0 = all."""
    seed: int = 0
    stop: tuple[str | int, ...] = ()
    """Texts or token ids that end the answer and are left out of it."""
    num_logprobs: int | None = None
    """Alternatives reported with each token's log-probability; None = no log-probabilities."""
    json_schema: str | None = None
    """JSON schema, as JSON, that the answer follows; None = any text. An answer cut at max_new_tokens is not whole."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"{self.max_new_tokens = } must be at least 1")
        if not 0.0 <= self.temperature <= 2.0:
            raise ValueError(f"{self.temperature = } must be between 0 (greedy) and 2")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"{self.top_p = } must be above 0 and at most 1 (all tokens)")
        if self.top_k < 0:
            raise ValueError(f"{self.top_k = } must be at least 0 (0 = all tokens)")
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"{self.seed = } must fit torch's generator, from -2**63 to 2**64 - 1")
        if "" in self.stop:
            raise ValueError("an empty stop string would end every answer before its first token")
        if self.num_logprobs is not None and not 0 <= self.num_logprobs <= MAX_LOGPROBS:
            raise ValueError(f"{self.num_logprobs = } must be between 0 and {MAX_LOGPROBS}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """Generated tokens, the end token included."""
    vision_tokens: int = 0
    vision_tokens_kept: int = 0
    """Vision tokens left after the last TransV site."""
    cached_tokens: int = 0
    """Tokens read from the video-prefix cache."""
