"""The engine service: answers conversations with feature references. Does not import Ray."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from timeviper_model.batching.batch import Sample
from timeviper_model.batching.prompt import ChatTemplate, Turn, add_time_texts, build_sample, time_text, unused_marker
from timeviper_model.batching.tokenizer_template import chat_template
from timeviper_model.config import TimeViperConfig
from timeviper_model.inference.engine import InferenceEngine
from timeviper_model.inference.memory import serving_bytes
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
)
from timeviper_model.layers.backends import Backend, set_backend
from timeviper_model.weights.metadata import trained_time_text
from timeviper_model.weights.weights_folder import from_pretrained, load_config, load_tokenizer
from timeviper_platform.common.devices import Dtype, free_bytes, torch_device, torch_dtype
from timeviper_platform.common.logs import log_event
from timeviper_platform.common.machine_cache import CONFIG_FILES, local_copy
from timeviper_platform.serving.engine.engine_thread import EngineThread
from timeviper_platform.serving.engine.media_feed import MediaFeed, ReadFeatures
from timeviper_platform.serving.messages import (
    AnswerDelta,
    ChatTurn,
    FeatureReference,
    GenerateRequest,
    Refusal,
    TokenLogprob,
)
from timeviper_platform.serving.tracing import AnswerSpans

logger = logging.getLogger(__name__)

DELTA_MS = 10.0
"""Milliseconds between deltas of all streams of a replica. A delta costs 4 ms of CPU in engine, gateway and proxy."""
MAX_COALESCE_MS = 250.0


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineServiceConfig:
    device: str = "cpu"
    """PyTorch device."""
    dtype: Dtype = "float32"
    """Type of weights and activations."""
    backend: Backend = "auto"
    """Implementation of scans, convolutions and attention. `kernels` needs CUDA; `auto` uses kernels where they run."""
    num_threads: int = 0
    """PyTorch's CPU threads; 0 = its default."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    coalesce_ms: float = 30.0
    """Minimum milliseconds between deltas, more for many streams; 0 = send every token. First and last tokens do not
    wait.
    """


def check_memory(model: TimeViperConfig, config: EngineServiceConfig) -> None:
    """Raises ValueError if the engine, once full, does not fit into its device's free memory."""
    device = torch_device(config.device)
    needed = serving_bytes(model, config.engine, dtype=torch_dtype(config.dtype), device_type=device.type)
    free = free_bytes(device)
    logger.info("a full engine takes %s; %s has %.2f GB free", needed, device, free / 1e9)
    if needed.total > free:
        raise ValueError(
            f"a full engine takes {needed}, but {device} has {free / 1e9:.2f} GB free; lower engine.kv_cache_bytes (0 ="
            " every slot holds the longest prompt), num_slots, max_prompt_tokens or prefix_cache_bytes"
        )


