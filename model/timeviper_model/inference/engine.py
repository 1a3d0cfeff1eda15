"""Continuous batching of requests through one model, without threads.

    engine.submit(request);   while engine.has_work: for event in engine.step(): ...

Other requests change an answer only by rounding: a product's sums depend on its number of rows. In float32 the tokens
are those of the request alone; in bfloat16, tokens of nearly equal probability may change places.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from timeviper_model.batching.batch import TokenKind
from timeviper_model.batching.prompt import encode_text, end_token_ids
from timeviper_model.batching.tokenizer_template import chat_template
from timeviper_model.config import eos_token_ids
from timeviper_model.inference.active_request import ActiveRequest, RequestState
from timeviper_model.inference.chunked_transv import plan_sites
from timeviper_model.inference.detokenize import TextStream
from timeviper_model.inference.grammar import GrammarCompiler, allowed_tokens
from timeviper_model.inference.graph_choice import MIN_GRAPH_STEPS, STEPS_BEFORE_GRAPH, DecodeGraphs
from timeviper_model.inference.memory import (
    check_limits,
    is_out_of_memory,
    prefix_entry_bytes,
    request_memory,
)
from timeviper_model.inference.prefill import Prefill, PrefixEntry, prefix_length
from timeviper_model.inference.prefix_cache import PrefixCache
from timeviper_model.inference.requests import (
    EngineConfig,
    EngineStats,
    Event,
    Failed,
    Finished,
    QueueFull,
    Request,
    RequestId,
    Token,
    check_request,
)
from timeviper_model.inference.sampling import SampledToken, sample_tokens
from timeviper_model.layers.cache import HybridCache
from timeviper_model.ops.linear import pack_linears
from timeviper_model.timeviper import TimeViper

logger = logging.getLogger(__name__)


class InferenceEngine:
    """Continuous batching over the slots of one cache. Not thread-safe."""

    def __init__(
        self,
        model: TimeViper,
        config: EngineConfig | None = None,
        *,
        tokenizer: Any | None = None,
        min_graph_steps: int = MIN_GRAPH_STEPS,
        steps_before_graph: int = STEPS_BEFORE_GRAPH,
    ) -> None:
        """Allocates the cache. Without `tokenizer`, answers are ids that end at eos_token_id, and stop strings are
        rejected.
        """
        self.config = config or EngineConfig()
        if self.config.pack_weights:
            pack_linears(model)
        self._model = model
        self._tokenizer = tokenizer
        parameter = next(model.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        self._cache = HybridCache(
            model.config.text,
            self.config.num_slots,
            device=self._device,
            dtype=self._dtype,
            kept_bytes=self.config.kept_cache_bytes,
        )
        check_limits(model.config, self.config, self._cache, dtype=self._dtype)
        self.end_token_ids = eos_token_ids(model.config.text)
        self.feature_size = model.config.vision.row_size
        self._closing = ""
        self.grammars: GrammarCompiler | None = None
        """Compiles JSON schemas; None without a tokenizer. A caller may compile early, in another thread."""
        if tokenizer is not None:
            template = chat_template(model.config.chat_template, tokenizer)
            self.end_token_ids = end_token_ids(tokenizer, template, model.config.text)
            self.grammars = GrammarCompiler(tokenizer, self.end_token_ids)
            ids = encode_text(tokenizer, template.assistant[1], split_special_tokens=False)
            self._closing = str(tokenizer.decode(ids, skip_special_tokens=True))
        self._ids = itertools.count()
        self._requests: dict[RequestId, ActiveRequest] = {}  # prefilling requests move to the end after their turn
        self._prefixes = PrefixCache(
            self.config.prefix_cache_bytes, max_host_bytes=self.config.prefix_host_bytes, device=self._device
        )
        self._undelivered: dict[RequestId, list[Event]] = {}
        self._num_prompt_tokens = 0
        self._num_completion_tokens = 0
        self._num_vision_tokens = self._num_kept_vision_tokens = 0
        self._num_answers = 0
        self._graphs = DecodeGraphs(
            model,
            self._cache,
            max_steps=self.config.max_graph_steps,
            min_steps=min_graph_steps,
            steps_before=steps_before_graph,
        )
        self.is_stalled = False
        """True after a step in which every request that has a slot lacked features. Until some arrive, or `submit` or
        `cancel` is called, further steps do nothing."""

    def submit(self, request: Request) -> RequestId:
        """Queues `request`, whose events `step` returns.

        Raises:
            QueueFull: when all slots are taken and `max_queued_requests` wait.
            ValueError: when this engine can never serve the request.
        """
        input_ids, token_kind = check_request(
            request, self.config, self._model.config, has_tokenizer=self._tokenizer is not None
        )
        num_waiting = len(self._in_state(RequestState.WAITING))
        num_active = len(self._requests) - num_waiting
        if num_waiting >= self.config.num_slots - num_active + self.config.max_queued_requests:
            raise QueueFull(
                f"{num_active} requests run and {num_waiting} wait"
                f" (limits {self.config.num_slots} and {self.config.max_queued_requests}); try again later"
            )
        num_vision, num_new = request.prompt.num_vision_tokens, request.sampling.max_new_tokens
        plans = plan_sites(self._model.config, num_vision)
        memory = request_memory(self._model.config, len(input_ids) - num_vision, num_vision, num_new, dtype=self._dtype)
        needed = self._cache.room_bytes(memory.tokens) + memory.working_bytes
        if 0 < self.config.kv_cache_bytes < needed:
            raise ValueError(
                f"the prompt of {len(input_ids)} tokens with an answer of {num_new} takes {needed} bytes of keys and"
                f" values, more than {self.config.kv_cache_bytes = }; use fewer frames or a shorter answer"
            )
        length = 0 if request.prefix_key is None else prefix_length(token_kind)
        schema, matcher = request.sampling.json_schema, None
        if self.grammars is not None and schema is not None:
            matcher = self.grammars.matcher(schema)
        stop_texts = [stop for stop in request.sampling.stop if isinstance(stop, str)]
        active = ActiveRequest(
            id=RequestId(next(self._ids)),
            request=request,
            input_ids=input_ids,
            token_kind=token_kind,
            num_kept_vision=min((plan.num_kept for plan in plans.values()), default=num_vision),
            prefix_length=length,
            prefix_key=self._prefix_key(request, length),
            generator=torch.Generator().manual_seed(request.sampling.seed),
            text=TextStream(self._tokenizer, stop=stop_texts, closing=self._closing) if self._tokenizer else None,
            matcher=matcher,
            memory=memory,
        )
        self._requests[active.id] = active
        self.is_stalled = False
        return active.id

    def step(self) -> list[Event]:
        """Prefills a bounded number of prompt tokens, then decodes one token per slot."""
        kept = [event for events in self._undelivered.values() for event in events]
        self._undelivered.clear()
        return kept + self._advance()

    def stream(self, request_id: RequestId) -> Iterator[Event]:
        """Yields one request's events; other events are kept."""
        while True:
            for event in self._undelivered.pop(request_id, []):
                yield event
                if not isinstance(event, Token):
                    return
            if request_id not in self._requests:
                return
            for event in self._advance():
                self._undelivered.setdefault(event.request_id, []).append(event)

    def cancel(self, request_id: RequestId) -> bool:
        """Ends a request; the next step returns its Finished event. Returns False for ended or unknown requests."""
        active = self._requests.get(request_id)
        if active is None:
            return False
        self._release(active)
        self.is_stalled = False
        finished = Finished(request_id=request_id, reason="cancelled", text="", usage=active.usage())
        self._undelivered.setdefault(request_id, []).append(finished)
        return True

    @property
    def has_work(self) -> bool:
        return bool(self._requests or self._undelivered)

    def stats(self) -> EngineStats:
        num_waiting = len(self._in_state(RequestState.WAITING))
        return EngineStats(
            num_slots=self.config.num_slots,
            active_slots=len(self._requests) - num_waiting,
            queued_requests=num_waiting,
            cache_bytes=self._cache.num_bytes,
            kv_bytes=self._cache.kv_bytes,
            reserved_kv_bytes=sum(self._cache.slot_bytes(slot) for slot in range(self.config.num_slots)),
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=self._num_completion_tokens,
            vision_tokens=self._num_vision_tokens,
            kept_vision_tokens=self._num_kept_vision_tokens,
            answers=self._num_answers,
            prefix_hits=self._prefixes.num_hits,
            prefix_misses=self._prefixes.num_misses,
            prefix_evictions=self._prefixes.num_evictions,
            prefix_entries=len(self._prefixes),
            prefix_bytes=self._prefixes.num_bytes,
            prefix_host_hits=self._prefixes.num_host_hits,
            prefix_host_entries=self._prefixes.num_host_entries,
            prefix_host_bytes=self._prefixes.num_host_bytes,
        )

    def _in_state(self, state: RequestState) -> list[ActiveRequest]:
        return [active for active in self._requests.values() if active.state is state]

    @torch.inference_mode()
    def _advance(self) -> list[Event]:
        events = [*self._admit(), *self._prefill_chunks(), *self._decode()]
        prefills = [active.prefill for active in self._in_slots()]  # None: it decodes
        self.is_stalled = (
            not events and bool(prefills) and all(prefill is not None and prefill.is_waiting for prefill in prefills)
        )
        return events

    def _admit(self) -> list[Event]:
        """Gives slots in order of arrival: a long prompt waits for space, and no later one overtakes it."""
        events: list[Event] = []
        taken = {active.slot for active in self._requests.values()}
        free = [slot for slot in range(self.config.num_slots) if slot not in taken]
        for active in self._in_state(RequestState.WAITING):
            if not free:
                break
            if active.prefix_key is not None and self._prefixes.is_computing(active.prefix_key):
                continue
            shared = 0 if active.prefix_key is None else self._prefixes.shared_bytes(active.prefix_key)
            active.working_bytes = max(0, active.memory.working_bytes - shared)
            max_bytes = self._max_kv_bytes()
            if max_bytes is not None and not self._cache.has_space(active.memory.tokens, max_bytes):
                active.working_bytes = 0
                break
            active.slot = free[-1]  # the highest: running slots come first
            entry = None
            try:
                if active.prefix_key is not None:
                    active.lease = self._prefixes.lease(active.prefix_key)
                    entry = active.lease.entry
                active.prefill = self._new_prefill(active, entry, max_bytes)
            except Exception as error:  # noqa: BLE001 - no memory for so long a prompt: only this request fails
                if is_out_of_memory(error) and (self._prefixes.drop_idle() or self._in_slots(but=active)):
                    self._wait_again(active)  # until others end
                    break
                events.append(_failed(active.id, error))
                self._release(active)
                continue
            if entry is not None and not active.tokens:
                active.cached_tokens = entry.num_tokens
            active.state = RequestState.PREFILLING
            free.pop()
        return events

    def _max_kv_bytes(self) -> int | None:
        """Bytes for keys and values, less what TransV keeps of prompts; None = no limit."""
        if not self.config.kv_cache_bytes:
            return None
        return self.config.kv_cache_bytes - sum(active.working_bytes for active in self._requests.values())

    def _in_slots(self, *, but: ActiveRequest | None = None) -> list[ActiveRequest]:
        return [active for active in self._requests.values() if active.slot >= 0 and active is not but]

    def _new_prefill(self, active: ActiveRequest, prefix: PrefixEntry | None, max_bytes: int | None) -> Prefill:
        features = active.request.vision_features
        answer = torch.tensor(active.tokens, dtype=torch.long)  # not empty when the prompt is read again
        kinds = torch.full(answer.shape, TokenKind.RESPONSE, dtype=active.token_kind.dtype)
        return Prefill(
            self._model,
            torch.cat([active.input_ids, answer]).to(self._device),
            torch.cat([active.token_kind, kinds]).to(self._device),
            (lambda: [features]) if isinstance(features, Tensor) else features,
            self._cache,
            active.slot,
            max_chunk_tokens=self.config.max_prefill_tokens,
            # even without caching: equal chunks give equal bits
            boundary=active.prefix_length,
            prefix=prefix,
            on_prefix=None if active.lease is None or prefix is not None else active.lease.publish,
            max_new_tokens=active.num_tokens_left,
            max_bytes=max_bytes,
        )

    def _prefix_key(self, request: Request, length: int) -> Hashable | None:
        if not length or not self._prefixes.max_bytes:
            return None
        num_vision = request.prompt.num_vision_tokens
        num_system = length - num_vision
        needed = prefix_entry_bytes(self._model.config, num_system, num_vision, dtype=self._dtype)
        if needed > self._prefixes.max_bytes:
            return None
        return request.prefix_key, tuple(request.prompt.input_ids[:num_system]), num_vision

    def _prefill_chunks(self) -> list[Event]:
        """Prefills prompts in turn; a chunk over the budget comes first in the next step."""
        events: list[Event] = []
        budget = self.config.max_prefill_tokens
        for active in self._in_state(RequestState.PREFILLING):
            prefill = active.prefill
            assert prefill is not None
            before = prefill.num_read
            try:
                logits_V = prefill.advance(budget)
                if logits_V is not None:
                    events += self._start_answer(active, logits_V)
            except Exception as error:  # noqa: BLE001 - of its features or length: only this request fails
                if is_out_of_memory(error):
                    return events + self._end_longest([active])
                events.append(_failed(active.id, error))
                self._release(active)
                continue
            num_read = prefill.num_read - before
            budget -= num_read
            if logits_V is not None:
                continue
            if not num_read and not prefill.is_waiting:
                break
            self._requests[active.id] = self._requests.pop(active.id)
        return events

    def _start_answer(self, active: ActiveRequest, logits_V: Tensor) -> list[Event]:
        if active.lease is not None:
            active.lease.release()
        assert active.prefill is not None
        self._num_prompt_tokens += active.prefill.num_tokens - active.prefill.num_resumed
        active.prefill, active.working_bytes = None, 0
        self._graphs.end()
        self._move(active, len(self._in_state(RequestState.DECODING)))
        active.state = RequestState.DECODING
        return self._choose(logits_V[None], [active])

    def _move(self, active: ActiveRequest, slot: int) -> None:
        """Keeps the running slots contiguous from 0: otherwise every step copies their states."""
        if active.slot == slot:
            return
        self._graphs.end()
        self._cache.swap(active.slot, slot)
        for other in self._in_slots(but=active):
            if other.slot == slot:
                other.slot = active.slot
                if other.prefill is not None:
                    other.prefill.move(other.slot)
        active.slot = slot

    def _decode(self) -> list[Event]:
        rows = sorted(self._in_state(RequestState.DECODING), key=lambda active: active.slot)
        if not rows:
            return []
        try:
            return self._decode_step(rows)
        except Exception as error:  # CUDA reports memory by several types
            if not is_out_of_memory(error):
                raise
            return self._end_longest(rows)

    def _end_longest(self, changed: Sequence[ActiveRequest]) -> list[Event]:
        """Ends one request after the device ran out of memory.

        The failed pass may have altered the states of `changed`: these requests are read again, answers included.
        """
        self._prefixes.drop_idle()
        active = self._in_slots()
        longest = max(active, key=lambda request: (self._cache.slot_bytes(request.slot), request.id))
        logger.warning("out of memory: ending the longest of %d requests, reading %d again", len(active), len(changed))
        self._release(longest)
        for request in reversed(changed):
            if request is not longest:
                self._wait_again(request)
        num_tokens = len(longest.input_ids) + len(longest.tokens)
        error = f"out of memory: this request of {num_tokens} tokens was the longest of {len(active)}; use fewer frames"
        return [Failed(request_id=longest.id, error=error, is_out_of_memory=True)]

    def _wait_again(self, active: ActiveRequest) -> None:
        """Puts a request first in the queue."""
        self._vacate(active)
        active.prefill, active.lease, active.working_bytes = None, None, 0
        active.state = RequestState.WAITING
        others = {key: other for key, other in self._requests.items() if other is not active}
        self._requests = {active.id: active, **others}

    def _decode_step(self, rows: Sequence[ActiveRequest]) -> list[Event]:
        graph = self._graphs.graph(rows)
        if graph is not None:
            graph.step()
            return self._accept_all(rows, graph.sampled())
        ids_B = torch.tensor([active.tokens[-1] for active in rows], device=self._device)
        slots_B = torch.tensor([active.slot for active in rows])
        return self._choose(self._model.decode_step(ids_B, self._cache, slots_B), rows)

    def _choose(self, logits_BV: Tensor, rows: Sequence[ActiveRequest]) -> list[Event]:
        params, generators = [row.request.sampling for row in rows], [row.generator for row in rows]
        allowed_BV = allowed_tokens([row.matcher for row in rows], logits_BV.shape[1])
        return self._accept_all(rows, sample_tokens(logits_BV, params, generators, allowed_BV))

    def _accept_all(self, rows: Sequence[ActiveRequest], sampled: Sequence[SampledToken]) -> list[Event]:
        events: list[Event] = []
        for active, token in zip(rows, sampled, strict=True):
            if not token.is_finite:
                self._release(active)
                events.append(Failed(request_id=active.id, error="the model's logits are not finite"))
                continue
            try:
                events += self._accept(active, token)
            except Exception as error:  # noqa: BLE001 - of its text: only this request fails
                events.append(_failed(active.id, error))
                self._release(active)
        return events

    def _accept(self, active: ActiveRequest, token: SampledToken) -> list[Event]:
        events = active.accept(token, self.end_token_ids)
        self._num_completion_tokens += 1
        if len(active.tokens) == 1:
            self._num_answers += 1
            self._num_vision_tokens += active.request.prompt.num_vision_tokens
            self._num_kept_vision_tokens += active.num_kept_vision
        if isinstance(events[-1], Finished):
            self._release(active)
        return events

    def _release(self, active: ActiveRequest) -> None:
        """Frees the slot. Safe to repeat."""
        if self._requests.pop(active.id, None) is None:
            return
        self._vacate(active)

    def _vacate(self, active: ActiveRequest) -> None:
        if active.lease is not None:
            active.lease.release()
        if active.slot < 0:
            return
        self._graphs.end()
        self._cache.reset(active.slot)
        if active.state is RequestState.DECODING:
            last = max(self._in_state(RequestState.DECODING), key=lambda other: other.slot, default=active)
            if last.slot > active.slot:
                self._move(last, active.slot)
        active.slot = -1


def _failed(request_id: RequestId, error: Exception) -> Failed:
    """Raises `error` itself if it is torch.AcceleratorError, because the device then fails for all requests."""
    if isinstance(error, torch.AcceleratorError):
        raise error
    return Failed(request_id=request_id, error=f"{type(error).__name__}: {error}")
