"""runner: jobs whose process dies, jobs that another process cancels, and what is left of old ones."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from timeviper_platform.serving.gateway.media.uploads import MediaStore
from timeviper_platform.serving.jobs import job_store
from timeviper_platform.serving.jobs import runner as module
from timeviper_platform.serving.jobs.job_store import Job, JobStore
from timeviper_platform.serving.jobs.runner import JobRunner

DYING = """
import asyncio, sys
from timeviper_platform.serving.jobs.job_store import JobStore
from timeviper_platform.serving.jobs.runner import JobRunner

async def main():
    store = JobStore(sys.argv[1])
    async def answer(job, number, note):
        if number == 1:
            print("asked", flush=True)
            await asyncio.sleep(60)
        return {"by": "the first"}
    runner = JobRunner(store, answer, max_running=1)
    runner.start(store.get("a", sys.argv[2]))
    await asyncio.sleep(60)

asyncio.run(main())
"""


def make(store: JobStore) -> Job:
    questions = ["one?", "two?", "three?"]
    return store.create("a", model="m", video="feature://v", questions=questions, requests=[{}] * 3)


async def until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not done():
            await asyncio.sleep(0.02)


def test_another_process_goes_on_with_the_questions_of_one_that_was_killed(tmp_path: Path) -> None:
    store = JobStore(str(tmp_path))
    job = make(store)
    with subprocess.Popen(
        [sys.executable, "-c", DYING, str(tmp_path), job.id], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "asked\n"
        deadline = time.monotonic() + 20
        while len(store.state(job).answers) < 1:
            assert time.monotonic() < deadline
            time.sleep(0.02)

        async def answer(job: Job, number: int, note: Any) -> dict[str, Any]:
            return {"by": "the second"}

        async def main() -> None:
            runner = JobRunner(store, answer, max_running=1)
            taking = asyncio.create_task(runner.take_over(keep_s=None))
            await asyncio.sleep(0.5)
            assert store.state(job).status == "running"  # its process holds the lease
            process.kill()
            await asyncio.to_thread(process.wait)
            await until(lambda: store.state(job).is_final)
            taking.cancel()
            await runner.close()

        asyncio.run(main())
    state = store.state(job)
    assert (state.status, state.stage) == ("completed", "ended")
    assert [one["by"] for one in state.answers] == ["the first", "the second", "the second"]
    assert list(store.unfinished()) == []


def test_a_job_is_cancelled_by_a_process_that_does_not_run_it(tmp_path: Path) -> None:
    store = JobStore(str(tmp_path))
    job = make(store)
    stopped = []

    async def answer(job: Job, number: int, note: Any) -> dict[str, Any]:
        try:
            await asyncio.sleep(60)
        finally:
            stopped.append(number)
        return {}

    async def main() -> None:
        owner, other = (JobRunner(store, answer, max_running=1) for _ in range(2))
        owner.start(job)
        await until(lambda: store.state(job).status == "running")
        await other.cancel(job)
        assert store.state(job).status == "cancelled"
        async with asyncio.timeout(1):
            while not stopped:
                await asyncio.sleep(0.01)
        await until(lambda: not list(store.unfinished()))
        await owner.close()
        await other.close()

    asyncio.run(main())
    assert (store.state(job).status, stopped) == ("cancelled", [0])


def test_a_job_that_another_process_deletes_while_it_is_looked_up_is_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = JobStore(str(tmp_path))
    job, other = make(store), make(store)
    shutil.rmtree(store.folder(job))
    monkeypatch.setattr(job_store, "exists", lambda uri: uri.endswith(".json"))  # it existed a moment ago
    monkeypatch.setattr(job_store, "_folders", lambda uri: ["a"] if uri.endswith("_jobs") else [job.id, other.id])
    assert store.get("a", job.id) is None
    assert [found.id for found in store.unfinished()] == [other.id]
    assert not store.state(job).is_final


def test_ended_jobs_are_deleted_by_age_and_are_no_tenant_of_the_uploads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SCAN_S", 0.01)
    store = JobStore(str(tmp_path))
    old, new = make(store), make(store)
    state = store.state(old)
    state.end("completed")
    state.finished_at = int(time.time()) - 1000
    store.write_state(old, state)
    assert MediaStore(str(tmp_path)).tenants() == []

    async def answer(job: Job, number: int, note: Any) -> dict[str, Any]:
        return {}

    async def main() -> None:
        runner = JobRunner(store, answer, max_running=1)
        taking = asyncio.create_task(runner.take_over(keep_s=500.0))
        await until(lambda: store.get("a", old.id) is None and store.state(new).is_final)
        taking.cancel()
        await runner.close()

    asyncio.run(main())
    assert [job.id for job in store.page("a", limit=10)[0]] == [new.id]


def test_ended_jobs_are_not_read_again_to_look_for_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, every gateway read all jobs of a month every five seconds, and each new job those of its tenant."""
    store = JobStore(str(tmp_path))
    ended, open_ = [make(store) for _ in range(5)], make(store)
    for job in ended:
        state = store.state(job)
        state.end("completed")
        store.write_state(job, state)
    assert [job.id for job in store.unfinished()] == [open_.id]
    reads = []
    read = job_store.read_json_or_none
    monkeypatch.setattr(job_store, "read_json_or_none", lambda uri: reads.append(uri) or read(uri))
    assert [job.id for job in store.unfinished()] == [open_.id]
    assert store.num_unfinished("a") == 1
    assert {uri.split("/")[-2] for uri in reads} == {open_.id}
    store.delete_finished(before=time.time() + 1)
    assert [job.id for job in store.page("a", limit=10)[0]] == [open_.id]


def test_jobs_come_in_pages_the_newest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = JobStore(str(tmp_path))
    made = []
    for number in range(5):
        monkeypatch.setattr(job_store.time, "time_ns", lambda number=number: (10**9 + number) * 10**9)
        made.append(make(store).id)
    seen: list[str] = []
    while True:
        jobs, has_more = store.page("a", limit=2, after=seen[-1] if seen else None)
        seen += [job.id for job in jobs]
        if not has_more:
            break
        assert len(jobs) == 2
    assert seen == made[::-1]
