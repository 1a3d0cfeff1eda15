"""Limits of Ray Serve's HTTP servers: slow and greedy clients, Ray's own errors, headers that override timeouts.

Ray Serve calls `middlewares` in each process that listens (a proxy, or a replica behind HAProxy) when
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

import uvicorn.config
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from timeviper_platform.serving.gateway.config import HAPROXY_VARIABLE, ConnectionLimits
from timeviper_platform.serving.gateway.openai_protocol import ApiError

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
LIMITS_VARIABLE = "TIMEVIPER_CONNECTION_LIMITS"
"""ConnectionLimits as JSON; Ray passes no arguments to the callback."""

STRIPPED_HEADERS = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled")
"""Any client could use these to switch off Ray Serve's timeouts or its detection of disconnects."""
MAX_REQUEST_ID = 128
STALL_S = 2.0
"""Seconds without data after which a request may lose its connection to a new one of the same client."""
REFUSED_CONNECTIONS = 128
"""Connections above a client's limit that are answered 429; further ones are closed unread."""
LINGER_S = 2.0
"""A request answered before its end is read until it pauses this long; else its client would not see the answer."""
LINGER_MAX_S = 30.0
"""Maximum seconds of that reading."""


def environment(limits: ConnectionLimits) -> dict[str, str]:
    """Returns the variables of Ray Serve's controller that apply these limits."""
    return {CALLBACK_VARIABLE: f"{__name__}:middlewares", LIMITS_VARIABLE: json.dumps(asdict(limits))}


