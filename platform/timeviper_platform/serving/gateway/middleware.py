"""ASGI middleware for all routes: keys, origins, body limits, metrics, and logs without bodies, keys or queries.

Sets `request.state.tenant`.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import traceback
from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request
from fastapi.responses import JSONResponse
from opentelemetry.trace import Span
from prometheus_client import CollectorRegistry, generate_latest
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from timeviper_platform.common.logs import log_event
from timeviper_platform.common.metrics import NO_METRICS, MetricsSink, prometheus_metrics
from timeviper_platform.serving import tracing
from timeviper_platform.serving.gateway.config import ApiKey, CurrentConfig, GatewayConfig
from timeviper_platform.serving.gateway.connections import MAX_REQUEST_ID
from timeviper_platform.serving.gateway.keys import KeyRing, Quotas
from timeviper_platform.serving.gateway.media.byte_ranges import IS_HEAD
from timeviper_platform.serving.gateway.openai_protocol import ApiError
from timeviper_platform.serving.page.static_files import PATHS as PAGE_PATHS

logger = logging.getLogger(__name__)

OPEN_PATHS = ("/health/live", "/health/ready")
"""Cluster probes, which send no key. With `deep=1`, which starts replicas, readiness needs one."""
UPLOAD_PATHS = re.compile(r"/v1/files|/v1/uploads/[^/]+/parts")
PUBLIC_TENANT = "public"


class GatewayMetrics:
    """Counts for the page /metrics of this replica, and for `sink`, which sees all replicas."""

    def __init__(self, sink: MetricsSink = NO_METRICS, *, gauge_s: float = 1.0) -> None:
        """`gauge_s` is the least time between two values of a gauge for `sink`; one takes Ray a millisecond."""
        self._gauge_s = gauge_s
        self._gauge_is_due = False
        self._registry = CollectorRegistry()
        self._metrics = prometheus_metrics("timeviper_gateway_", self._registry)
        self._sink = sink
        self._num_ongoing = 0

    def start_request(self) -> None:
        self._set_ongoing(self._num_ongoing + 1)

    def end_request(self, route: str, status: int, seconds: float) -> None:
        self._set_ongoing(self._num_ongoing - 1)
        self._add("requests", 1, route=route, status=str(status))
        self._metrics["request_seconds"].labels(route=route).observe(seconds)
        self._sink.observe("request_seconds", seconds, route=route)

    def add_first_text(self, seconds: float) -> None:
        self._metrics["first_text_seconds"].observe(seconds)
        self._sink.observe("first_text_seconds", seconds)

    def add_usage(self, usage: Mapping[str, Any]) -> None:
        self._add("prompt_tokens", usage["prompt_tokens"])
        self._add("cached_prompt_tokens", usage["prompt_tokens_details"]["cached_tokens"])
        self._add("completion_tokens", usage["completion_tokens"])

    def _add(self, name: str, amount: float, **tags: str) -> None:
        metric = self._metrics[name]
        (metric.labels(**tags) if tags else metric).inc(amount)
        self._sink.add(name, amount, **tags)

    def _set_ongoing(self, count: int) -> None:
        self._num_ongoing = count
        self._metrics["ongoing_requests"].set(count)
        if not self._gauge_is_due:
            self._gauge_is_due = True
            asyncio.get_running_loop().call_later(self._gauge_s, self._report)

    def _report(self) -> None:
        self._gauge_is_due = False
        self._sink.report({"ongoing_requests": self._num_ongoing})

    def render(self) -> bytes:
        return generate_latest(self._registry)


class RequestGuard:
    """Authenticates, limits, counts and logs requests; answers 500 to unexpected errors."""

    def __init__(
        self, app: ASGIApp, *, current: CurrentConfig, keys: KeyRing, quotas: Quotas, metrics: GatewayMetrics
    ) -> None:
        self._app = app
        self._current = current
        self._keys = keys
        self._quotas = quotas
        self._metrics = metrics

    @property
    def _config(self) -> GatewayConfig:
        return self._current.config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        status = 0
        is_head = scope["method"] == "HEAD"
        # Ray Serve's server gives every request an id, and sends it back
        request_id = Request(scope).headers.get("x-request-id", "")[:MAX_REQUEST_ID]
        scope = _plain_scope(scope)

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        self._metrics.start_request()
        parent = tracing.request_context(Request(scope).headers)
        try:
            with tracing.span("request", parent) as request_span:
                try:
                    await self._guarded(scope, receive, send_noting_status)
                finally:
                    _describe(request_span, scope, status)
        except Exception as error:  # noqa: BLE001 - a bug becomes a 500 in OpenAI's format
            # the message is not logged, because it may quote the request
            frames = "".join(traceback.format_tb(error.__traceback__))
            failure = {"route": _route(scope), "error": type(error).__name__, "trace": frames}
            log_event(logger, logging.ERROR, "failure", request_id=request_id, **failure)
            if status == 0:
                bug = ApiError(500, "the server failed to answer this request", code="internal_error")
                await JSONResponse(bug.body(), 500)(scope, receive, send_noting_status)
        finally:
            seconds = time.monotonic() - started
            self._metrics.end_request(_route(scope), status, seconds)
            values = {"method": scope["method"], "route": _route(scope), "status": status, "seconds": round(seconds, 3)}
            log_event(logger, logging.INFO, "request", request_id=request_id, **values)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        is_upload = UPLOAD_PATHS.fullmatch(_path(scope)) is not None
        max_bytes = self._config.max_upload_bytes if is_upload else self._config.max_request_bytes
        try:
            if not _is_open(request):
                self._check_origin(request)
            await self._keys.refresh()
            key = self._key(request)
            state = scope.setdefault("state", {})
            state["key"], state["tenant"] = key, PUBLIC_TENANT if key is None else key.tenant
            declared = request.headers.get("content-length", "")
            if declared.isascii() and declared.isdigit() and int(declared[:20]) > max_bytes:
                raise _too_large(max_bytes)
            with self._quotas.request(key):
                await self._app(scope, self._bounded(receive, max_bytes), send)
        except ApiError as error:
            await JSONResponse(error.body(), error.status, error.headers())(scope, receive, send)

    def _bounded(self, receive: Receive, max_bytes: int) -> Receive:
        """Raises ApiError for a body that is too large, or arrives too slowly."""
        num_bytes, is_whole = 0, False
        began = time.monotonic()

        async def receive_bounded() -> Message:
            nonlocal num_bytes, is_whole
            if is_whole:  # waits for a disconnect
                return await receive()
            allowed_s = self._config.body_grace_s + num_bytes / self._config.min_body_bytes_per_s
            try:
                async with asyncio.timeout(began + allowed_s - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                rate = self._config.min_body_bytes_per_s
                text = f"the body arrives more slowly than {rate} bytes per second"
                raise ApiError(408, text, code="body_timeout", closes=True) from None
            num_bytes += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if num_bytes > max_bytes:
                raise _too_large(max_bytes)
            return message

        return receive_bounded

    def _check_origin(self, request: Request) -> None:
        """Refuses pages of other sites; without keys, also other machines and foreign host names.

        A page of any site can send forms to a server on its visitor's machine (CSRF), or call it by a name of its own
        that resolves to loopback (DNS rebinding).
        """
        host = request.headers.get("host", "").lower()
        origin = request.headers.get("origin")
        if origin is not None and origin not in self._config.cors_origins and urlsplit(origin).netloc.lower() != host:
            text = "pages of other sites may not call this server; add the origin to gateway.cors_origins"
            raise ApiError(403, text, code="origin_not_allowed")
        if self._config.requires_keys or self._config.allow_anonymous:
            return
        client = request.client.host if request.client else ""
        if not _is_loopback(client) or "x-forwarded-for" in request.headers or "forwarded" in request.headers:
            text = (
                "without API keys this server answers only its own machine; set gateway.api_keys, or"
                " gateway.allow_anonymous: true"
            )
            raise ApiError(403, text, code="keys_required")
        name = urlsplit(f"//{host}").hostname or ""
        if not (_is_loopback(name) or name in self._config.allowed_hosts):
            text = "the Host header does not name this machine; add the name to gateway.allowed_hosts"
            raise ApiError(403, text, code="host_not_allowed")

    def _key(self, request: Request) -> ApiKey | None:
        if not self._config.requires_keys or _is_open(request) or _path(request.scope) in PAGE_PATHS:
            return None
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        found = self._keys.find(key.strip())
        if scheme.lower() != "bearer" or found is None:
            raise ApiError(401, "a valid API key is required: Authorization: Bearer KEY", code="invalid_api_key")
        return found


class AllowedOrigins(CORSMiddleware):
    """CORS for pages of `gateway.cors_origins`. Outside of RequestGuard: preflights come without a key, and a page may
    read the guard's errors. The guard refuses other origins.
    """

    def __init__(self, app: ASGIApp, *, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=["*"],
            allow_headers=["*"],  # OpenAI's package for JavaScript sends some of its own
            allow_private_network=True,
            expose_headers=["Accept-Ranges", "Content-Range", "Retry-After", "X-Request-ID"],
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_allowed = scope["type"] == "http" and self.is_allowed_origin(Request(scope).headers.get("origin", ""))
        await (super().__call__ if is_allowed else self.app)(scope, receive, send)


def _describe(request_span: Span, scope: Scope, status: int) -> None:
    """Names a span as OpenTelemetry's conventions for HTTP servers do."""
    request_span.update_name(f"{scope['method']} {_route(scope)}")
    request_span.set_attributes({"http.request.method": scope["method"], "http.route": _route(scope)})
    if status:
        request_span.set_attribute("http.response.status_code", status)
    if status >= 500:
        tracing.fail(request_span, str(status))


def _plain_scope(scope: Scope) -> Scope:
    """Reads HEAD as GET without a body, and a path with a trailing slash as the one without."""
    root, path = scope.get("root_path", ""), scope["path"]
    if len(path) > len(root) + 1:
        path = path.rstrip("/") or "/"
    is_head = scope["method"] == "HEAD"
    return {**scope, "path": path, "method": "GET" if is_head else scope["method"], IS_HEAD: is_head}


def _path(scope: Scope) -> str:
    """Returns the path below the application's prefix."""
    return str(scope["path"].removeprefix(scope.get("root_path", "")))


def _is_open(request: Request) -> bool:
    return _path(request.scope) in OPEN_PATHS and request.query_params.get("deep") != "1"


def _is_loopback(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413, f"the body is larger than the limit of {max_bytes} bytes; upload videos to /v1/files", code="too_large"
    )


def _route(scope: Scope) -> str:
    """Returns the route's pattern, because a raw path would put client input into logs."""
    return str(getattr(scope.get("route"), "path", "unmatched"))
