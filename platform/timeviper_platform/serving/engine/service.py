"""EngineService: conversations with feature references in, parts of answers out.

Builds prompts, hands them to the engine's own thread, gathers tokens for some milliseconds into one part, and frees the
slots when the caller goes. Knows tokenizer, weights and engine; nothing of HTTP, files or decoding, and Ray only as a
function that fetches a reference.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from timeviper_model.batching.batch import Sample
from timeviper_model.batching.prompt import MEDIA_MARKER, TEMPLATES, ChatTemplate, Turn, build_sample, time_text
from timeviper_model.inference.engine import InferenceEngine
from timeviper_model.inference.requests import (
    EngineConfig,
    EngineStats,
    Event,
    Failed,
    Finished,
    QueueFull,
    Request,
    Token,
)
from timeviper_model.layers.backends import Backend, set_backend
from timeviper_model.weights.weights_folder import from_pretrained, load_tokenizer
from timeviper_platform.serving.engine.engine_thread import EngineThread
from timeviper_platform.serving.messages import (
    AnswerDelta,
    ChatTurn,
    FeatureReference,
    GenerateRequest,
    Refusal,
    TokenLogprob,
)

logger = logging.getLogger(__name__)

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineServiceConfig:
    """How the weights are run."""

    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    backend: Backend = "auto"
    """what computes scans, convolutions and attention: CUDA kernels where they can be used (auto), torch, or kernels
    or an error"""
    num_threads: int = 0
    """of PyTorch on the CPU; 0 = its own choice"""
    engine: EngineConfig = field(default_factory=EngineConfig)
    time_text: bool = False
    """tell the model each video's length and number of frames; on for weights that were trained so"""
    coalesce_ms: float = 30.0
    """tokens are gathered this long into one part; the first goes out at once"""


class EngineService:
    """One replica: weights, tokenizer, engine and its thread."""

    def __init__(
        self,
        weights: str,
        config: EngineServiceConfig,
        fetch: Callable[[FeatureReference], Awaitable[np.ndarray]],
    ) -> None:
        """Args:
        weights: folder of `jobs/export.py`.
        fetch: the array behind a reference; raises RuntimeError when it is lost.
        """
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        self._config = config
        self._fetch = fetch
        model = from_pretrained(weights, dtype=DTYPES[config.dtype], device=config.device).eval()
        set_backend(model, config.backend, device=config.device, dtype=DTYPES[config.dtype])
        self._template = TEMPLATES[model.config.chat_template]
        # two tokenizers: a fast tokenizer may not be called from two threads at once
        self._tokenizer = load_tokenizer(weights)
        self._engine = InferenceEngine(model, config.engine, tokenizer=load_tokenizer(weights))
        self._loop = EngineThread(self._engine)
        self._prompts = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prompt")
        self._ongoing = 0
        logger.info("serving %s with %d slots", weights, config.engine.num_slots)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[AnswerDelta | Refusal]:
        """Parts of the answers as they come. A Refusal is the last item; closing this frees the slots."""
        limits = self._config.engine
        if self._ongoing + request.n > limits.num_slots + limits.max_queued_requests:
            yield _busy()
            return
        self._ongoing += request.n
        try:
            requests = await self._requests(request)
            if isinstance(requests, Refusal):
                yield requests
                return
            answers = self._answers(requests, with_logprobs=request.sampling.num_logprobs is not None)
            async with aclosing(answers):  # a generator that is closed does not close the one it iterates over
                async for item in answers:
                    yield item
        finally:
            self._ongoing -= request.n

    async def is_ready(self) -> bool:
        """True while the engine runs."""
        return self._loop.error is None

    async def stats(self) -> EngineStats:
        """The engine's counts."""
        return await self._loop.stats()

    def check_health(self) -> None:
        """Ray Serve replaces the replica when this raises."""
        if self._loop.error is not None:
            raise RuntimeError(self._loop.error)

    def stop(self) -> None:
        """Ends the engine's thread."""
        self._loop.stop()
        self._prompts.shutdown(wait=False, cancel_futures=True)

    async def _requests(self, request: GenerateRequest) -> list[Request] | Refusal:
        """One engine request for each of the `n` answers."""
        media = [reference for turn in request.turns for reference in turn.media]
        try:
            arrays = await asyncio.gather(*(self._fetch(reference) for reference in media))
        except RuntimeError as error:
            logger.warning("features are gone: %s", type(error).__name__)
            return Refusal(status=503, message="the video's features were lost, ask again", code="features_lost")
        loop = asyncio.get_running_loop()
        try:
            sample = await loop.run_in_executor(self._prompts, self._prompt, request.turns)
        except ValueError as error:
            return Refusal(status=400, message=str(error), code="invalid_value", param="messages")
        features = _rows(arrays)
        if features is None:
            features = torch.zeros(0, self._engine.feature_size)
        return [
            Request(
                prompt=sample,
                vision_features=features,
                sampling=replace(request.sampling, seed=request.sampling.seed + number),
                prefix_key=prefix_key(request.tenant, media),
            )
            for number in range(request.n)
        ]

    def _prompt(self, turns: Sequence[ChatTurn]) -> Sample:
        return build_prompt(self._tokenizer, turns, self._template, with_time_text=self._config.time_text)

    async def _answers(self, requests: list[Request], *, with_logprobs: bool) -> AsyncGenerator[AnswerDelta | Refusal]:
        try:
            ids, events = await self._loop.submit(requests)
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
            parts = self._parts(events, len(requests), with_logprobs=with_logprobs)
            async with aclosing(parts):
                async for item in parts:
                    yield item
        finally:
            self._loop.cancel(ids)

    async def _parts(
        self, events: asyncio.Queue[tuple[int, Event]], num_answers: int, *, with_logprobs: bool
    ) -> AsyncGenerator[AnswerDelta | Refusal]:
        """Events gathered into parts: the first token at once, then what came within `coalesce_ms`."""
        loop = asyncio.get_running_loop()
        unfinished = num_answers
        next_send = loop.time()
        while unfinished:
            batch = [await events.get()]
            if (wait_s := next_send - loop.time()) > 0:
                await asyncio.sleep(wait_s)
            while not events.empty():
                batch.append(events.get_nowait())
            for index in sorted({index for index, _ in batch}):
                own = [event for place, event in batch if place == index]
                if isinstance(own[-1], Failed):
                    logger.error("request %d failed: %s", own[-1].request_id, own[-1].error)
                    yield Refusal(status=503, message="the model failed on this request", code="generation_failed")
                    return
                part = self._part(index, own, with_logprobs=with_logprobs)
                unfinished -= part.finish_reason is not None
                if part.text or part.logprobs or part.finish_reason is not None:
                    yield part
            next_send = loop.time() + self._config.coalesce_ms / 1000

    def _part(self, index: int, events: Sequence[Event], *, with_logprobs: bool) -> AnswerDelta:
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


