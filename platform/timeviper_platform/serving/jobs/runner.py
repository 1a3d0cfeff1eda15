"""Runs jobs in a gateway's process. A job whose process has died is taken over by any other that sees its storage."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from timeviper_platform.common.lease import LeaseHeldError, hold_lease
from timeviper_platform.serving.jobs.job_store import Job, JobState, JobStore
from timeviper_platform.serving.messages import FeatureProgress

logger = logging.getLogger(__name__)

POLL_S = 0.4
"""Seconds between checks for a cancellation, and between writes of the progress."""
SCAN_S = 5.0
"""Seconds between searches for jobs without a process."""
RETRY_S = 1800.0
"""Seconds for which a question is retried while a service is unavailable or full."""
MAX_WAIT_S = 15.0

AnswerQuestion = Callable[[Job, int, Callable[[FeatureProgress], None]], Awaitable[dict[str, Any]]]
"""Answers a job's question by its number; reports progress."""


class TransientError(Exception):
    """A service is unavailable or full; the job shows `error` if that lasts."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__()
        self.error = error


class FinalError(TransientError):
    """The question cannot be answered."""


class JobRunner:
    def __init__(self, store: JobStore, answer: AnswerQuestion, *, max_running: int) -> None:
        self._store = store
        self._answer = answer
        self._slots = asyncio.Semaphore(max_running)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._wakes: dict[str, asyncio.Event] = {}

    def start(self, job: Job) -> None:
        """Runs a job in the background, unless it already runs here."""
        if job.id in self._tasks:
            return
        self._wakes[job.id] = asyncio.Event()
        task = self._tasks[job.id] = asyncio.create_task(self._run(job))
        task.add_done_callback(lambda done: self._forget(job, done))

    async def cancel(self, job: Job) -> None:
        """Cancels a job, which may run in another process."""
        await asyncio.to_thread(self._store.cancel, job)
        if (wake := self._wakes.get(job.id)) is not None:
            wake.set()
        else:
            self.start(job)  # ends it if no other process has it

    async def take_over(self, *, keep_s: float | None) -> None:
        """Until cancelled, starts jobs that have no process, and deletes those that ended `keep_s` ago."""
        while True:
            try:
                for job in await asyncio.to_thread(lambda: list(self._store.unfinished())):
                    self.start(job)
                if keep_s is not None:
                    await asyncio.to_thread(self._store.delete_finished, before=time.time() - keep_s)
            except (OSError, RuntimeError, ValueError) as error:
                logger.error("looking for jobs failed: %s", type(error).__name__)
            await asyncio.sleep(SCAN_S)

    async def close(self) -> None:
        """Stops all jobs here; another process, or the next one, continues them."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _forget(self, job: Job, done: asyncio.Task[None]) -> None:
        del self._tasks[job.id], self._wakes[job.id]
        if not done.cancelled() and (error := done.exception()) is not None:
            logger.error("%s stopped: %s; it is tried again", job.id, type(error).__name__)

    async def _run(self, job: Job) -> None:
        async with self._slots:
            this, loop = asyncio.current_task(), asyncio.get_running_loop()
            assert this is not None

            def on_lost() -> None:
                loop.call_soon_threadsafe(this.cancel)

            lease = hold_lease(self._store.folder(job), job.id, on_lost=on_lost)
            try:
                await asyncio.to_thread(lease.__enter__)
            except LeaseHeldError:
                return
            try:
                await self._work(job)
            finally:
                await asyncio.shield(asyncio.to_thread(lease.__exit__, None, None, None))

    async def _work(self, job: Job) -> None:
        state = await asyncio.to_thread(self._store.state, job)
        if not state.is_final:
            state.status, state.stage = "running", "waiting"
            await asyncio.to_thread(self._store.write_state, job, state)
            answering = asyncio.create_task(self._answer_all(job, state))
            try:
                while not answering.done() and not await asyncio.to_thread(self._store.is_cancelled, job):
                    await asyncio.to_thread(self._store.write_state, job, state)
                    await self._pause(job, answering)
                if not answering.done():
                    state.end("cancelled")
                    answering.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await answering
            finally:
                answering.cancel()
        await asyncio.to_thread(self._store.write_state, job, state)

    async def _pause(self, job: Job, answering: asyncio.Task[None]) -> None:
        """Waits for the end, a cancellation, or POLL_S."""
        wish = asyncio.create_task(self._wakes[job.id].wait())
        try:
            await asyncio.wait({wish, answering}, timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            wish.cancel()

    async def _answer_all(self, job: Job, state: JobState) -> None:
        def note(progress: FeatureProgress) -> None:
            state.stage = progress.stage
            state.frames_done, state.frames_total = progress.frames_done, progress.frames_total

        try:
            while len(state.answers) < len(job.questions):
                state.answers.append(await self._answer_one(job, len(state.answers), note))
            state.end("completed")
        except TransientError as error:
            state.end("failed", error.error)

    async def _answer_one(self, job: Job, number: int, note: Callable[[FeatureProgress], None]) -> dict[str, Any]:
        wait_s, give_up = 0.5, time.monotonic() + RETRY_S
        while True:
            try:
                return await self._answer(job, number, note)
            except FinalError:
                raise
            except TransientError:
                if time.monotonic() + wait_s > give_up:
                    raise
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, MAX_WAIT_S)
