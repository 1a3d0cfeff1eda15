"""An ASGI application with OpenAI's routes. Imports neither torch nor Ray."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.telemetry import TelemetryConfig
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.middleware.cors import CORSMiddleware

from timeviper_platform.serving.gateway.byte_ranges import content_response
from timeviper_platform.serving.gateway.chat import FEATURE_SCHEME, ChatPreparation
from timeviper_platform.serving.gateway.chat_request import (
    ChatCompletionRequest,
    chat_request,
    count_values,
    parse_chat_request,
    parse_object,
    validated,
)
from timeviper_platform.serving.gateway.chunked_uploads import ChunkedUploads, CompleteRequest, UploadRequest
from timeviper_platform.serving.gateway.config import ApiKey, CurrentConfig, GatewayConfig
from timeviper_platform.serving.gateway.janitor import DAY_S, keep_clean
from timeviper_platform.serving.gateway.job_routes import Jobs, NewJob
from timeviper_platform.serving.gateway.keys import KeyRing, Quotas
from timeviper_platform.serving.gateway.middleware import GatewayMetrics, RequestGuard
from timeviper_platform.serving.gateway.openai_protocol import ApiError, ChatStream, Completion
from timeviper_platform.serving.gateway.openapi import (
    CANCELLED,
    CHAT,
    COMPLETED,
    CONTENT,
    DELETED,
    FILE,
    FILES,
    JOB,
    JOBS,
    LIVE,
    METRICS,
    MODEL,
    MODELS,
    NEW_JOB,
    NEW_UPLOAD,
    PART,
    READY,
    RESPONSE,
    UPLOAD,
    VIDEO,
    VIDEOS,
    RouteDocument,
    document,
)
from timeviper_platform.serving.gateway.remote import FILE as FILE_SCHEME
from timeviper_platform.serving.gateway.remote import local_path
from timeviper_platform.serving.gateway.responses import ResponseAnswer, chat_values
from timeviper_platform.serving.gateway.uploads import FileRecord, MediaStore, no_such_file, page_of, read_chunks
from timeviper_platform.serving.messages import (
    AnswerDelta,
    EngineClient,
    FeatureClient,
    FeatureProgress,
    Refusal,
    StoredMedium,
)
from timeviper_platform.serving.page import static_files as page

T = TypeVar("T")

EXPIRES_AFTER_S = 3600, 2_592_000
"""OpenAI's shortest and longest age of a file: an hour, 30 days."""
MAX_VIDEOS = 1000
"""Stored media per page."""
NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
"""FastAPI's own records paths with their ids, and the messages of exceptions; `RequestGuard` has spans and counts."""
_CONTENT_TYPE = "text/event-stream; charset=utf-8"


def create_app(
    config: GatewayConfig, features: FeatureClient, engine: EngineClient, metrics: GatewayMetrics | None = None
) -> FastAPI:
    """Builds the application. Limits and keys may change: assign another `state.current.config`."""
    metrics = metrics or GatewayMetrics()
    current = CurrentConfig(config)
    keys, quotas = KeyRing(current), Quotas()
    gateway = _Gateway(current, features, engine, metrics, quotas, keys)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        janitor = asyncio.create_task(keep_clean(gateway.store, config.retention))
        days = config.retention.max_age_days
        runner = gateway.jobs.runner
        jobs = asyncio.create_task(runner.take_over(keep_s=None if days is None else days * DAY_S))
        yield
        janitor.cancel()
        jobs.cancel()
        await runner.close()

    # no pages of documentation: they load scripts from a CDN
    api = FastAPI(
        title="TimeViper",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        telemetry=NO_TELEMETRY,
    )

    def route(path: str, handler: Callable[..., Any], method: str, kinds: RouteDocument) -> None:
        api.add_api_route(path, handler, methods=[method], response_model=None, **kinds.options())

    route("/v1/chat/completions", gateway.chat_completions, "POST", CHAT)
    route("/v1/responses", gateway.create_response, "POST", RESPONSE)
    route("/v1/models", gateway.list_models, "GET", MODELS)
    route("/v1/models/{model:path}", gateway.get_model, "GET", MODEL)
    route("/v1/files", gateway.create_file, "POST", UPLOAD)
    route("/v1/files", gateway.list_files, "GET", FILES)
    route("/v1/files/{file_id}", gateway.get_file, "GET", FILE)
    route("/v1/files/{file_id}", gateway.delete_file, "DELETE", DELETED)
    route("/v1/files/{file_id}/content", gateway.get_content, "GET", CONTENT)
    route("/v1/videos", gateway.list_videos, "GET", VIDEOS)
    route("/v1/videos/{video_id:path}/content", gateway.get_video_content, "GET", CONTENT)
    route("/v1/videos/{video_id:path}", gateway.get_video, "GET", VIDEO)
    route("/v1/jobs", gateway.create_job, "POST", NEW_JOB)
    route("/v1/jobs", gateway.jobs.list, "GET", JOBS)
    route("/v1/jobs/{job_id}", gateway.jobs.get, "GET", JOB)
    route("/v1/jobs/{job_id}/cancel", gateway.jobs.cancel, "POST", JOB)
    route("/v1/uploads", gateway.create_upload, "POST", NEW_UPLOAD)
    route("/v1/uploads/{upload_id}/parts", gateway.add_upload_part, "POST", PART)
    route("/v1/uploads/{upload_id}/complete", gateway.complete_upload, "POST", COMPLETED)
    route("/v1/uploads/{upload_id}/cancel", gateway.cancel_upload, "POST", CANCELLED)
    route("/health/live", gateway.live, "GET", LIVE)
    route("/health/ready", gateway.ready, "GET", READY)
    route("/metrics", lambda: PlainTextResponse(metrics.render()), "GET", METRICS)
    api.routes.extend(page.routes())
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
    api.state.current = current
    api.add_middleware(RequestGuard, current=current, keys=keys, quotas=quotas, metrics=metrics)
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


