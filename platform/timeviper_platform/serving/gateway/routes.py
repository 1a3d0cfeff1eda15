"""An ASGI application with OpenAI's routes. Imports neither torch nor Ray."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from timeviper_platform.serving.gateway.chat import ChatPreparation
from timeviper_platform.serving.gateway.chat_request import parse_chat_request
from timeviper_platform.serving.gateway.config import GatewayConfig
from timeviper_platform.serving.gateway.middleware import GatewayMetrics, RequestGuard
from timeviper_platform.serving.gateway.openai_protocol import ApiError, Completion, sse
from timeviper_platform.serving.gateway.openapi import (
    CHAT,
    CONTENT,
    DELETED,
    FILE,
    FILES,
    LIVE,
    METRICS,
    MODEL,
    MODELS,
    READY,
    UPLOAD,
    RouteDocument,
    document,
)
from timeviper_platform.serving.gateway.uploads import FileRecord, MediaStore, no_such_file, page_of
from timeviper_platform.serving.messages import AnswerDelta, EngineClient, FeatureClient, Refusal

EXPIRES_AFTER_S = 3600, 2_592_000
"""OpenAI's shortest and longest age of a file: an hour, 30 days."""
_CONTENT_TYPE = "text/event-stream; charset=utf-8"


def create_app(config: GatewayConfig, features: FeatureClient, engine: EngineClient) -> ASGIApp:
    metrics = GatewayMetrics()
    gateway = _Gateway(config, features, engine, metrics)
    # no pages of documentation: they load scripts from a CDN
    api = FastAPI(title="TimeViper", docs_url=None, redoc_url=None, redirect_slashes=False)

    def route(path: str, handler: Callable[..., Any], method: str, kinds: RouteDocument) -> None:
        api.add_api_route(path, handler, methods=[method], response_model=None, **kinds.options())

    route("/v1/chat/completions", gateway.chat_completions, "POST", CHAT)
    route("/v1/models", gateway.list_models, "GET", MODELS)
    route("/v1/models/{model:path}", gateway.get_model, "GET", MODEL)
    route("/v1/files", gateway.create_file, "POST", UPLOAD)
    route("/v1/files", gateway.list_files, "GET", FILES)
    route("/v1/files/{file_id}", gateway.get_file, "GET", FILE)
    route("/v1/files/{file_id}", gateway.delete_file, "DELETE", DELETED)
    route("/v1/files/{file_id}/content", gateway.get_content, "GET", CONTENT)
    route("/health/live", gateway.live, "GET", LIVE)
    route("/health/ready", gateway.ready, "GET", READY)
    route("/metrics", lambda: PlainTextResponse(metrics.render()), "GET", METRICS)
    api.add_exception_handler(ApiError, _answer_api_error)
    api.add_exception_handler(HTTPException, _answer_http_exception)
    api.openapi = lambda: document(api)  # type: ignore[method-assign]  # as FastAPI's documentation extends it
    if config.cors_origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type"],
        )
    api.add_middleware(RequestGuard, config=config, metrics=metrics)
    return api


async def _answer_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers())


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """Answers the framework's errors, such as an unknown route."""
    assert isinstance(error, HTTPException)
    known = {
        404: ("unknown_url", "there is no such path; the API is below /v1"),
        405: ("method_not_allowed", "the path does not take this method"),
    }
    code, message = known.get(error.status_code, ("invalid_request", str(error.detail)))
    api_error = ApiError(error.status_code, message, code=code)
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
        self._parser = ThreadPoolExecutor(max_workers=1, thread_name_prefix="parse")
        """One, so that many large bodies are not in memory as Python objects at once."""

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
        """Stores a video or picture for the owner of the API key."""
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
            put = partial(self._store.put, filename=name, purpose=kind, expires_after_s=_expires_after(form))
            record = await asyncio.to_thread(put, request.state.tenant, file.file)
        return record.to_json()

    async def list_files(self, request: Request) -> dict[str, object]:
        """Lists uploads, the newest first; `purpose`, `order`, `limit` and `after` as in OpenAI's API."""
        records = await asyncio.to_thread(self._store.list, request.state.tenant)
        return page_of(records, request.query_params)

    async def get_file(self, request: Request, file_id: str) -> dict[str, object]:
        return (await self._record(request, file_id)).to_json()

    async def get_content(self, request: Request, file_id: str) -> Response:
        record = await self._record(request, file_id)
        headers = {
            "Content-Length": str(record.num_bytes),
            "Content-Disposition": f"attachment; filename*=UTF-8''{quote(record.filename)}",
            "X-Content-Type-Options": "nosniff",
        }
        chunks = self._store.read(request.state.tenant, record)
        return StreamingResponse(chunks, media_type="application/octet-stream", headers=headers)

    async def delete_file(self, request: Request, file_id: str) -> dict[str, object]:
        if not await asyncio.to_thread(self._store.delete, request.state.tenant, file_id):
            raise no_such_file("file_id")
        return {"id": file_id, "object": "file", "deleted": True}

    async def _record(self, request: Request, file_id: str) -> FileRecord:
        record = await asyncio.to_thread(self._store.get, request.state.tenant, file_id)
        if record is None:
            raise no_such_file("file_id")
        return record

    async def chat_completions(self, request: Request) -> Response:
        """Answers a conversation, whole or streamed."""
        require_json(request)
        parse = partial(
            parse_chat_request,
            max_parts=self._config.max_parts_per_request,
            max_text_characters=self._config.max_text_characters,
        )
        body = await request.body()
        chat = await asyncio.get_running_loop().run_in_executor(self._parser, parse, body)
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


def require_json(request: Request) -> None:
    """Raises ApiError 415 for other content types; browsers let any page send some of them."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, "send JSON with Content-Type: application/json", code="unsupported_media_type")


def _expires_after(form: FormData) -> int | None:
    seconds, anchor = form.get("expires_after[seconds]"), form.get("expires_after[anchor]")
    if seconds is None and anchor is None:
        return None
    shortest, longest = EXPIRES_AFTER_S
    if anchor != "created_at" or not str(seconds).isascii() or not str(seconds).isdigit():
        text = "expires_after needs anchor created_at and whole seconds"
        raise ApiError(400, text, code="invalid_value", param="expires_after")
    if not shortest <= (value := int(str(seconds)[:12])) <= longest:
        text = f"expires_after[seconds] must be between {shortest} and {longest}"
        raise ApiError(400, text, code="invalid_value", param="expires_after")
    return value


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
