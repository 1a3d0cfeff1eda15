"""The gateway as a Ray Serve ingress: the two services behind their deployment handles.

Kept apart from app.py so that a gateway's process never loads what the other two need. What Ray says about a service
(gone, full, broken) becomes a refusal here; nothing above knows Ray.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.types import ASGIApp

from timeviper_platform.common.logs import setup_logging
from timeviper_platform.serving.gateway.config import GatewayConfig
from timeviper_platform.serving.gateway.routes import create_app
from timeviper_platform.serving.messages import AnswerDelta, FeatureReference, FeatureRequest, GenerateRequest, Refusal

logger = logging.getLogger(__name__)

READY_TIMEOUT_S = 5.0


class FeatureHandle:
    """FeatureClient over a deployment handle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def features(self, request: FeatureRequest) -> FeatureReference | Refusal:
        """See FeatureClient."""
        try:
            answer: FeatureReference | Refusal = await self._handle.features.remote(request)
        except (RayError, RayServeException) as error:
            return _refusal("feature service", error)
        return answer

    async def is_ready(self) -> bool:
        """See FeatureClient."""
        return await _is_ready(self._handle)


class EngineHandle:
    """EngineClient over a deployment handle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle.options(stream=True)
        self._plain_handle = handle

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[AnswerDelta | Refusal]:
        """See EngineClient."""
        response = self._handle.generate.remote(request)
        is_done = False
        try:
            async for item in response:
                yield item
            is_done = True
        except (RayError, RayServeException) as error:
            is_done = True
            yield _refusal("engine service", error)
        finally:
            if not is_done:  # the client has gone: the replica's generator is cancelled, which frees its slots
                response.cancel()

    async def is_ready(self) -> bool:
        """See EngineClient."""
        return await _is_ready(self._plain_handle)


@serve.ingress()
class GatewayReplica:
    """One replica of the gateway."""

    def __init__(self, config: GatewayConfig, features: Any, engine: Any) -> None:
        """`features` and `engine` are deployment handles."""
        setup_logging()
        self._app = create_app(config, FeatureHandle(features), EngineHandle(engine))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Ray Serve asks for the application after construction."""
        return self._app


async def _is_ready(handle: Any) -> bool:
    try:
        return bool(await asyncio.wait_for(handle.is_ready.remote(), READY_TIMEOUT_S))
    except (RayError, RayServeException, TimeoutError):
        return False


def _refusal(service: str, error: Exception) -> Refusal:
    if isinstance(error, BackPressureError):
        return Refusal(status=429, message="the server is full, try again", code="busy", retry_after_s=1.0)
    logger.error("the %s failed: %s", service, type(error).__name__)
    return Refusal(
        status=503, message=f"the {service} is not available, try again", code="unavailable", retry_after_s=2.0
    )
