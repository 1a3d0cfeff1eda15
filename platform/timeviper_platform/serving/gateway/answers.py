"""Answers conversations, whole or streamed, for both of OpenAI's APIs and for jobs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from timeviper_platform.serving.gateway.bodies import Bodies
from timeviper_platform.serving.gateway.chat import ChatPreparation
from timeviper_platform.serving.gateway.chat_request import (
    ChatCompletionRequest,
    chat_request,
    parse_chat_request,
    parse_object,
)
from timeviper_platform.serving.gateway.config import ApiKey, CurrentConfig, GatewayConfig
from timeviper_platform.serving.gateway.connections import MAX_REQUEST_ID
from timeviper_platform.serving.gateway.keys import Quotas
from timeviper_platform.serving.gateway.middleware import GatewayMetrics
from timeviper_platform.serving.gateway.openai_protocol import ApiError, ChatStream, Completion
from timeviper_platform.serving.gateway.responses import ResponseAnswer, chat_values
from timeviper_platform.serving.messages import (
    AnswerDelta,
    EngineClient,
    FeatureProgress,
    Refusal,
)

_CONTENT_TYPE = "text/event-stream; charset=utf-8"
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the second: nginx passes events on at once
KEEP_ALIVE_S = 15.0
"""Seconds without a first text after which a stream begins with comments. Load balancers cut connections that are
silent for 60 s, and a long video takes longer."""
_KEEP_ALIVE = b": reading the media\n\n"


class _Running(NamedTuple):
    """Answers whose first text has arrived."""

    completion: Completion
    first: AnswerDelta
    deltas: AsyncGenerator[AnswerDelta]
    deadline: float


class Answers:
    def __init__(
        self,
        current: CurrentConfig,
        preparation: ChatPreparation,
        engine: EngineClient,
        bodies: Bodies,
        metrics: GatewayMetrics,
        quotas: Quotas,
    ) -> None:
        self._current = current
        self._preparation = preparation
        self._engine = engine
        self._bodies = bodies
        self._metrics = metrics
        self._quotas = quotas

    @property
    def _config(self) -> GatewayConfig:
        return self._current.config

    async def chat_completions(self, request: Request) -> Response:
        parse = partial(parse_chat_request, max_parts=self._config.max_parts_per_request)
        chat = await self._bodies.parsed(request, parse)
        completion = _completion_of(chat)
        if not chat.stream:
            await self._collect(await self._start(chat, completion, request))
            return JSONResponse(completion.response())
        include_usage = chat.stream_options is not None and chat.stream_options.include_usage
        return await self._streamed(chat, completion, request, ChatStream(completion, include_usage=include_usage))

    async def answer_for_job(
        self, chat: ChatCompletionRequest, tenant: str, key: ApiKey | None, note: Callable[[FeatureProgress], None]
    ) -> dict[str, Any]:
        """Returns a whole answer, without a deadline."""
        self.check_model(chat.model)
        self._quotas.require_frames(key)
        generate = await self._preparation.prepare(chat, tenant, note=note)
        self._quotas.add_frames(key, total := generate.num_frames)
        note(FeatureProgress(stage="answering", frames_done=total, frames_total=total))
        completion = _completion_of(chat)
        if generate.is_temporal:
            completion.show_media(generate.media)
        async with contextlib.aclosing(_checked(self._engine.generate(generate))) as deltas:
            async for delta in deltas:
                completion.add(delta)
        self._metrics.add_usage(completion.usage())
        return completion.response()

    async def create_response(self, request: Request) -> Response:
        """Answers in the Responses API, whole or streamed. Nothing is stored."""

        def parse(body: bytes) -> tuple[dict[str, Any], ChatCompletionRequest]:
            values = parse_object(body)
            return values, chat_request(chat_values(values), max_parts=self._config.max_parts_per_request)

        values, chat = await self._bodies.parsed(request, parse)
        completion = _completion_of(chat)
        answer = ResponseAnswer(completion, values)
        if not chat.stream:
            await self._collect(await self._start(chat, completion, request))
            return JSONResponse(answer.response())
        return await self._streamed(chat, completion, request, answer)

    async def _start(self, chat: ChatCompletionRequest, completion: Completion, request: Request) -> _Running:
        """Returns the answers once the first text has arrived, so that refusals have their own status."""
        self.check_model(chat.model)
        if chat.has_media:
            self._quotas.require_frames(request.state.key)
        began = asyncio.get_running_loop().time()
        deadline = began + self._config.request_timeout_s
        with self._timed():
            async with asyncio.timeout_at(deadline):
                try:
                    running = await self._first(chat, completion, request, deadline)
                except ApiError as error:
                    if error.code != "features_lost":  # their replica has died or forgotten them
                        raise
                    running = await self._first(chat, completion, request, deadline, whole=True)
        self._metrics.add_first_text(asyncio.get_running_loop().time() - began)
        return running

    async def _first(
        self,
        chat: ChatCompletionRequest,
        completion: Completion,
        request: Request,
        deadline: float,
        *,
        whole: bool = False,
    ) -> _Running:
        generate = await self._preparation.prepare(chat, request.state.tenant, whole=whole)
        if not whole:
            self._quotas.add_frames(request.state.key, generate.num_frames)
        if generate.is_temporal:
            completion.show_media(generate.media)
        generate = replace(generate, request_id=request.headers.get("x-request-id", "")[:MAX_REQUEST_ID])
        deltas = _checked(self._engine.generate(generate))
        completion.add(first := await anext(deltas))
        return _Running(completion, first, deltas, deadline)

    async def _collect(self, running: _Running) -> None:
        """Waits for the whole answers; closes them even when cancelled."""
        with self._timed():
            async with contextlib.aclosing(running.deltas), asyncio.timeout_at(running.deadline):
                while not running.completion.is_finished:
                    running.completion.add(await _next(running.deltas))
        self._metrics.add_usage(running.completion.usage())

    async def _streamed(
        self, chat: ChatCompletionRequest, completion: Completion, request: Request, answer: ChatStream | ResponseAnswer
    ) -> Response:
        """Begins a stream with the first text. If that takes long, comments come first, and a refusal is an event."""
        start = asyncio.create_task(self._start(chat, completion, request))
        try:
            await asyncio.wait({start}, timeout=KEEP_ALIVE_S)
        except asyncio.CancelledError:
            await _abandon(start)
            raise
        events = self._events(start.result(), answer) if start.done() else self._late_events(start, answer)
        return StreamingResponse(events, media_type=_CONTENT_TYPE, headers=_STREAM_HEADERS)

    async def _late_events(
        self, start: asyncio.Task[_Running], answer: ChatStream | ResponseAnswer
    ) -> AsyncGenerator[bytes]:
        """Yields comments until the first text has arrived, then the events."""
        try:
            while not start.done():
                yield _KEEP_ALIVE
                await asyncio.wait({start}, timeout=KEEP_ALIVE_S)
        except BaseException:
            await _abandon(start)
            raise
        try:
            running = start.result()
        except ApiError as error:
            yield answer.error(error)
            return
        async with contextlib.aclosing(self._events(running, answer)) as events:
            async for event in events:
                yield event

    async def _events(self, running: _Running, answer: ChatStream | ResponseAnswer) -> AsyncGenerator[bytes]:
        """Yields server-sent events. Closing the generator, as on a disconnect, frees the slots."""
        async with contextlib.aclosing(running.deltas):
            try:
                yield answer.opening() + answer.delta(running.first)
                while not running.completion.is_finished:
                    with self._timed():
                        async with asyncio.timeout_at(running.deadline):
                            delta = await _next(running.deltas)
                    running.completion.add(delta)
                    yield answer.delta(delta)
            except ApiError as error:
                yield answer.error(error)
                return
        self._metrics.add_usage(running.completion.usage())
        yield answer.end()

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        """Turns a timeout into a 408."""
        try:
            yield
        except TimeoutError:
            text = f"not answered within {self._config.request_timeout_s:g} s"
            raise ApiError(408, text, code="timeout") from None

    def check_model(self, model: str) -> None:
        if model != self._config.model_name:
            name = self._config.model_name
            raise ApiError(404, f"unknown model; use {name!r}", code="model_not_found", param="model")


def _completion_of(chat: ChatCompletionRequest) -> Completion:
    return Completion(chat.model, num_choices=chat.n or 1, with_logprobs=bool(chat.logprobs))


async def _abandon(start: asyncio.Task[_Running]) -> None:
    """Cancels answers that nobody waits for, even if their first text has just arrived."""
    start.cancel()
    await asyncio.wait({start})
    if not start.cancelled() and start.exception() is None:
        await start.result().deltas.aclose()


async def _next(deltas: AsyncGenerator[AnswerDelta]) -> AnswerDelta:
    """Raises ApiError when the service has ended an unfinished answer."""
    delta = await anext(deltas, None)
    if delta is None:
        raise ApiError(503, "the answer ended early, try again", code="unavailable", retry_after_s=1.0)
    return delta


async def _checked(items: AsyncIterator[AnswerDelta | Refusal]) -> AsyncGenerator[AnswerDelta]:
    """Yields deltas; raises ApiError for a refusal."""
    try:
        async for item in items:
            if isinstance(item, Refusal):
                raise ApiError.from_refusal(item)
            yield item
    finally:
        close: Callable[[], Awaitable[None]] | None = getattr(items, "aclose", None)
        if close is not None:
            await close()
