"""An ASGI application with OpenAI's routes. Imports neither torch nor Ray."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.types import ASGIApp

from timeviper_platform.serving.gateway.chat import ChatPreparation
from timeviper_platform.serving.gateway.config import GatewayConfig
from timeviper_platform.serving.gateway.middleware import GatewayMetrics, RequestGuard
from timeviper_platform.serving.gateway.openai_protocol import ApiError, Completion, parse_chat_request, sse
from timeviper_platform.serving.gateway.uploads import MediaStore, no_such_file
from timeviper_platform.serving.messages import AnswerDelta, EngineClient, FeatureClient, Refusal

_CONTENT_TYPE = "text/event-stream; charset=utf-8"


def create_app(config: GatewayConfig, features: FeatureClient, engine: EngineClient) -> ASGIApp:
    metrics = GatewayMetrics()
    gateway = _Gateway(config, features, engine, metrics)
    api = FastAPI(title="TimeViper", docs_url=None, redoc_url=None)  # their pages load scripts from a CDN
    api.add_api_route("/v1/chat/completions", gateway.chat_completions, methods=["POST"], response_model=None)
    api.add_api_route("/v1/models", gateway.list_models, methods=["GET"])
    api.add_api_route("/v1/models/{model:path}", gateway.get_model, methods=["GET"])
    api.add_api_route("/v1/files", gateway.create_file, methods=["POST"])
    api.add_api_route("/v1/files", gateway.list_files, methods=["GET"])
    api.add_api_route("/v1/files/{file_id}", gateway.get_file, methods=["GET"])
    api.add_api_route("/v1/files/{file_id}", gateway.delete_file, methods=["DELETE"])
    api.add_api_route("/health/live", gateway.live, methods=["GET"])
    api.add_api_route("/health/ready", gateway.ready, methods=["GET"])
    api.add_api_route("/metrics", lambda: PlainTextResponse(metrics.render()), methods=["GET"])
    api.add_exception_handler(ApiError, _answer_api_error)
    api.add_exception_handler(HTTPException, _answer_http_exception)
    api.add_middleware(RequestGuard, config=config, metrics=metrics)
    return api


async def _answer_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers())


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """Answers the framework's errors, such as an unknown route."""
    assert isinstance(error, HTTPException)
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    api_error = ApiError(error.status_code, str(error.detail), code=code)
    return JSONResponse(api_error.body(), error.status_code, error.headers)


