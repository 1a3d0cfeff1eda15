"""The gateway as a Ray Serve ingress. Its process does not import torch."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.types import ASGIApp

from timeviper_platform.common.logs import setup_logging
from timeviper_platform.serving.gateway.config import HAPROXY_VARIABLE, GatewayConfig
from timeviper_platform.serving.gateway.routes import create_app
from timeviper_platform.serving.messages import (
    AnswerDelta,
    FeatureReference,
    GenerateRequest,
    MediaPage,
    MediaSource,
    Refusal,
    StoredMedium,
)

logger = logging.getLogger(__name__)

READY_TIMEOUT_S = 5.0


class ServiceHandle:
    """Calls a service by its deployment handle and turns Ray's errors into refusals."""

    def __init__(self, name: str, handle: Any) -> None:
        self._name = name
        self._handle = handle
        self._stream_handle = handle.options(stream=True)

    async def features(
        self, source: MediaSource, *, fps: float | None = None, max_frames: int | None = None
    ) -> FeatureReference | Refusal:
        return await self._answer(self._handle.features.remote(source, fps=fps, max_frames=max_frames))

    async def list_media(self, *, after: str, prefix: str, limit: int) -> MediaPage | Refusal:
        return await self._answer(self._handle.list_media.remote(after=after, prefix=prefix, limit=limit))

    async def medium(self, media_id: str) -> StoredMedium | Refusal:
        return await self._answer(self._handle.medium.remote(media_id))

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[AnswerDelta | Refusal]:
        response = self._stream_handle.generate.remote(request)
        is_done = False
        try:
            async for item in response:
                yield item
            is_done = True
        except (RayError, RayServeException) as error:
            is_done = True
            yield self._refusal(error)
        finally:
            if not is_done:  # the client has disconnected: cancelling the replica's generator frees its slots
                response.cancel()

    async def is_ready(self) -> bool:
        try:
            return bool(await asyncio.wait_for(self._handle.is_ready.remote(), READY_TIMEOUT_S))
        except (RayError, RayServeException, TimeoutError):
            return False

    async def _answer(self, response: Any) -> Any:
        try:
            return await response
        except (RayError, RayServeException) as error:
            return self._refusal(error)

    def _refusal(self, error: Exception) -> Refusal:
        if isinstance(error, BackPressureError):
            return Refusal(status=429, message="the server is full, try again", code="busy", retry_after_s=1.0)
        logger.error("the %s failed: %s", self._name, type(error).__name__)
        message = f"the {self._name} is not available, try again"
        return Refusal(status=503, message=message, code="unavailable", retry_after_s=2.0)


@serve.ingress()
class GatewayReplica:
    def __init__(self, config: GatewayConfig, features: Any, engine: Any) -> None:
        setup_logging()
        if os.environ.get(HAPROXY_VARIABLE) == "1":
            config.require_keys(
                f"behind HAProxy ({HAPROXY_VARIABLE}=1), which hides whether a client is on this machine"
            )
        self._app = create_app(
            config, ServiceHandle("feature service", features), ServiceHandle("engine service", engine)
        )

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._app
