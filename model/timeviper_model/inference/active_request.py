"""One request within the engine: its slot, its progress and its answer so far."""

from __future__ import annotations

import enum
from collections.abc import Collection, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from timeviper_model.inference.answer import FinishReason, Usage
from timeviper_model.inference.detokenize import TextStream
from timeviper_model.inference.grammar import Matcher
from timeviper_model.inference.memory import RequestMemory
from timeviper_model.inference.prefill import Prefill
from timeviper_model.inference.prefix_cache import PrefixLease
from timeviper_model.inference.requests import Event, Finished, Request, RequestId, Token
from timeviper_model.inference.sampling import SampledToken


class RequestState(enum.Enum):
    WAITING = "waiting"
    PREFILLING = "prefilling"
    DECODING = "decoding"


@dataclass(kw_only=True, slots=True, eq=False)
class ActiveRequest:
    id: RequestId
    request: Request
    input_ids: Tensor
    token_kind: Tensor
    num_kept_vision: int
    """Vision tokens left after the last TransV site."""
    prefix_length: int
    prefix_key: Hashable | None
    generator: torch.Generator
    text: TextStream | None
    matcher: Matcher | None
    """State in the answer's JSON schema."""
    state: RequestState = RequestState.WAITING
    memory: RequestMemory
    slot: int = -1
    working_bytes: int = 0
    """Bytes that TransV keeps of the prompt now."""
    prefill: Prefill | None = None
    lease: PrefixLease | None = None
    cached_tokens: int = 0
    tokens: list[int] = field(default_factory=list)

    @property
    def num_tokens_left(self) -> int:
        return self.request.sampling.max_new_tokens - len(self.tokens)

    def usage(self) -> Usage:
        prompt = self.request.prompt
        return Usage(
            prompt_tokens=len(prompt),
            completion_tokens=len(self.tokens),
            vision_tokens=prompt.num_vision_tokens,
            vision_tokens_kept=self.num_kept_vision,
            cached_tokens=self.cached_tokens,
        )

    def accept(self, token: SampledToken, end_token_ids: Collection[int]) -> list[Event]:
        """Adds a token to the answer. Returns its event, then Finished if it is the last."""
        sampling, text = self.request.sampling, self.text
        self.tokens.append(token.id)
        ended = token.id in end_token_ids
        if self.matcher is not None:
            self.matcher.accept(token.id)
        stopped = ended or token.id in sampling.stop
        new_text = text.push(token.id) if text is not None and not stopped else ""
        event = Token(
            request_id=self.id, id=token.id, logprob=token.logprob, top_logprobs=token.top_logprobs, text=new_text
        )
        stopped = stopped or (text is not None and text.stopped)
        stopped = stopped or (self.matcher is not None and self.matcher.is_done)
        if not stopped and self.num_tokens_left > 0:
            return [event]
        rest = text.finish(closed=ended) if text is not None else ""
        stopped = stopped or (text is not None and text.stopped)  # a stop string within the held-back text
        reason: FinishReason = "stop" if stopped else "length"
        return [event, Finished(request_id=self.id, reason=reason, text=rest, usage=self.usage())]
