"""The gateway: HTTP in OpenAI's shape in front, the feature and engine services behind.

Authenticates, checks, limits, keeps uploads and streams answers. A plain ASGI application over two Protocol clients:
no torch, no decoding, no Ray; app.py wraps it. Logs hold method, route, status and times: no bodies, keys or queries.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import re
import secrets
import time
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from timeviper_platform.serving.contract import (
    AnswerPart,
    ChatTurn,
    EngineClient,
    FeatureClient,
    FeatureReference,
    FeatureRequest,
    GenerateRequest,
    MediaFile,
    MediaSource,
    Modality,
    Refusal,
    StoredFeatures,
)
from timeviper_platform.serving.media import MediaStore, parse_data_uri
from timeviper_platform.serving.protocol import (
    ApiError,
    ChatCompletionRequest,
    ChatMessage,
    Completion,
    ImagePart,
    MediaLimits,
    TextPart,
    parse_chat_request,
    sse,
)

logger = logging.getLogger(__name__)

OPEN_PATHS = ("/health/live", "/health/ready")
"""what needs no key: probes of the cluster have none"""
PUBLIC_TENANT = "public"
FEATURE_SCHEME = "feature://"
_CONTENT_TYPE = "text/event-stream; charset=utf-8"


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiKey:
    """Who may ask."""

    tenant: str
    """whose files this key sees; several keys may share one"""
    sha256: str
    """hex digest of the key; the key itself is kept nowhere. Make one: `openssl rand -hex 32 | tee key | tr -d '\\n' |
    sha256sum`"""

    def __post_init__(self) -> None:
        if re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", self.tenant) is None:
            raise ValueError(f"{self.tenant = } names a folder: lower-case letters, digits, - and _")
        if re.fullmatch(r"[0-9a-f]{64}", self.sha256) is None:
            raise ValueError(f"the sha256 of the key of tenant {self.tenant!r} must be 64 hexadecimal digits")


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayConfig:
    """What clients may ask for."""

    model_name: str = "timeviper"
    """the `model` that requests must name"""
    media_root: str = "outputs/serving/media"
    """folder or URI for uploads; every replica of gateway and feature service must reach it"""
    api_keys: tuple[ApiKey, ...] = ()
    """none = no key needed"""
    max_request_bytes: int = 16 * 2**20
    """body of a chat request, data: URIs included"""
    max_upload_bytes: int = 512 * 2**20
    """body of an upload"""
    max_media_per_request: int = 8
    max_text_characters: int = 100_000
    """of all messages together"""
    default_max_tokens: int = 256
    max_tokens: int = 1024
    """the most one answer may be asked to have; not above the engine's max_new_tokens"""
    default_temperature: float = 1.0
    """when a request names none; OpenAI's is 1"""
    request_timeout_s: float = 300.0
    """from the last byte of a request to the last of its answer"""

    def __post_init__(self) -> None:
        if not 1 <= self.default_max_tokens <= self.max_tokens:
            raise ValueError(f"{self.default_max_tokens = } must be between 1 and {self.max_tokens = }")
        if self.request_timeout_s <= 0:
            raise ValueError(f"{self.request_timeout_s = } must be above 0")


@dataclass(slots=True)
class _Counters:
    """Requests by route and status, and tokens of answered ones, since this replica started."""

    answered: dict[tuple[str, int], int] = field(default_factory=dict)
    ongoing: int = 0
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("prompt", "cached_prompt", "completion"), 0))

    def add(self, route: str, status: int) -> None:
        self.answered[route, status] = self.answered.get((route, status), 0) + 1

    def add_usage(self, usage: Mapping[str, Any]) -> None:
        """Counts an answer's tokens, given in OpenAI's shape; cached ones are among the prompt's."""
        self.tokens["prompt"] += usage["prompt_tokens"]
        self.tokens["cached_prompt"] += usage["prompt_tokens_details"]["cached_tokens"]
        self.tokens["completion"] += usage["completion_tokens"]

    def render(self) -> str:
        """In Prometheus' text format."""
        lines = ["# TYPE timeviper_gateway_requests_total counter"]
        for (route, status), count in sorted(self.answered.items()):
            lines.append(f'timeviper_gateway_requests_total{{route="{route}",status="{status}"}} {count}')
        lines += [
            "# TYPE timeviper_gateway_ongoing_requests gauge",
            f"timeviper_gateway_ongoing_requests {self.ongoing}",
        ]
        for kind, count in self.tokens.items():
            name = f"timeviper_gateway_{kind}_tokens_total"
            lines += [f"# TYPE {name} counter", f"{name} {count}"]
        return "\n".join(lines) + "\n"