def middlewares() -> list[Middleware]:
    """Bounds the connections of the server about to start in this process; returns its middleware."""
    limits = ConnectionLimits(**json.loads(os.environ.get(LIMITS_VARIABLE, "{}")))
    BoundedProtocol.limits = limits
    BoundedProtocol.counts_clients = os.environ.get(HAPROXY_VARIABLE) != "1"  # all clients would have its address
    # Ray Serve leaves the choice of the protocol to uvicorn, which looks it up here
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{BoundedProtocol.__name__}"
    return [Middleware(RayAnswers)]


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with deadlines for headers and reading, and a number of connections per client.

    Bodies have their deadline in the gateway, which can answer 408.
    """

    limits: ClassVar[ConnectionLimits] = ConnectionLimits()
    counts_clients: ClassVar[bool] = True
    _open: ClassVar[dict[str, dict[BoundedProtocol, None]]] = {}
    """Connections by client address, oldest first."""

    _header_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _header_bytes = 0
    _last_data = 0.0
    """Time of the last data, of the end of the last answer, or of the connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._last_data = self.loop.time()
        own = self._open.setdefault(self._address(), {})
        if self.counts_clients and len(own) >= self.limits.max_per_client:
            # not this one: a client whose connections are all held open could not even ask for the server's health
            stalled = next((other for other in own if other._is_stalled()), None)
            if stalled is not None:
                del own[stalled]
                stalled.transport.abort()
            elif len(own) < self.limits.max_per_client + REFUSED_CONNECTIONS:
                self.app = refuse_connection
            else:
                transport.close()
                return
        own[self] = None
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timers()
        address = self._address()
        own = self._open.get(address, {})
        own.pop(self, None)
        if not own:
            self._open.pop(address, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._header_timer is not None:
            self._header_bytes += len(data)
        self._last_data = self.loop.time()
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._header_timer is not None and self._header_bytes > self.limits.max_header_bytes:
            self.send_400_response("The headers are too large.")
        elif self._header_timer is None and self.timeout_keep_alive_task is None and not self._in_request():
            self._await_headers()  # the next request of the connection has begun

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._unset_keepalive_if_required()

    def on_headers_complete(self) -> None:
        self._end_headers()
        super().on_headers_complete()
        if self.cycle is not None:
            self.cycle.transport = ClosedAfterRequest(self.transport, self.cycle)  # type: ignore[assignment]

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if self.cycle is not None and self.cycle.response_complete and self.cycle.more_body:
            self.cycle.more_body = False
            if self.cycle.keep_alive:
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )
            else:
                self.transport.close()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._last_data = self.loop.time()
        if self.cycle.response_complete and self.cycle.more_body:  # else it is the next request's
            self._unset_keepalive_if_required()
            self._end_unread(self.cycle, self.loop.time() + LINGER_MAX_S)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.limits.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def send_400_response(self, msg: str) -> None:
        body = json.dumps(ApiError(400, msg, code="invalid_http").body()).encode()
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()

    def _end_unread(self, cycle: RequestResponseCycle, deadline: float) -> None:
        """Closes a connection once its answered request pauses; drops what arrives until then."""
        if self.cycle is not cycle or not cycle.more_body:
            return
        wait_s = min(self._last_data + LINGER_S, deadline) - self.loop.time()
        if wait_s <= 0:
            self.transport.close()
        else:
            self.loop.call_later(wait_s, self._end_unread, cycle, deadline)

    def _address(self) -> str:
        return self.client[0] if self.client else ""

    def _is_stalled(self) -> bool:
        """Whether the rest of a request, or a next request, has been awaited for STALL_S."""
        is_awaited = not self._in_request() or self.cycle.more_body
        return is_awaited and self.loop.time() - self._last_data >= STALL_S

    def _in_request(self) -> bool:
        return self.cycle is not None and (self.cycle.more_body or not self.cycle.response_complete)

    def _await_headers(self) -> None:
        self._header_bytes = 0
        self._header_timer = self.loop.call_later(self.limits.header_timeout_s, self.transport.abort)

    def _end_headers(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _cancel_timers(self) -> None:
        self._end_headers()
        if self._write_timer is not None:
            self._write_timer.cancel()


async def refuse_connection(scope: Scope, receive: Receive, send: Send) -> None:
    """The application of connections above a client's limit."""
    text = "this address has too many connections open (gateway.connections.max_per_client), try again"
    error = ApiError(429, text, code="too_many_connections", retry_after_s=1.0, closes=True)
    await JSONResponse(error.body(), error.status, error.headers())(scope, receive, send)


class ClosedAfterRequest:
    """The transport of one request. Stays open when uvicorn answers and closes it before the request's end.

    A closed socket with unread data resets the connection, and the client loses the answer.
    """

    def __init__(self, transport: asyncio.Transport, cycle: RequestResponseCycle) -> None:
        self._transport = transport
        self._cycle = cycle

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        if not (self._cycle.response_complete and self._cycle.more_body):
            self._transport.close()


class RayAnswers:
    """Puts Ray Serve's own errors into OpenAI's format, and drops headers that override its timeouts."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/-/"):  # Ray's own routes
            await self._app(scope, receive, send)
            return
        scope["headers"] = [pair for pair in scope["headers"] if not _is_dropped(*pair)]
        is_replaced = False

        async def send_in_format(message: Message) -> None:
            nonlocal is_replaced
            if message["type"] == "http.response.start" and (error := _rays_error(message, scope["path"])):
                is_replaced = True
                body = json.dumps(error.body()).encode()
                headers = MutableHeaders(raw=[*message.get("headers", ())])
                headers["content-type"], headers["content-length"] = "application/json", str(len(body))
                for name, value in error.headers().items():
                    headers.setdefault(name, value)
                await send({**message, "status": error.status, "headers": headers.raw})
                await send({"type": "http.response.body", "body": body})
            elif not is_replaced:
                await send(message)

        await self._app(scope, receive, send_in_format)


def _is_dropped(name: bytes, value: bytes) -> bool:
    # a request's id goes to logs and back to the client
    is_bad_id = name == b"x-request-id" and (len(value) > MAX_REQUEST_ID or not value.isascii())
    return name.lower().replace(b"_", b"-") in STRIPPED_HEADERS or is_bad_id


def _rays_error(message: Mapping[str, Any], path: str) -> ApiError | None:
    """Returns what to send for an error of Ray Serve, which is plain text; the gateway's are JSON."""
    status = int(message["status"])
    headers = dict(message.get("headers", ()))
    if status < 400 or not headers.get(b"content-type", b"").startswith(b"text/plain"):
        return None
    if status == 404 and ("/v1/" in path or "/health/" in path):  # no application: starting, or shutting down
        text = "no application runs here: it starts or ends, or the path lacks its prefix; try again"
        return ApiError(503, text, code="unavailable", retry_after_s=2.0)
    known = {
        404: ("there is no such path; the API is below /v1", "unknown_url", None),
        408: ("the request took longer than the server allows", "timeout", None),
        429: ("the server is full, try again", "busy", 1.0),
        503: ("the server is not available, try again", "unavailable", 2.0),
    }
    text, code, retry_after_s = known.get(status, ("the server failed to answer this request", "internal_error", None))
    return ApiError(status, text, code=code, retry_after_s=retry_after_s)
