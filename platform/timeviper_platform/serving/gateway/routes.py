"""An ASGI application with OpenAI's routes. Imports neither torch nor Ray."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.telemetry import TelemetryConfig
from starlette.exceptions import HTTPException

from timeviper_platform.serving.gateway.answers import Answers
from timeviper_platform.serving.gateway.bodies import Bodies
from timeviper_platform.serving.gateway.chat import ChatPreparation
from timeviper_platform.serving.gateway.chat_request import (
    parse_object,
    validated,
)
from timeviper_platform.serving.gateway.config import CurrentConfig, GatewayConfig
from timeviper_platform.serving.gateway.job_routes import Jobs, NewJob
from timeviper_platform.serving.gateway.keys import KeyRing, Quotas
from timeviper_platform.serving.gateway.media.file_routes import FileRoutes
from timeviper_platform.serving.gateway.media.janitor import DAY_S, keep_clean
from timeviper_platform.serving.gateway.media.uploads import MediaStore
from timeviper_platform.serving.gateway.middleware import AllowedOrigins, GatewayMetrics, RequestGuard
from timeviper_platform.serving.gateway.openai_protocol import ApiError
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
from timeviper_platform.serving.messages import (
    EngineClient,
    FeatureClient,
)
from timeviper_platform.serving.page import static_files as page

NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
"""FastAPI's own records paths with their ids, and the messages of exceptions; `RequestGuard` has spans and counts."""


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

    route("/v1/chat/completions", gateway.answers.chat_completions, "POST", CHAT)
    route("/v1/responses", gateway.answers.create_response, "POST", RESPONSE)
    route("/v1/models", gateway.list_models, "GET", MODELS)
    route("/v1/models/{model:path}", gateway.get_model, "GET", MODEL)
    route("/v1/files", gateway.files.create_file, "POST", UPLOAD)
    route("/v1/files", gateway.files.list_files, "GET", FILES)
    route("/v1/files/{file_id}", gateway.files.get_file, "GET", FILE)
    route("/v1/files/{file_id}", gateway.files.delete_file, "DELETE", DELETED)
    route("/v1/files/{file_id}/content", gateway.files.get_content, "GET", CONTENT)
    route("/v1/videos", gateway.files.list_videos, "GET", VIDEOS)
    route("/v1/videos/{video_id:path}/content", gateway.files.get_video_content, "GET", CONTENT)
    route("/v1/videos/{video_id:path}", gateway.files.get_video, "GET", VIDEO)
    route("/v1/jobs", gateway.create_job, "POST", NEW_JOB)
    route("/v1/jobs", gateway.jobs.list, "GET", JOBS)
    route("/v1/jobs/{job_id}", gateway.jobs.get, "GET", JOB)
    route("/v1/jobs/{job_id}/cancel", gateway.jobs.cancel, "POST", JOB)
    route("/v1/uploads", gateway.files.create_upload, "POST", NEW_UPLOAD)
    route("/v1/uploads/{upload_id}/parts", gateway.files.add_upload_part, "POST", PART)
    route("/v1/uploads/{upload_id}/complete", gateway.files.complete_upload, "POST", COMPLETED)
    route("/v1/uploads/{upload_id}/cancel", gateway.files.cancel_upload, "POST", CANCELLED)
    route("/health/live", gateway.live, "GET", LIVE)
    route("/health/ready", gateway.ready, "GET", READY)
    route("/metrics", lambda: PlainTextResponse(metrics.render()), "GET", METRICS)
    api.routes.extend(page.routes())
    api.add_exception_handler(ApiError, _answer_api_error)
    api.add_exception_handler(HTTPException, _answer_http_exception)
    api.openapi = lambda: document(api)  # type: ignore[method-assign]  # as FastAPI's documentation extends it
    api.state.current = current
    api.add_middleware(RequestGuard, current=current, keys=keys, quotas=quotas, metrics=metrics)
    if config.cors_origins:
        api.add_middleware(AllowedOrigins, origins=config.cors_origins)
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
    """Routes other than those of answers, files and jobs."""

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
        self._features = features
        self._engine = engine
        self.store = MediaStore(current.config.media_root)
        self._bodies = Bodies(current)
        self.files = FileRoutes(current, features, self.store, self._bodies)
        preparation = ChatPreparation(current, features, self.store)
        self.answers = Answers(current, preparation, engine, self._bodies, metrics, quotas)
        self.jobs = Jobs(current, self.answers.answer_for_job, keys.of_hash)
        self._created = int(time.time())

    async def live(self) -> dict[str, str]:
        return {"status": "live"}

    async def ready(self, request: Request) -> Response:
        """Returns 503 unless both services run or can start. `deep=1` calls a replica of each, which may start one."""
        deep = request.query_params.get("deep") == "1"
        features, engine = await asyncio.gather(self._features.is_ready(deep=deep), self._engine.is_ready(deep=deep))
        body = {"status": "ready" if features and engine else "not ready", "features": features, "engine": engine}
        return JSONResponse(body, 200 if features and engine else 503)

    async def list_models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._model()]}

    async def get_model(self, model: str) -> dict[str, Any]:
        self.answers.check_model(model)
        return self._model()

    async def create_job(self, request: Request) -> Response:
        new = validated(NewJob, await self._bodies.parsed(request, parse_object))
        self.answers.check_model(new.model)
        return await self.jobs.create(new, request.state.tenant, request.state.key)

    def _model(self) -> dict[str, Any]:
        return {
            "id": self._current.config.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "timeviper",
        }