def create_app(config: GatewayConfig, features: FeatureClient, engine: EngineClient) -> ASGIApp:
    """The ASGI application."""
    counters = _Counters()
    gateway = _Gateway(config, features, engine, counters)
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
    api.add_api_route("/metrics", lambda: PlainTextResponse(counters.render()), methods=["GET"])
    api.add_exception_handler(ApiError, _answer_api_error)
    api.add_exception_handler(HTTPException, _answer_http_exception)
    api.add_middleware(_Edge, config=config, counters=counters)
    return api


async def _answer_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers())


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """The framework's own errors: no such route, method not allowed."""
    assert isinstance(error, HTTPException)
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    api_error = ApiError(error.status_code, str(error.detail), code=code)
    return JSONResponse(api_error.body(), error.status_code, error.headers)


class _Edge:
    """What holds for every request: a key, a limit on its body, an answer even to our own bugs, one line in the log."""

    def __init__(self, app: ASGIApp, *, config: GatewayConfig, counters: _Counters) -> None:
        self._app = app
        self._config = config
        self._counters = counters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        status = 0

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._counters.ongoing += 1
        try:
            await self._guarded(scope, receive, send_noting_status)
        except Exception as error:  # noqa: BLE001 - the last line: a bug of ours becomes a 500 in OpenAI's shape
            # where, but not the message, which may quote the request
            frames = "".join(traceback.format_tb(error.__traceback__))
            logger.error("%s failed: %s at\n%s", _route(scope), type(error).__name__, frames)
            if status == 0:
                bug = ApiError(500, "the server failed to answer this request", code="internal_error")
                await JSONResponse(bug.body(), 500)(scope, receive, send_noting_status)
        finally:
            self._counters.ongoing -= 1
            self._counters.add(_route(scope), status)
            seconds = time.monotonic() - started
            logger.info("%s %s %d in %.3f s", scope["method"], _route(scope), status, seconds)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        is_upload = scope["path"].rstrip("/") == "/v1/files"
        max_bytes = self._config.max_upload_bytes if is_upload else self._config.max_request_bytes
        try:
            scope.setdefault("state", {})["tenant"] = self._tenant(request)
            declared = request.headers.get("content-length", "")
            if declared.isdigit() and int(declared[:20]) > max_bytes:
                raise _too_large(max_bytes)
        except ApiError as error:
            await JSONResponse(error.body(), error.status, error.headers())(scope, receive, send)
            return
        num_bytes = 0

        async def receive_limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > max_bytes:
                raise _too_large(max_bytes)
            return message

        await self._app(scope, receive_limited, send)

    def _tenant(self, request: Request) -> str:
        if not self._config.api_keys or request.url.path in OPEN_PATHS:
            return PUBLIC_TENANT
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode()).hexdigest()
        # every key is compared, each in constant time: the time taken says nothing about which one was near
        matches = [entry.tenant for entry in self._config.api_keys if hmac.compare_digest(entry.sha256, digest)]
        if scheme.lower() != "bearer" or not matches:
            raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        return matches[0]


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413, f"the body is larger than the limit of {max_bytes} bytes; upload videos to /v1/files", code="too_large"
    )


def _route(scope: Scope) -> str:
    """The route's pattern, so that neither logs nor metrics hold what clients write into a path."""
    return str(getattr(scope.get("route"), "path", "unmatched"))


