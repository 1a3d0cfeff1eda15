"""What holds for every request, whatever its route: a key, a limit on its body, counters, one line in the log.

An ASGI middleware: knows keys, tenants and bytes, but no route's meaning. The tenant it finds is `request.state.tenant`
to the handlers. Logs and counters hold method, route, status and times: no bodies, keys or queries.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from timeviper_platform.serving.gateway.config import GatewayConfig
from timeviper_platform.serving.gateway.openai_protocol import ApiError

logger = logging.getLogger(__name__)

OPEN_PATHS = ("/health/live", "/health/ready")
"""what needs no key: probes of the cluster have none"""
PUBLIC_TENANT = "public"


@dataclass(slots=True)
class Counters:
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


class Edge:
    """What holds for every request: a key, a limit on its body, an answer even to our own bugs, one line in the log."""

    def __init__(self, app: ASGIApp, *, config: GatewayConfig, counters: Counters) -> None:
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