class _Running(NamedTuple):
    """Answers of which the first text is there."""

    completion: Completion
    first: AnswerDelta
    deltas: AsyncGenerator[AnswerDelta]
    deadline: float


class _Gateway:
    def __init__(
        self,
        current: CurrentConfig,
        features: FeatureClient,
        engine: EngineClient,
        metrics: GatewayMetrics,
        quotas: Quotas,
        keys: KeyRing,
    ) -> None:
        self._current = current
        self._metrics = metrics
        self._quotas = quotas
        self._features = features
        self._engine = engine
        root = current.config.media_root
        self.store = MediaStore(root)
        self._uploads = ChunkedUploads(root, self.store, lambda: current.config.max_upload_bytes)
        self._preparation = ChatPreparation(current, features, self.store)
        self.jobs = Jobs(current, self._answer_for_job, keys.of_hash)
        self._created = int(time.time())
        self._parser = ThreadPoolExecutor(max_workers=1, thread_name_prefix="parse")
        """One, so that many large bodies are not in memory as Python objects at once."""

    @property
    def _config(self) -> GatewayConfig:
        return self._current.config

    async def live(self) -> dict[str, str]:
        return {"status": "live"}

    async def ready(self, request: Request) -> Response:
        """Returns 503 unless both services run or can start. `deep=1` asks a replica of each, and so starts one."""
        deep = request.query_params.get("deep") == "1"
        features, engine = await asyncio.gather(self._features.is_ready(deep=deep), self._engine.is_ready(deep=deep))
        body = {"status": "ready" if features and engine else "not ready", "features": features, "engine": engine}
        return JSONResponse(body, 200 if features and engine else 503)

    async def list_models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._model()]}

    async def get_model(self, model: str) -> dict[str, Any]:
        self._check_model(model)
        return self._model()

    async def create_file(self, request: Request) -> dict[str, object]:
        """Stores a video or picture for the owner of the API key."""
        async with _form_file(request, "file") as (form, file):
            put = partial(
                self.store.put,
                filename=file.filename or "",
                purpose=str(form.get("purpose", "user_data"))[:64],
                expires_after_s=_expires_after(form),
                max_total_bytes=_max_stored_bytes(request),
            )
            record = await asyncio.to_thread(put, request.state.tenant, file.file)
        return record.to_json()

    async def create_upload(self, request: Request) -> dict[str, Any]:
        """Begins an upload in parts."""
        values = await self._parsed(request, parse_object)
        upload = validated(UploadRequest, values)
        return await asyncio.to_thread(self._uploads.create, request.state.tenant, upload)

    async def add_upload_part(self, request: Request, upload_id: str) -> dict[str, Any]:
        async with _form_file(request, "data") as (_, file):
            return await asyncio.to_thread(self._uploads.add_part, request.state.tenant, upload_id, file.file)

    async def complete_upload(self, request: Request, upload_id: str) -> dict[str, Any]:
        """Joins the parts to a file."""
        parts = validated(CompleteRequest, await self._parsed(request, parse_object)).part_ids
        complete = partial(self._uploads.complete, max_total_bytes=_max_stored_bytes(request))
        return await asyncio.to_thread(complete, request.state.tenant, upload_id, parts)

    async def cancel_upload(self, request: Request, upload_id: str) -> dict[str, Any]:
        return await asyncio.to_thread(self._uploads.cancel, request.state.tenant, upload_id)

    async def list_files(self, request: Request) -> dict[str, object]:
        """Lists uploads, the newest first; `purpose`, `order`, `limit` and `after` as in OpenAI's API."""
        records = await asyncio.to_thread(self.store.list, request.state.tenant)
        return page_of(records, request.query_params)

    async def get_file(self, request: Request, file_id: str) -> dict[str, object]:
        return (await self._record(request, file_id)).to_json()

    async def get_content(self, request: Request, file_id: str) -> Response:
        record = await self._record(request, file_id)
        headers = {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(record.filename)}"}
        read = partial(self.store.read, request.state.tenant, record)
        return content_response(request, read, size=record.num_bytes, etag=record.sha256, headers=headers)

    async def list_videos(self, request: Request) -> dict[str, object]:
        """Lists stored media by id; `prefix`, `after` and `limit`."""
        query = request.query_params
        limit = query.get("limit", "100")
        if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= MAX_VIDEOS):
            raise ApiError(400, f"limit must be between 1 and {MAX_VIDEOS}", code="invalid_value", param="limit")
        after, prefix = query.get("after", ""), query.get("prefix", "")
        page = _accepted(await self._features.list_media(after=after, prefix=prefix, limit=int(limit)))
        data = [_video_json(medium) for medium in page.media]
        ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
        return {"object": "list", "data": data, **ends, "has_more": page.has_more}

    async def get_video(self, video_id: str) -> dict[str, object]:
        """Returns a stored medium with the times of its frames."""
        return _video_json(_accepted(await self._features.medium(video_id)))

    async def get_video_content(self, request: Request, video_id: str) -> Response:
        """Returns the file that a stored medium was made from, if requests may read its folder."""
        medium = _accepted(await self._features.medium(video_id))
        url = medium.uri if medium.uri.startswith(FILE_SCHEME) else FILE_SCHEME + quote(medium.uri)
        try:
            path = await asyncio.to_thread(local_path, url, self._config.allowed_local_media, "video_id")
        except ApiError:
            text = "the medium's file is not below gateway.allowed_local_media of this server"
            raise ApiError(404, text, code="content_not_available", param="video_id") from None
        status = Path(path).stat()
        etag = f"{status.st_mtime_ns:x}-{status.st_size:x}"
        return content_response(request, partial(read_chunks, path), size=status.st_size, etag=etag, headers={})

    async def delete_file(self, request: Request, file_id: str) -> dict[str, object]:
        if not await asyncio.to_thread(self.store.delete, request.state.tenant, file_id):
            raise no_such_file("file_id")
        return {"id": file_id, "object": "file", "deleted": True}

    async def _record(self, request: Request, file_id: str) -> FileRecord:
        record = await asyncio.to_thread(self.store.get, request.state.tenant, file_id)
        if record is None:
            raise no_such_file("file_id")
        return record

    async def chat_completions(self, request: Request) -> Response:
        """Answers a conversation, whole or streamed."""
        parse = partial(parse_chat_request, max_parts=self._config.max_parts_per_request)
        chat = await self._parsed(request, parse)
        running = await self._start(chat, request)
        if not chat.stream:
            await self._collect(running)
            return JSONResponse(running.completion.response())
        include_usage = chat.stream_options is not None and chat.stream_options.include_usage
        return self._streamed(running, ChatStream(running.completion, include_usage=include_usage))

    async def create_job(self, request: Request) -> Response:
        """Answers questions about a video in the background."""
        new = validated(NewJob, await self._parsed(request, parse_object))
        self._check_model(new.model)
        return await self.jobs.create(new, request.state.tenant, request.state.key)

    async def _answer_for_job(
        self, chat: ChatCompletionRequest, tenant: str, key: ApiKey | None, note: Callable[[FeatureProgress], None]
    ) -> dict[str, Any]:
        """Returns a whole answer, without a deadline."""
        self._check_model(chat.model)
        generate = await self._preparation.prepare(chat, tenant, note=note)
        self._quotas.add_frames(key, total := generate.num_frames)
        note(FeatureProgress(stage="answering", frames_done=total, frames_total=total))
        completion = Completion(chat.model, num_choices=1, with_logprobs=False)
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

        values, chat = await self._parsed(request, parse)
        running = await self._start(chat, request)
        answer = ResponseAnswer(running.completion, values)
        if not chat.stream:
            await self._collect(running)
            return JSONResponse(answer.response())
        return self._streamed(running, answer)

    async def _parsed(self, request: Request, parse: Callable[[bytes], T]) -> T:
        body = await read_json(request, max_values=max_json_values(self._config))
        return await asyncio.get_running_loop().run_in_executor(self._parser, parse, body)

    async def _start(self, chat: ChatCompletionRequest, request: Request) -> _Running:
        """Returns the answers once the first text is there, so that refusals have their own status."""
        self._check_model(chat.model)
        deadline = asyncio.get_running_loop().time() + self._config.request_timeout_s
        with self._timed():
            async with asyncio.timeout_at(deadline):
                try:
                    running = await self._first(chat, request, deadline)
                except ApiError as error:
                    if error.code != "features_lost":  # their replica has died or forgotten them
                        raise
                    running = await self._first(chat, request, deadline, whole=True)
        return running

    async def _first(
        self, chat: ChatCompletionRequest, request: Request, deadline: float, *, whole: bool = False
    ) -> _Running:
        generate = await self._preparation.prepare(chat, request.state.tenant, whole=whole)
        if not whole:
            self._quotas.add_frames(request.state.key, generate.num_frames)
        completion = Completion(
            chat.model,
            num_choices=generate.n,
            with_logprobs=bool(chat.logprobs),
            media=generate.media if generate.is_temporal else (),
        )
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

    def _streamed(self, running: _Running, answer: ChatStream | ResponseAnswer) -> Response:
        headers = {"Cache-Control": "no-cache"}
        return StreamingResponse(self._events(running, answer), media_type=_CONTENT_TYPE, headers=headers)

    async def _events(self, running: _Running, answer: ChatStream | ResponseAnswer) -> AsyncIterator[bytes]:
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

    def _check_model(self, model: str) -> None:
        if model != self._config.model_name:
            name = self._config.model_name
            raise ApiError(404, f"unknown model; use {name!r}", code="model_not_found", param="model")

    def _model(self) -> dict[str, Any]:
        return {
            "id": self._config.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "timeviper",
        }


