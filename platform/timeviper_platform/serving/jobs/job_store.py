"""Jobs on storage: request, state and cancellation are files in the job's folder."""

from __future__ import annotations

import contextlib
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from timeviper_platform.common.storage import (
    exists,
    folders_in,
    join_uri,
    read_json_or_none,
    split_uri,
    write_bytes,
    write_json,
)

JobStatus = Literal["queued", "running", "completed", "failed", "cancelled"]
FINAL: tuple[JobStatus, ...] = ("completed", "failed", "cancelled")
FOLDER = "_jobs"
"""Next to the tenants' folders; no tenant may have such a name."""
JOB_ID = re.compile(r"job-[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """The request. Never changes."""

    id: str
    tenant: str
    created_at: int
    """Unix seconds."""
    model: str
    video: str
    questions: list[str]
    requests: list[dict[str, Any]]
    """Body of a chat completion for each question."""
    key_sha256: str | None = None
    """Hash of the API key whose quota the frames count for."""


@dataclass(kw_only=True, slots=True)
class JobState:
    """Written by the process that holds the job's lease."""

    status: JobStatus = "queued"
    stage: Literal["waiting", "decoding", "encoding", "answering", "ended"] = "waiting"
    frames_done: int = 0
    frames_total: int | None = None
    """None until the video is decoded."""
    answers: list[dict[str, Any]] = field(default_factory=list)
    """Chat completions of the first questions."""
    error: dict[str, Any] | None = None
    finished_at: int | None = None

    @property
    def is_final(self) -> bool:
        return self.status in FINAL

    def end(self, status: JobStatus, error: dict[str, Any] | None = None) -> None:
        self.status, self.stage, self.error, self.finished_at = status, "ended", error, int(time.time())


class JobStore:
    """Jobs by tenant. Ended jobs never change, and are read only once to look for work."""

    def __init__(self, media_root: str) -> None:
        self._root = join_uri(media_root, FOLDER)
        self._ended: dict[tuple[str, str], int] = {}
        """Unix seconds at which jobs ended, by tenant and id."""

    def create(
        self,
        tenant: str,
        *,
        model: str,
        video: str,
        questions: list[str],
        requests: list[dict[str, Any]],
        key_sha256: str | None = None,
    ) -> Job:
        job = Job(
            id=f"job-{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}",  # names sort by time
            tenant=tenant,
            created_at=int(time.time()),
            model=model,
            video=video,
            questions=questions,
            requests=requests,
            key_sha256=key_sha256,
        )
        write_json(self._uri(job, "job.json"), asdict(job))
        return job

    def get(self, tenant: str, job_id: str) -> Job | None:
        if JOB_ID.fullmatch(job_id) is None:
            return None
        found = read_json_or_none(join_uri(self._root, tenant, job_id, "job.json"))
        return None if found is None else Job(**found)

    def state(self, job: Job) -> JobState:
        """Returns the state; an unfinished job with a cancellation counts as cancelled."""
        state = self._written_state(job)
        if not state.is_final and self.is_cancelled(job):
            state.end("cancelled")
        return state

    def write_state(self, job: Job, state: JobState) -> None:
        write_json(self._uri(job, "state.json"), asdict(state))

    def cancel(self, job: Job) -> None:
        write_bytes(self._uri(job, "cancel"), b"")

    def is_cancelled(self, job: Job) -> bool:
        return exists(self._uri(job, "cancel"))

    def page(self, tenant: str, *, limit: int, after: str | None = None) -> tuple[list[Job], bool]:
        """Returns up to `limit` jobs after an id, the newest first, and whether there are more."""
        ids = sorted(_folders(join_uri(self._root, tenant)), reverse=True)
        ids = [job_id for job_id in ids if after is None or job_id < after]
        found = [self.get(tenant, job_id) for job_id in ids[:limit]]
        return [job for job in found if job is not None], len(ids) > limit

    def num_unfinished(self, tenant: str) -> int:
        return sum(not self.state(job).is_final for job in self._unended(tenant))

    def unfinished(self) -> Iterator[Job]:
        """Yields jobs that no process has finished, of any tenant, cancelled ones too; the oldest first."""
        for tenant in _folders(self._root):
            yield from self._unended(tenant)

    def delete_finished(self, *, before: float) -> None:
        """Deletes jobs that ended before Unix seconds and that `unfinished` has read."""
        for (tenant, job_id), ended_at in list(self._ended.items()):
            if ended_at < before:
                filesystem, path = split_uri(join_uri(self._root, tenant, job_id))
                with contextlib.suppress(FileNotFoundError):  # deleted by another gateway
                    filesystem.rm(path, recursive=True)
                self._ended.pop((tenant, job_id), None)

    def folder(self, job: Job) -> str:
        return join_uri(self._root, job.tenant, job.id)

    def _unended(self, tenant: str) -> Iterator[Job]:
        for job_id in sorted(_folders(join_uri(self._root, tenant))):
            if (tenant, job_id) in self._ended or (job := self.get(tenant, job_id)) is None:
                continue
            state = self._written_state(job)
            if state.is_final:
                self._ended[tenant, job_id] = state.finished_at or job.created_at
            else:
                yield job

    def _written_state(self, job: Job) -> JobState:
        return JobState(**(read_json_or_none(self._uri(job, "state.json")) or {}))

    def _uri(self, job: Job, name: str) -> str:
        return join_uri(self.folder(job), name)


def _folders(uri: str) -> list[str]:
    return [folder.rpartition("/")[2] for folder in folders_in(uri)]