class _Gateway:
    def __init__(
        self, config: GatewayConfig, features: FeatureClient, engine: EngineClient, metrics: GatewayMetrics
    ) -> None:
        self._config = config
        self._metrics = metrics
        self._features = features
        self._engine = engine
        self._store = MediaStore(config.media_root)
        self._preparation = ChatPreparation(config, features, self._store)
        self._created = int(time.time())

    async def live(self) -> dict[str, str]:
        return {"status": "live"}

    async def ready(self) -> Response:
        """Returns 503 until both services are ready."""
        features, engine = await asyncio.gather(self._features.is_ready(), self._engine.is_ready())
        body = {"status": "ready" if features and engine else "not ready", "features": features, "engine": engine}
        return JSONResponse(body, 200 if features and engine else 503)

    async def list_models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._model()]}

    async def get_model(self, model: str) -> dict[str, Any]:
        self._check_model(model)
        return self._model()

    async def create_file(self, request: Request) -> dict[str, object]:
        """Stores an upload: multipart/form-data with `file` and optional `purpose`."""
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise ApiError(415, "send the file as multipart/form-data", code="unsupported_media_type")
        try:
            form = await request.form(max_files=1, max_fields=8)
        except (MultiPartException, HTTPException) as error:
            detail = getattr(error, "detail", None) or getattr(error, "message", "")
            raise ApiError(400, f"the form cannot be read: {detail}", code="invalid_form") from None
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(form.close)
            file, purpose = form.get("file"), form.get("purpose", "user_data")
            if not isinstance(file, UploadFile):
                raise ApiError(
                    400, "the form has no file named 'file'", code="missing_required_parameter", param="file"
                )
            name, kind = file.filename or "", str(purpose)[:64]
            record = await asyncio.to_thread(
                self._store.put, request.state.tenant, file.file, filename=name, purpose=kind
            )
        return record.to_json()

    async def list_files(self, request: Request) -> dict[str, object]:
        records = await asyncio.to_thread(self._store.list, request.state.tenant)
        return {"object": "list", "data": [record.to_json() for record in records], "has_more": False}

    async def get_file(self, request: Request, file_id: str) -> dict[str, object]:
        record = await asyncio.to_thread(self._store.get, request.state.tenant, file_id)
        if record is None:
            raise no_such_file("file_id")
        return record.to_json()

    async def delete_file(self, request: Request, file_id: str) -> dict[str, object]:
        if not await asyncio.to_thread(self._store.delete, request.state.tenant, file_id):
            raise no_such_file("file_id")
        return {"id": file_id, "object": "file", "deleted": True}

    async def chat_completions(self, request: Request) -> Response:
        """Answers a conversation, whole or streamed."""
        chat = parse_chat_request(await request.body())
        self._check_model(chat.model)
        deadline = asyncio.get_running_loop().time() + self._config.request_timeout_s
        try:
            async with asyncio.timeout_at(deadline):
                generate = await self._preparation.prepare(chat, request.state.tenant)
                completion = Completion(chat.model, num_choices=generate.n, with_logprobs=bool(chat.logprobs))
                deltas = _checked(self._engine.generate(generate))
                first = await anext(deltas)
                if not chat.stream:
                    response = await _collect(completion, first, deltas)
                    self._metrics.add_usage(completion.usage())
                    return JSONResponse(response)
        except TimeoutError:
            raise self._timeout() from None
        include_usage = chat.stream_options is not None and chat.stream_options.include_usage
        events = self._events(completion, first, deltas, deadline=deadline, include_usage=include_usage)
        return StreamingResponse(events, media_type=_CONTENT_TYPE, headers={"Cache-Control": "no-cache"})

    async def _events(
        self,
        completion: Completion,
        first: AnswerDelta,
        deltas: AsyncGenerator[AnswerDelta],
        *,
        deadline: float,
        include_usage: bool,
    ) -> AsyncIterator[bytes]:
        """Yields server-sent events. Closing the generator, as on a disconnect, frees the slots."""
        opened: set[int] = set()
        async with contextlib.aclosing(deltas):
            try:
                delta: AnswerDelta | None = first
                while delta is not None:
                    completion.add(delta)
                    chunks = completion.chunks(delta)
                    if delta.index not in opened:
                        opened.add(delta.index)
                        chunks.insert(0, completion.opening(delta.index))
                    yield b"".join(sse({**chunk, "usage": None} if include_usage else chunk) for chunk in chunks)
                    async with asyncio.timeout_at(deadline):
                        delta = await anext(deltas, None)
            except TimeoutError:
                yield sse(self._timeout().body())
                return
            except ApiError as error:
                yield sse(error.body())
                return
        self._metrics.add_usage(completion.usage())
        if include_usage:
            yield sse(completion.usage_chunk())
        yield sse("[DONE]")

    def _check_model(self, model: str) -> None:
        if model != self._config.model_name:
            name = self._config.model_name
            raise ApiError(404, f"unknown model; use {name!r}", code="model_not_found", param="model")

    def _model(self) -> dict[str, Any]:
        return {"id": self._config.model_name, "object": "model", "created": self._created, "owned_by": "timeviper"}

    def _timeout(self) -> ApiError:
        return ApiError(408, f"not answered within {self._config.request_timeout_s:g} s", code="timeout")


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


async def _collect(completion: Completion, first: AnswerDelta, deltas: AsyncGenerator[AnswerDelta]) -> dict[str, Any]:
    """Returns the whole answer; closes `deltas` even when cancelled."""
    async with contextlib.aclosing(deltas):
        completion.add(first)
        async for delta in deltas:
            completion.add(delta)
    return completion.response()
