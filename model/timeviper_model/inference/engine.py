"""InferenceEngine: many requests at once through one model, a step at a time. No Ray, no HTTP, no threads.

A request waits in a queue, takes a slot of the cache and is prefilled, in pieces: a step reads a bounded number of
tokens, of one prompt or of several short ones, so that running answers never wait for more than that; from then on
every step decodes one token for all slots together. What the model knows of a video before the question can be kept
for the next one (prefix_cache). The caller owns the loop:

    engine.submit(request) -> id;   while work: for event in engine.step(): ...

Deterministic: tokens depend on the weights, the prompt, the parameters and the seed, never on the neighbours.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from timeviper_model.batching.prompt import TEMPLATES, encode_text, end_token_id
from timeviper_model.inference.answer import FinishReason, Usage
from timeviper_model.inference.chunked_transv import plan_sites
from timeviper_model.inference.detokenize import TextStream
from timeviper_model.inference.prefill import Prefill, prefix_length
from timeviper_model.inference.prefix_cache import PrefixCache, PrefixLease, prefix_entry_bytes
from timeviper_model.inference.requests import (
    EngineConfig,
    EngineStats,
    Event,
    Failed,
    Finished,
    PromptTensors,
    QueueFull,
    Request,
    RequestId,
    Token,
    check_request,
)
from timeviper_model.inference.sampling import SampledToken, sample_tokens
from timeviper_model.ops.linear import pack_linears
from timeviper_model.timeviper import TimeViper


class Queued(NamedTuple):
    """A request without a slot."""

    id: RequestId
    request: Request
    prompt: PromptTensors
    prefix_length: int
    prefix_key: Hashable | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reading:
    """A request in a slot whose prompt is being read."""

    id: RequestId
    request: Request
    slot: int
    prefill: Prefill
    lease: PrefixLease | None

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that did not have to be read."""
        return 0 if self.lease is None or self.lease.entry is None else self.lease.entry.num_tokens