class EngineService:
    def __init__(
        self,
        weights: str,
        config: EngineServiceConfig,
        read: ReadFeatures,
        on_first_token: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """Loads the weights of any URI. `on_first_token` receives the seconds from a request to a first token."""
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        self._config = config
        self._read = read
        self._on_first_token = on_first_token
        dtype = torch_dtype(config.dtype)
        check_memory(load_config(local_copy(weights, CONFIG_FILES)), config)
        weights = local_copy(weights)
        model = from_pretrained(weights, dtype=dtype, device=config.device).eval()
        set_backend(model, config.backend, device=config.device, dtype=dtype)
        self._trained_time_text = trained_time_text(weights)
        # two tokenizers: a fast tokenizer must not be called from two threads at once
        self._tokenizer = load_tokenizer(weights)
        self._template = chat_template(model.config.chat_template, self._tokenizer)
        self._engine = InferenceEngine(model, config.engine, tokenizer=load_tokenizer(weights))
        self._ongoing = 0
        self._thread = EngineThread(
            self._engine, delivery_s=lambda: coalesce_seconds(self._config.coalesce_ms, self._ongoing)
        )
        self._prompts = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prompt")
        logger.info("serving %s with %d slots", weights, config.engine.num_slots)

    def set_limits(self, config: EngineServiceConfig) -> None:
        """Applies another queue and `coalesce_ms` to later requests. Other values must not have changed."""
        self._config = config
        self._engine.config = config.engine

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[AnswerDelta | Refusal]:
        """See `EngineClient.generate`."""
        limits = self._config.engine
        if self._ongoing + request.n > limits.num_slots + limits.max_queued_requests:
            yield _busy()
            return
        self._ongoing += request.n
        began = time.monotonic()
        try:
            feed: MediaFeed | None = MediaFeed(request.media, self._read, self._thread.wake)
            while feed is not None:
                answers, recounted = self._answers(request, feed, began), None
                async with aclosing(answers):  # closing a generator does not close the one it iterates over
                    async for item in answers:
                        if isinstance(item, MediaFeed):
                            recounted = item
                        else:
                            yield item
                feed = recounted
        finally:
            self._ongoing -= request.n

    async def is_ready(self) -> bool:
        return self._thread.error is None

    async def stats(self) -> EngineStats:
        return await self._thread.stats()

    def check_health(self) -> None:
        """Raises RuntimeError when the engine has failed; Ray Serve then replaces the replica."""
        if self._thread.error is not None:
            raise RuntimeError(self._thread.error)

    def stop(self) -> None:
        self._thread.stop()
        self._prompts.shutdown(wait=False, cancel_futures=True)

    async def _requests(self, request: GenerateRequest, feed: MediaFeed) -> list[Request] | Refusal:
        loop = asyncio.get_running_loop()
        try:
            sample = await loop.run_in_executor(self._prompts, self._prompt, request)
        except ValueError as error:
            return Refusal(status=400, message=str(error), code="invalid_value", param="messages")
        schema, grammars = request.sampling.json_schema, self._engine.grammars
        if schema is not None and grammars is not None:
            try:  # in this thread, because a large schema takes longer than a step
                await loop.run_in_executor(self._prompts, grammars.matcher, schema)
            except ValueError as error:
                return Refusal(status=400, message=str(error), code="invalid_schema", param="response_format")
        features = feed.blocks if feed.media else torch.zeros(0, self._engine.feature_size)
        return [
            Request(
                prompt=sample,
                vision_features=features,
                sampling=replace(request.sampling, seed=request.sampling.seed + number),
                prefix_key=prefix_key(request.tenant, feed.media),
            )
            for number in range(request.n)
        ]

    def _prompt(self, request: GenerateRequest) -> Sample:
        states_length = request.time_text
        if states_length is None:  # as in training
            trained = self._trained_time_text
            states_length = trained == "always" or (trained == "temporal" and request.is_temporal)
        return build_prompt(
            self._tokenizer,
            request.turns,
            self._template,
            with_time_text=states_length,
            answer_prefix=request.answer_prefix,
        )

    async def _answers(
        self, request: GenerateRequest, feed: MediaFeed, began: float
    ) -> AsyncGenerator[AnswerDelta | Refusal | MediaFeed]:
        """Yields only a feed when frames that the prompt counts are missing."""
        spans = AnswerSpans()
        try:
            outcome = None if feed.is_streamed else await feed.outcome
            requests = await self._requests(request.with_media(feed.media), feed) if outcome is None else outcome
            if not isinstance(requests, list):
                yield requests
                return
            try:
                ids, events = await self._thread.submit(requests)
            except QueueFull:
                yield _busy()
                return
            except ValueError as error:
                yield Refusal(status=400, message=str(error), code="context_length_exceeded", param="messages")
                return
            except RuntimeError as error:
                yield Refusal(status=503, message=str(error), code="engine_failed", retry_after_s=5.0)
                return
            try:
                with_logprobs = request.sampling.num_logprobs is not None
                deltas = self._deltas(
                    ids, events, feed, began, spans, with_logprobs=with_logprobs, http_request_id=request.request_id
                )
                async with aclosing(deltas):
                    async for item in deltas:
                        yield item
            finally:
                self._thread.cancel(ids)
        finally:
            spans.end()
            feed.close()

    async def _deltas(
        self,
        ids: Sequence[RequestId],
        events: asyncio.Queue[list[Event]],
        feed: MediaFeed,
        began: float,
        spans: AnswerSpans,
        *,
        with_logprobs: bool,
        http_request_id: str,
    ) -> AsyncGenerator[AnswerDelta | Refusal | MediaFeed]:
        unfinished, without_token = len(ids), set(ids)
        batch = await _first(events, feed)
        if isinstance(batch, Refusal | MediaFeed):
            if isinstance(batch, Refusal):
                spans.refused(batch.code)
            yield batch
            return
        while unfinished:
            for index, request_id in enumerate(ids):
                own = [event for event in batch if event.request_id == request_id]
                if not own:
                    continue
                if isinstance(own[-1], Failed):
                    log_event(logger, logging.ERROR, "failure", request_id=http_request_id, error=own[-1].error)
                    message, code = "the model failed on this request", "generation_failed"
                    if own[-1].is_out_of_memory:
                        message, code = own[-1].error, "out_of_memory"
                    spans.refused(code)
                    yield Refusal(status=503, message=message, code=code)
                    return
                if request_id in without_token and isinstance(own[0], Token):
                    without_token.remove(request_id)
                    spans.first_token()
                    self._on_first_token(time.monotonic() - began)
                delta = self._delta(index, own, with_logprobs=with_logprobs)
                if delta.usage is not None:
                    spans.finished(delta.usage)
                unfinished -= delta.finish_reason is not None
                if delta.text or delta.logprobs or delta.finish_reason is not None:
                    yield delta
            batch = await events.get() if unfinished else []
            while not events.empty():  # the reader is slow
                batch += events.get_nowait()

    def _delta(self, index: int, events: Sequence[Event], *, with_logprobs: bool) -> AnswerDelta:
        tokens = [event for event in events if isinstance(event, Token)]
        last = events[-1]
        finished = last if isinstance(last, Finished) else None
        shown = [token for token in tokens if token.id not in self._engine.end_token_ids] if with_logprobs else []
        return AnswerDelta(
            index=index,
            text="".join(token.text for token in tokens) + (finished.text if finished else ""),
            logprobs=tuple(self._logprob(token) for token in shown),
            finish_reason=None if finished is None else "length" if finished.reason == "length" else "stop",
            usage=None if finished is None else finished.usage,
        )

    def _logprob(self, token: Token) -> TokenLogprob:
        top = tuple((self._token_text(token_id), logprob) for token_id, logprob in token.top_logprobs)
        return TokenLogprob(token=self._token_text(token.id), logprob=token.logprob, top=top)

    def _token_text(self, token_id: int) -> str:
        return str(self._tokenizer.decode([token_id]))


def coalesce_seconds(coalesce_ms: float, num_streams: int) -> float:
    """Returns the seconds between two deltas of a stream; many streams send fewer each."""
    return max(coalesce_ms, min(DELTA_MS * num_streams, MAX_COALESCE_MS)) / 1000 if coalesce_ms else 0.0


def build_prompt(
    tokenizer: Any,
    turns: Sequence[ChatTurn],
    template: ChatTemplate,
    *,
    with_time_text: bool = False,
    answer_prefix: str = "",
) -> Sample:
    """Builds the prompt up to the assistant's turn, or up to the given start of its answer.

    Raises:
        ValueError: for turns out of order.
    """
    marker = unused_marker([turn.text for turn in turns])
    conversation = [Turn(role=turn.role, text=turn.marked_text(marker)) for turn in turns]
    if with_time_text:
        times = [_time_text(medium) for turn in turns for medium in turn.media]
        conversation = add_time_texts(conversation, times, marker=marker)
    num_tokens = [medium.num_frames * medium.num_tokens_per_frame for turn in turns for medium in turn.media]
    return build_sample(
        tokenizer,
        conversation,
        num_tokens,
        template=template,
        add_generation_prompt=True,
        marker=marker,
        answer_prefix=answer_prefix,
    )


def prefix_key(tenant: str, media: Sequence[FeatureReference]) -> str | None:
    """Returns the key of the media in the video-prefix cache; None without media.

    The engine adds the tokens before the media.
    """
    if not media:
        return None
    return hashlib.sha256(json.dumps([tenant, *(reference.key for reference in media)]).encode()).hexdigest()


def _time_text(medium: FeatureReference) -> str:
    return time_text(medium.duration_seconds, medium.num_frames) if medium.modality == "video" else ""


async def _first(events: asyncio.Queue[list[Event]], feed: MediaFeed) -> list[Event] | Refusal | MediaFeed:
    """Returns the first events, unless the feed has ended the request before a token."""
    batch = asyncio.ensure_future(events.get())
    try:
        waiting: set[asyncio.Future[Any]] = {batch, feed.outcome}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        outcome = feed.outcome.result() if feed.outcome.done() else None
        if outcome is not None and not (batch.done() and isinstance(batch.result()[0], Token)):
            return outcome
        return await batch
    finally:
        batch.cancel()


def _busy() -> Refusal:
    return Refusal(
        status=429, message="all slots are taken and the queue is full, try again", code="busy", retry_after_s=1.0
    )
