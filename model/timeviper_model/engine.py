"""InferenceEngine: many requests at once through one model, a step at a time. No Ray, no HTTP, no threads.

A request waits in a queue, takes a slot of the cache, is prefilled (one a step, so that running answers never wait for
more than one prompt), and from then on every step decodes one token for all slots together. The caller owns the loop:

    engine.submit(request) -> id;   while work: for event in engine.step(): ...

Deterministic: tokens depend on the weights, the prompt, the parameters and the seed, never on the neighbours.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NewType

import torch
from torch import Tensor

from timeviper_model.batch import PackedBatch, Sample, pack_samples
from timeviper_model.detokenize import TextStream
from timeviper_model.prompt import TEMPLATES, end_token_id
from timeviper_model.sampling import SampledToken, SamplingParams, sample_tokens
from timeviper_model.timeviper import TimeViper
from timeviper_model.transv import num_kept

RequestId = NewType("RequestId", int)
FinishReason = Literal["stop", "length", "cancelled"]


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
    max_new_tokens: int = 1024
    """the most a request may ask for"""

    def __post_init__(self) -> None:
        for name in ("num_slots", "max_prompt_tokens", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.max_queued_requests < 0:
            raise ValueError(f"{self.max_queued_requests = } must be at least 0 (0 = only free slots)")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Request:
    """One answer to generate."""

    prompt: Sample
    """token ids with kinds; ends with the opening of the assistant's turn (prompt.build_sample)"""
    vision_features: Tensor | Callable[[], Iterable[Tensor]]
    """(num_vision_tokens, dim), or what yields it block by block; called once, when the request gets a slot"""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_new_tokens: int = 128
    stop: tuple[str | int, ...] = ()
    """texts or token ids that end the answer, left out of its text; the template's end token always ends it"""
    seed: int = 0
    """of this request's own generator; nothing draws from it when temperature is 0"""
    prefix_key: str | None = None
    """identity of system + vision tokens for the video-prefix cache; no effect until there is one"""

    def __post_init__(self) -> None:
        if not len(self.prompt):
            raise ValueError("a prompt needs at least one token")
        if self.max_new_tokens < 1:
            raise ValueError(f"{self.max_new_tokens = } must be at least 1")
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
    cached_tokens: int = 0
    """prompt tokens taken from the video-prefix cache; 0 until there is one"""


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
    """prefilled since the start"""
    completion_tokens: int
    """decoded since the start"""
    prefix_hits: int = 0
    prefix_misses: int = 0
    prefix_bytes: int = 0
    """of the video-prefix cache; all 0 until there is one"""


@dataclass(slots=True, eq=False)
class _Running:
    """A request in a slot."""

    id: RequestId
    request: Request
    generator: torch.Generator
    text: TextStream | None
    tokens: list[int] = field(default_factory=list)


