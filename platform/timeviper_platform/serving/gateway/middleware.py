"""ASGI middleware for all routes: API keys, body limits, metrics, and logs without bodies, keys or queries.

Sets `request.state.tenant`.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
import traceback
from collections.abc import Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from timeviper_platform.common.metrics import prometheus_metrics
from timeviper_platform.serving.gateway.config import GatewayConfig
from timeviper_platform.serving.gateway.openai_protocol import ApiError

logger = logging.getLogger(__name__)

OPEN_PATHS = ("/health/live", "/health/ready")
"""Cluster probes, which send no key."""
PUBLIC_TENANT = "public"


class GatewayMetrics:
    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._metrics = prometheus_metrics("timeviper_gateway_", self._registry)

    def start_request(self) -> None:
        self._metrics["ongoing_requests"].inc()

    def end_request(self, route: str, status: int) -> None:
        self._metrics["ongoing_requests"].dec()
        self._metrics["requests"].labels(route=route, status=str(status)).inc()

    def add_usage(self, usage: Mapping[str, Any]) -> None:
        """Counts the tokens of OpenAI's usage object."""
        self._metrics["prompt_tokens"].inc(usage["prompt_tokens"])
        self._metrics["cached_prompt_tokens"].inc(usage["prompt_tokens_details"]["cached_tokens"])
        self._metrics["completion_tokens"].inc(usage["completion_tokens"])

    def render(self) -> bytes:
        return generate_latest(self._registry)


class RequestGuard:
    """Authenticates, limits, counts and logs requests; answers 500 to unexpected errors."""

    def __init__(self, app: ASGIApp, *, config: GatewayConfig, metrics: GatewayMetrics) -> None:
        self._app = app
        self._config = config
        self._metrics = metrics

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

        self._metrics.start_request()
        try:
            await self._guarded(scope, receive, send_noting_status)
        except Exception as error:  # noqa: BLE001 - a bug becomes a 500 in OpenAI's format
            # the message is not logged, because it may quote the request
            frames = "".join(traceback.format_tb(error.__traceback__))
            logger.error("%s failed: %s at\n%s", _route(scope), type(error).__name__, frames)
            if status == 0:
                bug = ApiError(500, "the server failed to answer this request", code="internal_error")
                await JSONResponse(bug.body(), 500)(scope, receive, send_noting_status)
        finally:
            self._metrics.end_request(_route(scope), status)
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
        # compares every key in constant time, so that timing reveals nothing
        matches = [entry.tenant for entry in self._config.api_keys if hmac.compare_digest(entry.sha256, digest)]
        if scheme.lower() != "bearer" or not matches:
            raise ApiError(401, "a valid API key is required: Authorization: Bearer KEY", code="invalid_api_key")
        return matches[0]


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413, f"the body is larger than the limit of {max_bytes} bytes; upload videos to /v1/files", code="too_large"
    )


def _route(scope: Scope) -> str:
    """Returns the route's pattern, because a raw path would put client input into logs."""
    return str(getattr(scope.get("route"), "path", "unmatched"))
