"""The gateway as a Ray Serve ingress. Its process does not import torch."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve import metrics as serve_metrics
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.types import ASGIApp

from timeviper_platform.common.logs import setup_logging
from timeviper_platform.common.metrics import RayMetrics
from timeviper_platform.serving.gateway.config import HAPROXY_VARIABLE, GatewayConfig
from timeviper_platform.serving.gateway.middleware import GatewayMetrics
from timeviper_platform.serving.gateway.routes import create_app
from timeviper_platform.serving.limits import Limits
from timeviper_platform.serving.messages import (
    AnswerDelta,
    FeatureProgress,
    FeatureReference,
    GenerateRequest,
    MediaPage,
    MediaSource,
    Refusal,
    StoredMedium,
)

logger = logging.getLogger(__name__)

READY_TIMEOUT_S = 5.0
READY_KEPT_S = 1.0
"""Seconds for which a state of readiness is reused."""
ATTEMPTS = 3
RETRY_S = 0.2
"""Seconds between attempts, in which Ray Serve's router drops a dead replica."""
SCALED = ("HEALTHY", "UPSCALING", "DOWNSCALING")
"""Ray Serve's states of deployments that may have no replica yet, but start one on demand."""


class ServiceHandle:
    """Calls a service by its deployment handle and turns Ray's errors into refusals."""

    def __init__(self, name: str, handle: Any) -> None:
        self._name = name
        # In its throughput mode Ray sends calls by value over gRPC, at most 4 MiB, and objects whose references it
        # pickles there are never freed: only calls without media may go that way.
        self._handle = handle.options(_by_reference=True)
        self._stream_handle = self._handle.options(stream=True)
        self._text_handle = handle.options(stream=True)
        self._can_serve, self._ready_until = False, 0.0

    async def features(
        self,
        source: MediaSource,
        *,
        tenant: str = "",
        fps: float | None = None,
        max_frames: int | None = None,
        whole: bool = True,
    ) -> FeatureReference | Refusal:
        options = {"tenant": tenant, "fps": fps, "max_frames": max_frames, "whole": whole}
        return await self._answer(lambda: self._handle.features.remote(source, **options))

    async def watch(
        self, source: MediaSource, *, tenant: str = "", fps: float | None = None, max_frames: int | None = None
    ) -> AsyncGenerator[FeatureProgress | FeatureReference | Refusal]:
        response = self._stream_handle.watch.remote(source, tenant=tenant, fps=fps, max_frames=max_frames)
        is_done = False
        try:
            async for item in response:
                yield item
            is_done = True
        except (RayError, RayServeException) as error:
            is_done = True
            yield self._refusal(error)
        finally:
            if not is_done:  # the job was cancelled
                response.cancel()

    async def list_media(self, *, after: str, prefix: str, limit: int) -> MediaPage | Refusal:
        return await self._answer(lambda: self._handle.list_media.remote(after=after, prefix=prefix, limit=limit))

    async def medium(self, media_id: str) -> StoredMedium | Refusal:
        return await self._answer(lambda: self._handle.medium.remote(media_id))

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[AnswerDelta | Refusal]:
        handle = self._stream_handle if request.media else self._text_handle
        if request.session_id is not None:
            handle = handle.options(session_id=request.session_id)
        for attempt in range(ATTEMPTS):
            response = handle.generate.remote(request)
            unfinished, has_begun, is_done = request.n, False, False
            try:
                async for item in response:
                    has_begun = True
                    unfinished -= isinstance(item, AnswerDelta) and item.finish_reason is not None
                    is_done = unfinished == 0
                    yield item
                is_done = True
                return
            except (RayError, RayServeException) as error:
                is_done = True
                if has_begun or not isinstance(error, RayActorError) or attempt + 1 == ATTEMPTS:
                    yield self._refusal(error)
                    return
            finally:
                if not is_done:  # the client has disconnected: cancelling the replica's generator frees its slots
                    response.cancel()
            await asyncio.sleep(RETRY_S)  # the replica has died before the first token: another one answers

    async def is_ready(self, *, deep: bool) -> bool:
        try:
            if deep:
                return bool(await asyncio.wait_for(self._handle.is_ready.remote(), READY_TIMEOUT_S))
            now = asyncio.get_running_loop().time()
            if now >= self._ready_until:  # needs no key, and calls Ray Serve's controller
                self._can_serve = await asyncio.wait_for(asyncio.to_thread(self._ask_controller), READY_TIMEOUT_S)
                self._ready_until = now + READY_KEPT_S
            return self._can_serve
        except (RayError, RayServeException, TimeoutError):
            return False

    def _ask_controller(self) -> bool:
        """Whether replicas run or, with none, start on demand."""
        application = serve.status().applications.get(self._handle.app_name)
        deployment = None if application is None else application.deployments.get(self._handle.deployment_name)
        if deployment is None:
            return False
        return deployment.replica_states.get("RUNNING", 0) > 0 or deployment.status in SCALED

    async def _answer(self, call: Callable[[], Any]) -> Any:
        """Calls again when a replica has died; every call only reads or computes."""
        for attempt in range(ATTEMPTS):
            response = call()
            try:
                return await response
            except asyncio.CancelledError:  # the client has disconnected
                response.cancel()
                raise
            except (RayError, RayServeException) as error:
                if not isinstance(error, RayActorError) or attempt + 1 == ATTEMPTS:
                    return self._refusal(error)
            await asyncio.sleep(RETRY_S)
        raise AssertionError("the last attempt returns")

    def _refusal(self, error: Exception) -> Refusal:
        if isinstance(error, BackPressureError):
            return Refusal(status=429, message="the server is full, try again", code="busy", retry_after_s=1.0)
        logger.error("the %s failed: %s", self._name, type(error).__name__)
        message = f"the {self._name} is not available, try again"
        return Refusal(status=503, message=message, code="unavailable", retry_after_s=2.0)


@serve.ingress()
class GatewayReplica:
    def __init__(self, config: GatewayConfig, max_new_tokens: int, features: Any, engine: Any) -> None:
        """`max_new_tokens` is the engine's limit for an answer."""
        setup_logging(as_json=True)
        self._limits = Limits("gateway", config, check=partial(check_max_tokens, max_new_tokens=max_new_tokens))
        if os.environ.get(HAPROXY_VARIABLE) == "1":
            config.require_keys(
                f"behind HAProxy ({HAPROXY_VARIABLE}=1), which hides whether a client is on this machine"
            )
        self._app = create_app(
            config,
            ServiceHandle("feature service", features),
            ServiceHandle("engine service", engine),
            GatewayMetrics(RayMetrics("timeviper_gateway_", module=serve_metrics)),
        )

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """See `Limits.reconfigure`."""
        if self._limits.reconfigure(user_config):
            self._app.state.current.config = self._limits.config

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._app


def check_max_tokens(config: GatewayConfig, max_new_tokens: int) -> None:
    """Raises ValueError when requests may ask for longer answers than the engine gives."""
    if config.max_tokens > max_new_tokens:
        raise ValueError(
            f"gateway.max_tokens = {config.max_tokens} exceeds engine.engine.max_new_tokens = {max_new_tokens}; lower"
            " the first"
        )