class InferenceEngine:
    """Continuous batching over the slots of one cache. Not thread-safe: one thread calls every method."""

    def __init__(self, model: TimeViper, config: EngineConfig | None = None, *, tokenizer: Any | None = None) -> None:
        """Args:
        model: in eval mode, on its device and in its dtype.
        tokenizer: gives events their text and finds stop strings; without it answers are ids alone and end at
            the configuration's eos_token_id.
        """
        self.config = config or EngineConfig()
        self._model = model
        self._tokenizer = tokenizer
        parameter = next(model.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        self._cache = model.new_cache(self.config.num_slots, device=self._device, dtype=self._dtype)
        self.end_token_ids = frozenset({model.config.text.eos_token_id})
        """the ids that end every answer"""
        self.feature_size = model.config.vision.row_size
        """width of a row of vision features"""
        self._closing = ""
        if tokenizer is not None:
            template = TEMPLATES[model.config.chat_template]
            self.end_token_ids = frozenset({end_token_id(tokenizer, template)})
            ids = tokenizer(template.assistant[1], add_special_tokens=False)["input_ids"]
            self._closing = str(tokenizer.decode(ids, skip_special_tokens=True))
        self._ids = itertools.count()
        self._queue: deque[tuple[RequestId, Request]] = deque()
        self._running: dict[int, _Running] = {}
        self._undelivered: dict[RequestId, list[Event]] = {}
        self._num_prompt_tokens = 0
        self._num_completion_tokens = 0

    def submit(self, request: Request) -> RequestId:
        """Puts `request` in the queue; its events come from `step`.

        Raises:
            QueueFull: when every slot is taken and `max_queued_requests` wait.
            ValueError: when the request can never be served here.
        """
        self._check(request)
        free = self.config.num_slots - len(self._running)
        if len(self._queue) >= free + self.config.max_queued_requests:
            raise QueueFull(
                f"{len(self._running)} requests run and {len(self._queue)} wait"
                f" (limits {self.config.num_slots} and {self.config.max_queued_requests}); try again later"
            )
        request_id = RequestId(next(self._ids))
        self._queue.append((request_id, request))
        return request_id

    def step(self) -> list[Event]:
        """One iteration: admit and prefill at most one request, then decode one token for every slot."""
        kept = [event for events in self._undelivered.values() for event in events]
        self._undelivered.clear()
        return kept + self._advance()

    def stream(self, request_id: RequestId) -> Iterator[Event]:
        """The events of one request until its last, stepping the engine as needed; other requests' events wait for
        their own `stream` or for `step`.
        """
        while True:
            for event in self._undelivered.pop(request_id, []):
                yield event
                if not isinstance(event, Token):
                    return
            if not self._is_known(request_id):
                return
            for event in self._advance():
                self._undelivered.setdefault(event.request_id, []).append(event)

    def cancel(self, request_id: RequestId) -> bool:
        """Ends a request and frees its slot at once; its Finished event comes with the next step.

        Returns:
            False when the request is not queued or running (any more).
        """
        for entry in self._queue:
            if entry[0] == request_id:
                self._queue.remove(entry)
                usage = self._usage(entry[1], 0)
                break
        else:
            slot = next((slot for slot, running in self._running.items() if running.id == request_id), None)
            if slot is None:
                return False
            running = self._release(slot)
            usage = self._usage(running.request, len(running.tokens))
        finished = Finished(request_id=request_id, reason="cancelled", text="", usage=usage)
        self._undelivered.setdefault(request_id, []).append(finished)
        return True

    @property
    def has_work(self) -> bool:
        """True while `step` has something to do or to deliver."""
        return bool(self._queue or self._running or self._undelivered)

    def stats(self) -> EngineStats:
        """Counts of this moment and since the start."""
        return EngineStats(
            num_slots=self.config.num_slots,
            active_slots=len(self._running),
            queued_requests=len(self._queue),
            cache_bytes=self._cache.num_bytes,
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=self._num_completion_tokens,
        )

    def _check(self, request: Request) -> None:
        prompt_tokens = len(request.prompt)
        if prompt_tokens > self.config.max_prompt_tokens:
            raise ValueError(
                f"the prompt has {prompt_tokens} tokens ({request.prompt.num_vision_tokens} of them vision), the limit"
                f" is {self.config.max_prompt_tokens}; ask with fewer frames or a shorter text"
            )
        if request.max_new_tokens > self.config.max_new_tokens:
            raise ValueError(f"{request.max_new_tokens = } is past the limit of {self.config.max_new_tokens}")
        if self._tokenizer is None and any(isinstance(stop, str) for stop in request.stop):
            raise ValueError("stop strings need an engine with a tokenizer; pass token ids")
        if isinstance(request.vision_features, Tensor):
            expected = (request.prompt.num_vision_tokens, self.feature_size)
            if tuple(request.vision_features.shape) != expected:
                raise ValueError(f"vision features are {tuple(request.vision_features.shape)}, must be {expected}")

    def _is_known(self, request_id: RequestId) -> bool:
        return any(entry[0] == request_id for entry in self._queue) or any(
            running.id == request_id for running in self._running.values()
        )

    @torch.inference_mode()
    def _advance(self) -> list[Event]:
        return [*self._admit(), *self._decode()]

    def _admit(self) -> list[Event]:
        if not self._queue or len(self._running) == self.config.num_slots:
            return []
        request_id, request = self._queue.popleft()
        slot = next(slot for slot in range(self.config.num_slots) if slot not in self._running)
        try:
            logits_V = self._model.prefill(self._batch(request), self._cache, slot)
        except (RuntimeError, ValueError, OSError) as error:  # its features, its length: this request's trouble alone
            self._cache.reset(slot)
            return [Failed(request_id=request_id, error=f"{type(error).__name__}: {error}")]
        self._num_prompt_tokens += len(request.prompt)
        stop_texts = [stop for stop in request.stop if isinstance(stop, str)]
        self._running[slot] = _Running(
            id=request_id,
            request=request,
            generator=torch.Generator().manual_seed(request.seed),
            text=TextStream(self._tokenizer, stop=stop_texts, closing=self._closing) if self._tokenizer else None,
        )
        return self._choose(logits_V[None], [slot])

    def _batch(self, request: Request) -> PackedBatch:
        features = request.vision_features
        if not isinstance(features, Tensor):
            blocks = list(features())
            features = torch.cat(blocks) if blocks else torch.zeros(0, self.feature_size)
        return pack_samples([request.prompt], [features]).to(self._device, self._dtype)

    def _decode(self) -> list[Event]:
        slots = sorted(self._running)
        if not slots:
            return []
        ids = torch.tensor([self._running[slot].tokens[-1] for slot in slots], device=self._device)
        logits_BV = self._model.decode_step(ids, self._cache, torch.tensor(slots, device=self._device))
        return self._choose(logits_BV, slots)

    def _choose(self, logits_BV: Tensor, slots: list[int]) -> list[Event]:
        rows = [self._running[slot] for slot in slots]
        finite = torch.isfinite(logits_BV).all(dim=-1).tolist()
        sampled = sample_tokens(
            logits_BV.nan_to_num(), [row.request.sampling for row in rows], [row.generator for row in rows]
        )
        events: list[Event] = []
        for slot, running, token, is_finite in zip(slots, rows, sampled, finite, strict=True):
            if is_finite:
                events += self._accept(slot, running, token)
            else:
                self._release(slot)
                events.append(Failed(request_id=running.id, error="the model's logits are not finite"))
        return events

    def _accept(self, slot: int, running: _Running, token: SampledToken) -> list[Event]:
        running.tokens.append(token.id)
        self._num_completion_tokens += 1
        ended = token.id in self.end_token_ids
        stopped = ended or token.id in running.request.stop
        text = running.text.push(token.id) if running.text is not None and not stopped else ""
        event = Token(
            request_id=running.id, id=token.id, logprob=token.logprob, top_logprobs=token.top_logprobs, text=text
        )
        stopped = stopped or (running.text is not None and running.text.stopped)
        if not stopped and len(running.tokens) < running.request.max_new_tokens:
            return [event]
        self._release(slot)
        rest = running.text.finish(closed=ended) if running.text is not None else ""
        stopped = stopped or (running.text is not None and running.text.stopped)  # a stop string in what was held back
        usage = self._usage(running.request, len(running.tokens))
        reason: FinishReason = "stop" if stopped else "length"
        return [event, Finished(request_id=running.id, reason=reason, text=rest, usage=usage)]

    def _release(self, slot: int) -> _Running:
        """Takes the slot's request out and gives its memory back."""
        self._cache.reset(slot)
        return self._running.pop(slot)

    def _usage(self, request: Request, completion_tokens: int) -> Usage:
        vision_tokens = request.prompt.num_vision_tokens
        kept = vision_tokens
        for site in self._model.config.transv:
            kept = num_kept(vision_tokens, kept, site.keep)
        return Usage(
            prompt_tokens=len(request.prompt),
            completion_tokens=completion_tokens,
            vision_tokens=vision_tokens,
            vision_tokens_kept=kept,
        )
