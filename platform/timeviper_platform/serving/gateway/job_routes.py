"""Routes of jobs: several questions about a long video, answered in the background."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from timeviper_platform.serving.gateway.chat_request import ChatCompletionRequest, chat_request
from timeviper_platform.serving.gateway.config import ApiKey, CurrentConfig, GatewayConfig
from timeviper_platform.serving.gateway.media.uploads import DATA_SCHEME
from timeviper_platform.serving.gateway.openai_protocol import ApiError
from timeviper_platform.serving.jobs.job_store import Job, JobState, JobStore
from timeviper_platform.serving.jobs.runner import FinalError, JobRunner, TransientError
from timeviper_platform.serving.messages import FeatureProgress

NOT_OF_JOBS = ("messages", "stream", "stream_options")
DEFAULT_PAGE, MAX_PAGE = 20, 100


class NewJob(BaseModel):
    """Questions are answered one after another, each as its own POST /v1/chat/completions, with the other fields."""

    model_config = ConfigDict(extra="allow")

    model: str
    video: str = Field(min_length=1, max_length=4096)
    questions: list[str] = Field(min_length=1, max_length=64)

    @property
    def options(self) -> dict[str, Any]:
        """Raises ApiError 400 for a field that a job cannot have."""
        given = self.model_extra or {}
        options = {name: value for name, value in given.items() if value is not None and value is not False}
        if wrong := next((name for name in NOT_OF_JOBS if name in options), None):
            text = f"a job does not support {wrong}; leave it out"
            raise ApiError(400, text, code="unsupported_parameter", param=wrong)
        return options


class AnswerChat(Protocol):
    async def __call__(
        self, chat: ChatCompletionRequest, tenant: str, key: ApiKey | None, note: Callable[[FeatureProgress], None]
    ) -> dict[str, Any]:
        """Returns a chat completion; raises ApiError."""


class Jobs:
    def __init__(
        self, current: CurrentConfig, answer: AnswerChat, find_key: Callable[[str | None], ApiKey | None]
    ) -> None:
        self._current = current
        self._answer_chat = answer
        self._find_key = find_key
        self._store = JobStore(current.config.media_root)
        self.runner = JobRunner(self._store, self._answer, max_running=current.config.max_running_jobs)

    @property
    def _config(self) -> GatewayConfig:
        return self._current.config

    async def create(self, new: NewJob, tenant: str, key: ApiKey | None) -> Response:
        """Returns 202 with the job.

        Raises:
            ApiError: 400 for questions that chat completions refuse, 429 for too many unfinished jobs.
        """
        if new.video.lower().startswith(DATA_SCHEME):
            text = "a job's video must be stored: upload it to /v1/files"
            raise ApiError(400, text, code="invalid_url", param="video")
        options = new.options
        part = {"type": "video_url", "video_url": {"url": new.video}}
        requests = []
        for question in new.questions:
            content = [part, {"type": "text", "text": question}]
            body = {"model": new.model, "messages": [{"role": "user", "content": content}], **options}
            chat_request(body, max_parts=self._config.max_parts_per_request)
            requests.append(body)
        store, limit = self._store, self._config.max_unfinished_jobs

        def make() -> Job:
            if store.num_unfinished(tenant) >= limit:
                text = f"{limit} jobs are not finished; wait for one or cancel it"
                raise ApiError(429, text, code="too_many_jobs", retry_after_s=10.0)
            sha256 = None if key is None else key.sha256
            values: dict[str, Any] = {"model": new.model, "video": new.video, "questions": new.questions}
            return store.create(tenant, requests=requests, key_sha256=sha256, **values)

        job = await asyncio.to_thread(make)
        self.runner.start(job)
        return JSONResponse(job_json(job, JobState()), 202, {"Location": f"jobs/{job.id}"})

    async def list(self, request: Request) -> dict[str, Any]:
        """Lists the tenant's jobs, the newest first, without their answers; `limit` and `after` as for files."""
        limit, after = request.query_params.get("limit", str(DEFAULT_PAGE)), request.query_params.get("after")
        if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= MAX_PAGE):
            raise ApiError(400, f"limit must be between 1 and {MAX_PAGE}", code="invalid_value", param="limit")

        def read() -> dict[str, Any]:
            jobs, has_more = self._store.page(request.state.tenant, limit=int(limit), after=after)
            data = [job_json(job, self._store.state(job), with_answers=False) for job in jobs]
            ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
            return {"object": "list", "data": data, **ends, "has_more": has_more}

        return await asyncio.to_thread(read)

    async def get(self, request: Request, job_id: str) -> dict[str, Any]:
        job = await self._job(request, job_id)
        return job_json(job, await asyncio.to_thread(self._store.state, job))

    async def cancel(self, request: Request, job_id: str) -> dict[str, Any]:
        """Ends a job and keeps its answers so far. Does nothing to a job that has ended."""
        job = await self._job(request, job_id)
        if not (await asyncio.to_thread(self._store.state, job)).is_final:
            await self.runner.cancel(job)
        return job_json(job, await asyncio.to_thread(self._store.state, job))

    async def _job(self, request: Request, job_id: str) -> Job:
        job = await asyncio.to_thread(self._store.get, request.state.tenant, job_id)
        if job is None:
            raise ApiError(404, "no such job; GET /v1/jobs lists them", code="job_not_found", param="job_id")
        return job

    async def _answer(self, job: Job, number: int, note: Callable[[FeatureProgress], None]) -> dict[str, Any]:
        chat = chat_request(job.requests[number], max_parts=self._config.max_parts_per_request)
        try:
            return await self._answer_chat(chat, job.tenant, self._find_key(job.key_sha256), note)
        except ApiError as error:
            kind = TransientError if error.status in (429, 503) else FinalError
            raise kind(error.body()["error"]) from None


def job_json(job: Job, state: JobState, *, with_answers: bool = True) -> dict[str, Any]:
    return {
        "id": job.id,
        "object": "job",
        "created_at": job.created_at,
        "finished_at": state.finished_at,
        "status": state.status,
        "model": job.model,
        "video": job.video,
        "questions": job.questions,
        "progress": {
            "stage": state.stage,
            "frames_done": state.frames_done,
            "frames_total": state.frames_total,
            "questions_done": len(state.answers),
            "questions_total": len(job.questions),
        },
        "answers": state.answers if with_answers else None,
        "error": state.error,
    }