def build_prompt(
    tokenizer: Any, turns: Sequence[ChatTurn], template: ChatTemplate, *, with_time_text: bool = False
) -> Sample:
    """The prompt of a conversation, ready for an answer. A turn's media stand before its text, as in training.

    Raises:
        ValueError: for turns out of order, or a text that holds the marker for media.
    """
    conversation = []
    for turn in turns:
        if MEDIA_MARKER in turn.text:
            raise ValueError(f"a text may not hold {MEDIA_MARKER}, which stands for media inside the server")
        text = turn.text
        if turn.role == "user":
            media = [MEDIA_MARKER + (_time_text(medium) if with_time_text else "") for medium in turn.media]
            text = "".join(media) + text
        conversation.append(Turn(role=turn.role, text=text))
    num_tokens = [medium.num_frames * medium.num_tokens_per_frame for turn in turns for medium in turn.media]
    return build_sample(tokenizer, conversation, num_tokens, template=template, add_generation_prompt=True)


def prefix_key(tenant: str, media: Sequence[FeatureReference]) -> str | None:
    """Names what the engine may keep of a conversation's media for the next question; None without media.

    A reference's key stands for content, encoder recipe and frames. The engine adds the tokens before the media
    (template and system text); weights, dtype and TransV plan are the one engine's that owns the cache.
    """
    if not media:
        return None
    return hashlib.sha256(json.dumps([tenant, *(reference.key for reference in media)]).encode()).hexdigest()


def _time_text(medium: FeatureReference) -> str:
    return time_text(medium.duration_seconds, medium.num_frames) if medium.modality == "video" else ""


def _rows(arrays: Sequence[np.ndarray]) -> Tensor | None:
    """(V, dim) bfloat16 rows of all media; None without any."""
    if not arrays:
        return None
    # a copy: arrays from the object store are read-only, and PyTorch has no read-only tensors
    parts = [torch.from_numpy(array.copy()).view(torch.bfloat16).flatten(0, 1) for array in arrays]
    return torch.cat(parts)


def _busy() -> Refusal:
    return Refusal(
        status=429, message="all slots and places in the queue are taken, try again", code="busy", retry_after_s=1.0
    )