class _Gateway:
    """The handlers of the routes."""

    def __init__(
        self, config: GatewayConfig, features: FeatureClient, engine: EngineClient, counters: _Counters
    ) -> None:
        self._config = config
        self._counters = counters
        self._features = features
        self._engine = engine
        self._store = MediaStore(config.media_root)
        self._created = int(time.time())

    async def live(self) -> dict[str, str]:
        """This process answers."""
        return {"status": "live"}

    async def ready(self) -> Response:
        """200 when both services answer, else 503."""
        features, engine = await asyncio.gather(self._features.is_ready(), self._engine.is_ready())
        body = {"status": "ready" if features and engine else "not ready", "features": features, "engine": engine}
        return JSONResponse(body, 200 if features and engine else 503)

    async def list_models(self) -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [self._model()]}

    async def get_model(self, model: str) -> dict[str, Any]:
        """The model by its name."""
        self._check_model(model)
        return self._model()

    async def create_file(self, request: Request) -> dict[str, object]:
        """Keeps an upload (multipart/form-data with `file` and, optionally, `purpose`)."""
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
        """The tenant's uploads."""
        records = await asyncio.to_thread(self._store.list, request.state.tenant)
        return {"object": "list", "data": [record.to_json() for record in records], "has_more": False}

    async def get_file(self, request: Request, file_id: str) -> dict[str, object]:
        """One upload's record."""
        record = await asyncio.to_thread(self._store.get, request.state.tenant, file_id)
        if record is None:
            raise _no_such_file("file_id")
        return record.to_json()

    async def delete_file(self, request: Request, file_id: str) -> dict[str, object]:
        """Removes an upload."""
        if not await asyncio.to_thread(self._store.delete, request.state.tenant, file_id):
            raise _no_such_file("file_id")
        return {"id": file_id, "object": "file", "deleted": True}

    async def chat_completions(self, request: Request) -> Response:
        """Answers, whole or streamed."""
        chat = parse_chat_request(await request.body())
        self._check_model(chat.model)
        deadline = asyncio.get_running_loop().time() + self._config.request_timeout_s
        try:
            async with asyncio.timeout_at(deadline):
                generate = await self._prepare(chat, request.state.tenant)
                completion = Completion(chat.model, num_choices=generate.n, with_logprobs=bool(chat.logprobs))
                parts = _checked(self._engine.generate(generate))
                first = await anext(parts)
                if not chat.stream:
                    response = await _collect(completion, first, parts)
                    self._counters.add_usage(completion.usage())
                    return JSONResponse(response)
        except TimeoutError:
            raise self._too_late() from None
        include_usage = chat.stream_options is not None and chat.stream_options.include_usage
        events = self._events(completion, first, parts, deadline=deadline, include_usage=include_usage)
        return StreamingResponse(events, media_type=_CONTENT_TYPE, headers={"Cache-Control": "no-cache"})

    async def _events(
        self,
        completion: Completion,
        first: AnswerPart,
        parts: AsyncGenerator[AnswerPart],
        *,
        deadline: float,
        include_usage: bool,
    ) -> AsyncIterator[bytes]:
        """Server-sent events; closing this (the client has gone) closes `parts`, which frees the slots."""
        opened: set[int] = set()
        async with contextlib.aclosing(parts):
            try:
                part: AnswerPart | None = first
                while part is not None:
                    completion.add(part)
                    chunks = completion.chunks(part)
                    if part.index not in opened:
                        opened.add(part.index)
                        chunks.insert(0, completion.opening(part.index))
                    yield b"".join(sse({**chunk, "usage": None} if include_usage else chunk) for chunk in chunks)
                    async with asyncio.timeout_at(deadline):
                        part = await anext(parts, None)
            except TimeoutError:
                yield sse(self._too_late().body())
                return
            except ApiError as error:
                yield sse(error.body())
                return
        self._counters.add_usage(completion.usage())
        if include_usage:
            yield sse(completion.usage_chunk())
        yield sse("[DONE]")

    async def _prepare(self, chat: ChatCompletionRequest, tenant: str) -> GenerateRequest:
        """Checks the conversation and has all of its media turned into features, at the same time."""
        max_new_tokens = chat.max_completion_tokens or chat.max_tokens or self._config.default_max_tokens
        if max_new_tokens > self._config.max_tokens:
            raise ApiError(
                400, f"max_tokens is {max_new_tokens}, the limit {self._config.max_tokens}", code="invalid_value",
                param="max_tokens",
            )  # fmt: skip
        turns = [await self._turn(number, message, tenant) for number, message in enumerate(chat.messages)]
        if sum(len(turn.text) for turn in turns) > self._config.max_text_characters:
            limit = self._config.max_text_characters
            raise ApiError(413, f"the messages have more than {limit} characters", code="too_large", param="messages")
        num_media = sum(len(turn.media) for turn in turns)
        if num_media > self._config.max_media_per_request:
            limit = self._config.max_media_per_request
            raise ApiError(400, f"{num_media} media, the limit is {limit}", code="too_many_media", param="messages")
        limits = chat.mm_processor_kwargs or MediaLimits()
        references = await asyncio.gather(
            *(self._feature(source, param, limits) for turn in turns for source, param in turn.media)
        )
        found = iter(references)
        return GenerateRequest(
            tenant=tenant,
            turns=tuple(
                ChatTurn(role=turn.role, text=turn.text, media=tuple(next(found) for _ in turn.media)) for turn in turns
            ),
            max_new_tokens=max_new_tokens,
            temperature=self._config.default_temperature if chat.temperature is None else chat.temperature,
            top_p=1.0 if chat.top_p is None else chat.top_p,
            top_k=chat.top_k or 0,
            n=chat.n or 1,
            seed=secrets.randbits(32) if chat.seed is None else chat.seed % 2**63,
            stop=chat.stop_texts(),
            num_logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
        )

    async def _turn(self, number: int, message: ChatMessage, tenant: str) -> _SourceTurn:
        role: Any = "system" if message.role == "developer" else message.role
        if isinstance(message.content, str):
            return _SourceTurn(role=role, text=message.content)
        texts: list[str] = []
        media: list[tuple[MediaSource, str]] = []
        for place, part in enumerate(message.content):
            param = f"messages.{number}.content.{place}"
            if isinstance(part, TextPart):
                texts.append(part.text)
                continue
            if role != "user":
                raise ApiError(400, f"a {role} message may hold text alone", code="invalid_value", param=param)
            modality: Modality = "image" if isinstance(part, ImagePart) else "video"
            value = getattr(part, part.type)
            url = value if isinstance(value, str) else value.url
            media.append((await self._source(url, modality, tenant, param), param))
        return _SourceTurn(role=role, text="\n".join(texts), media=media)

    async def _source(self, url: str, modality: Modality, tenant: str, param: str) -> MediaSource:
        if url.startswith(FEATURE_SCHEME):
            return StoredFeatures(media_id=url.removeprefix(FEATURE_SCHEME))
        if url.startswith("data:"):
            return await asyncio.to_thread(parse_data_uri, url, expected=modality, param=param)
        if url.startswith("file-"):
            record = await asyncio.to_thread(self._store.get, tenant, url)
            if record is None:
                raise _no_such_file(param)
            if record.modality != modality:
                message = f"the file is a {record.modality}, not a {modality}"
                raise ApiError(415, message, code="unsupported_media_type", param=param)
            return MediaFile(uri=self._store.uri(tenant, record), sha256=record.sha256, modality=modality)
        raise ApiError(
            400,
            "media must be a data: URI, a file id (file-...) or a stored medium (feature://ID); this server does not"
            " fetch remote addresses, upload the file to /v1/files",
            code="remote_media_disabled",
            param=param,
        )

    async def _feature(self, source: MediaSource, param: str, limits: MediaLimits) -> FeatureReference:
        answer = await self._features.features(
            FeatureRequest(source=source, max_frames=limits.max_frames, fps=limits.fps)
        )
        if isinstance(answer, Refusal):
            raise ApiError.from_refusal(answer, param=param)
        return answer

    def _check_model(self, model: str) -> None:
        if model != self._config.model_name:
            name = self._config.model_name
            raise ApiError(404, f"there is no such model here; use {name!r}", code="model_not_found", param="model")

    def _model(self) -> dict[str, Any]:
        return {"id": self._config.model_name, "object": "model", "created": self._created, "owned_by": "timeviper"}

    def _too_late(self) -> ApiError:
        return ApiError(408, f"not answered within {self._config.request_timeout_s:g} s", code="timeout")


@dataclass(frozen=True, kw_only=True, slots=True)
class _SourceTurn:
    """A message whose media are not features yet; each has the place in the request that it came from."""

    role: Any
    text: str
    media: list[tuple[MediaSource, str]] = field(default_factory=list)


def _no_such_file(param: str) -> ApiError:
    return ApiError(404, "there is no such file; upload it to /v1/files", code="file_not_found", param=param)


async def _checked(items: AsyncIterator[AnswerPart | Refusal]) -> AsyncGenerator[AnswerPart]:
    """The parts; a refusal is raised as the error it stands for."""
    try:
        async for item in items:
            if isinstance(item, Refusal):
                raise ApiError.from_refusal(item)
            yield item
    finally:
        close: Callable[[], Awaitable[None]] | None = getattr(items, "aclose", None)
        if close is not None:
            await close()


async def _collect(completion: Completion, first: AnswerPart, parts: AsyncGenerator[AnswerPart]) -> dict[str, Any]:
    """The whole answer; closes `parts` also when it is cancelled half-way."""
    async with contextlib.aclosing(parts):
        completion.add(first)
        async for part in parts:
            completion.add(part)
    return completion.response()