@dataclass(slots=True, eq=False)
class Running:
    """A request in a slot whose answer is being written."""

    id: RequestId
    request: Request
    cached_tokens: int
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
        if self.config.pack_weights:
            pack_linears(model)
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
            ids = encode_text(tokenizer, template.assistant[1], split_special_tokens=False)
            self._closing = str(tokenizer.decode(ids, skip_special_tokens=True))
        self._ids = itertools.count()
        self._queue: deque[Queued] = deque()
        self._reading: deque[Reading] = deque()
        self._running: dict[int, Running] = {}
        self._prefixes = PrefixCache(self.config.prefix_cache_bytes)
        self._undelivered: dict[RequestId, list[Event]] = {}
        self._num_prompt_tokens = 0
        self._num_completion_tokens = 0

    def submit(self, request: Request) -> RequestId:
        """Puts `request` in the queue; its events come from `step`.

        Raises:
            QueueFull: when every slot is taken and `max_queued_requests` wait.
            ValueError: when the request can never be served here.
        """
        prompt = check_request(request, self.config, self._model.config, has_tokenizer=self._tokenizer is not None)
        taken = len(self._reading) + len(self._running)
        free = self.config.num_slots - taken
        if len(self._queue) >= free + self.config.max_queued_requests:
            raise QueueFull(
                f"{taken} requests run and {len(self._queue)} wait"
                f" (limits {self.config.num_slots} and {self.config.max_queued_requests}); try again later"
            )
        request_id = RequestId(next(self._ids))
        length = 0 if request.prefix_key is None else prefix_length(prompt.token_kind)
        self._queue.append(Queued(request_id, request, prompt, length, self._prefix_key(request, length)))
        return request_id

    def step(self) -> list[Event]:
        """One iteration: admit requests, read pieces of their prompts, then decode one token for every slot."""
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
        usage = self._drop(request_id)
        if usage is None:
            return False
        finished = Finished(request_id=request_id, reason="cancelled", text="", usage=usage)
        self._undelivered.setdefault(request_id, []).append(finished)
        return True

    def _drop(self, request_id: RequestId) -> Usage | None:
        """Takes the request out of the queue or its slot, wherever it is; what it took, None when it is nowhere."""
        for queued in self._queue:
            if queued.id == request_id:
                self._queue.remove(queued)
                return self._usage(queued.request)
        for reading in self._reading:
            if reading.id == request_id:
                self._reading.remove(reading)
                self._end_reading(reading)
                self._cache.reset(reading.slot)
                return self._usage(reading.request, cached_tokens=reading.cached_tokens)
        for slot, running in self._running.items():
            if running.id == request_id:
                self._release(slot)
                return self._usage(running.request, len(running.tokens), running.cached_tokens)
        return None

    @property
    def has_work(self) -> bool:
        """True while `step` has something to do or to deliver."""
        return bool(self._queue or self._reading or self._running or self._undelivered)

    def stats(self) -> EngineStats:
        """Counts of this moment and since the start."""
        return EngineStats(
            num_slots=self.config.num_slots,
            active_slots=len(self._reading) + len(self._running),
            queued_requests=len(self._queue),
            cache_bytes=self._cache.num_bytes,
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=self._num_completion_tokens,
            prefix_hits=self._prefixes.num_hits,
            prefix_misses=self._prefixes.num_misses,
            prefix_evictions=self._prefixes.num_evictions,
            prefix_entries=len(self._prefixes),
            prefix_bytes=self._prefixes.num_bytes,
        )

    def _is_known(self, request_id: RequestId) -> bool:
        return any(
            request_id == known
            for known in itertools.chain(
                (queued.id for queued in self._queue),
                (reading.id for reading in self._reading),
                (running.id for running in self._running.values()),
            )
        )

    @torch.inference_mode()
    def _advance(self) -> list[Event]:
        return [*self._admit(), *self._read(), *self._decode()]

    def _admit(self) -> list[Event]:
        """Gives the free slots to the first requests that need not wait for another to compute their prefix."""
        events: list[Event] = []
        taken = {reading.slot for reading in self._reading} | set(self._running)
        free = [slot for slot in range(self.config.num_slots) if slot not in taken]
        for queued in list(self._queue) if free else []:
            if queued.prefix_key is not None and self._prefixes.is_computing(queued.prefix_key):
                continue
            self._queue.remove(queued)
            lease = None if queued.prefix_key is None else self._prefixes.lease(queued.prefix_key)
            try:
                prefill = self._prefill(queued, free[0], lease)
            except Exception as error:  # noqa: BLE001 - no memory for so long a prompt: this request's trouble
                events.append(_failed(queued.id, error))
                if lease is not None:
                    lease.release()
                self._cache.reset(free[0])
                continue
            reading = Reading(id=queued.id, request=queued.request, slot=free.pop(0), prefill=prefill, lease=lease)
            self._reading.append(reading)
            if not free:
                break
        return events

    def _prefill(self, queued: Queued, slot: int, lease: PrefixLease | None) -> Prefill:
        features = queued.request.vision_features
        return Prefill(
            self._model,
            queued.prompt.input_ids.to(self._device),
            queued.prompt.token_kind.to(self._device),
            (lambda: [features]) if isinstance(features, Tensor) else features,
            self._cache,
            slot,
            max_chunk_tokens=self.config.max_prefill_tokens,
            # cut there even if nothing is kept: the same pieces give the same bits with the cache and without
            boundary=queued.prefix_length,
            prefix=None if lease is None else lease.entry,
            on_prefix=None if lease is None or lease.entry is not None else lease.publish,
        )

    def _prefix_key(self, request: Request, length: int) -> Hashable | None:
        """The key under which this prompt's prefix is kept; None when it has none, or none that would fit."""
        if not length or not self._prefixes.max_bytes:
            return None
        num_vision = request.prompt.num_vision_tokens
        num_system = length - num_vision
        needed = prefix_entry_bytes(self._model.config, num_system, num_vision, dtype=self._dtype)
        if needed > self._prefixes.max_bytes:
            return None
        return request.prefix_key, tuple(request.prompt.input_ids[:num_system]), num_vision

    def _read(self) -> list[Event]:
        """Reads on in the prompts, which take turns, up to `max_prefill_tokens`.

        One whose next piece is more than this step has left is the first of the next one; one whose features are not
        there passes its turn on.
        """
        events: list[Event] = []
        left = self.config.max_prefill_tokens
        for _ in range(len(self._reading)):
            reading = self._reading[0]
            before = reading.prefill.num_read
            try:
                logits_V = reading.prefill.advance(left)
                if logits_V is not None:
                    events += self._start_answer(reading, logits_V)
            except Exception as error:  # noqa: BLE001 - its features, its length: this request's trouble
                events.append(_failed(reading.id, error))
                self._drop(reading.id)
                continue
            num_read = reading.prefill.num_read - before
            left -= num_read
            if logits_V is not None:
                continue
            if not num_read and not reading.prefill.is_waiting:
                break
            self._reading.rotate(-1)
        return events

    def _start_answer(self, reading: Reading, logits_V: Tensor) -> list[Event]:
        request = reading.request
        stop_texts = [stop for stop in request.sampling.stop if isinstance(stop, str)]
        text = TextStream(self._tokenizer, stop=stop_texts, closing=self._closing) if self._tokenizer else None
        self._reading.remove(reading)
        self._end_reading(reading)
        self._num_prompt_tokens += len(request.prompt) - reading.cached_tokens
        self._running[reading.slot] = Running(
            id=reading.id,
            request=request,
            cached_tokens=reading.cached_tokens,
            generator=torch.Generator().manual_seed(request.sampling.seed),
            text=text,
        )
        return self._choose(logits_V[None], [reading.slot])

    @staticmethod
    def _end_reading(reading: Reading) -> None:
        if reading.lease is not None:
            reading.lease.release()

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
            if not is_finite:
                self._release(slot)
                events.append(Failed(request_id=running.id, error="the model's logits are not finite"))
                continue
            try:
                events += self._accept(slot, running, token)
            except Exception as error:  # noqa: BLE001 - its text: the other rows go on
                events.append(_failed(running.id, error))
                self._drop(running.id)
        return events

    def _accept(self, slot: int, running: Running, token: SampledToken) -> list[Event]:
        running.tokens.append(token.id)
        self._num_completion_tokens += 1
        ended = token.id in self.end_token_ids
        stopped = ended or token.id in running.request.sampling.stop
        text = running.text.push(token.id) if running.text is not None and not stopped else ""
        event = Token(
            request_id=running.id, id=token.id, logprob=token.logprob, top_logprobs=token.top_logprobs, text=text
        )
        stopped = stopped or (running.text is not None and running.text.stopped)
        if not stopped and len(running.tokens) < running.request.sampling.max_new_tokens:
            return [event]
        self._release(slot)
        rest = running.text.finish(closed=ended) if running.text is not None else ""
        stopped = stopped or (running.text is not None and running.text.stopped)  # a stop string in what was held back
        usage = self._usage(running.request, len(running.tokens), running.cached_tokens)
        reason: FinishReason = "stop" if stopped else "length"
        return [event, Finished(request_id=running.id, reason=reason, text=rest, usage=usage)]

    def _release(self, slot: int) -> Running:
        """Takes the slot's request out and gives its memory back."""
        self._cache.reset(slot)
        return self._running.pop(slot)

    def _usage(self, request: Request, completion_tokens: int = 0, cached_tokens: int = 0) -> Usage:
        vision_tokens = request.prompt.num_vision_tokens
        plans = plan_sites(self._model.config, vision_tokens)
        kept = min((plan.num_kept for plan in plans.values()), default=vision_tokens)
        return Usage(
            prompt_tokens=len(request.prompt),
            completion_tokens=completion_tokens,
            vision_tokens=vision_tokens,
            vision_tokens_kept=kept,
            cached_tokens=cached_tokens,
        )


def _failed(request_id: RequestId, error: Exception) -> Failed:
    """The end of a request whose own work raised `error`.

    Raises:
        torch.AcceleratorError: when it is one: the device answers nobody any more.
    """
    if isinstance(error, torch.AcceleratorError):
        raise error
    return Failed(request_id=request_id, error=f"{type(error).__name__}: {error}")