@contextlib.asynccontextmanager
async def _form_file(request: Request, name: str) -> AsyncIterator[tuple[FormData, UploadFile]]:
    """Yields a form and its file.

    Raises:
        ApiError: 415 for another content type, 400 for a form that cannot be read or has no such file.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(415, "send the file as multipart/form-data", code="unsupported_media_type")
    try:
        form = await request.form(max_files=1, max_fields=8)
    except (MultiPartException, HTTPException) as error:
        detail = getattr(error, "detail", None) or getattr(error, "message", "")
        raise ApiError(400, f"the form cannot be read: {detail}", code="invalid_form") from None
    try:
        file = form.get(name)
        if not isinstance(file, UploadFile):
            text = f"the form has no file named '{name}'"
            raise ApiError(400, text, code="missing_required_parameter", param=name)
        yield form, file
    finally:
        await form.close()


def _max_stored_bytes(request: Request) -> int | None:
    key: ApiKey | None = request.state.key
    return None if key is None else key.quota.max_stored_bytes


async def read_json(request: Request, *, max_values: int) -> bytes:
    """Returns the body. Keeps none that has too many values.

    Raises:
        ApiError: 415 for other content types, which browsers let any page send; 400 for too many values.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, "send JSON with Content-Type: application/json", code="unsupported_media_type")
    chunks, num_values = [], 0
    async for chunk in request.stream():
        num_values += count_values(chunk)
        if num_values <= max_values:
            chunks.append(chunk)
        else:  # reads on, since a client that is still sending would not see the answer
            chunks.clear()
    if num_values > max_values:
        raise ApiError(400, f"the body holds more than {max_values} JSON values", code="too_many_values")
    return b"".join(chunks)


def max_json_values(config: GatewayConfig) -> int:
    """Commas and brackets of the largest useful body: each part has some, and a text may be all commas."""
    return 16 * config.max_parts_per_request + config.max_text_characters


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


def _video_json(medium: StoredMedium) -> dict[str, Any]:
    values: dict[str, Any] = {
        "id": medium.media_id,
        "object": "video",
        "url": FEATURE_SCHEME + medium.media_id,
        "modality": medium.modality,
        "duration_seconds": medium.duration_seconds,
        "num_frames": medium.num_frames,
        "num_tokens_per_frame": medium.num_tokens_per_frame,
    }
    if medium.pts_seconds is not None:
        values |= {"frame_seconds": medium.pts_seconds, "selected_frames": medium.selected}
    return values


def _accepted(answer: T | Refusal) -> T:
    """Raises ApiError for a refusal."""
    if isinstance(answer, Refusal):
        raise ApiError.from_refusal(answer)
    return answer


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
