"""A thread that runs an InferenceEngine for callers on an event loop."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from timeviper_model.inference.engine import InferenceEngine
from timeviper_model.inference.requests import EngineStats, Event, Failed, Request, RequestId, Token

logger = logging.getLogger(__name__)
T = TypeVar("T")


class EngineThread:
    """Steps the engine while it has work."""

    def __init__(self, engine: InferenceEngine) -> None:
        self._engine = engine
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._listeners: dict[RequestId, Callable[[Event], None]] = {}
        self._has_news = False
        """Whether features have come since the last step began."""
        self.error: str | None = None
        """The engine's failure; None while it runs."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def submit(self, requests: Sequence[Request]) -> tuple[list[RequestId], asyncio.Queue[Event]]:
        """Submits all requests or none; returns their ids and a queue of their events.

        Raises:
            QueueFull, ValueError: as InferenceEngine.submit.
            RuntimeError: when the engine has failed.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def deliver(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        def submit_all() -> list[RequestId]:
            ids: list[RequestId] = []
            try:
                for request in requests:
                    ids.append(self._engine.submit(request))
            except Exception:  # all or none: raised again below
                for request_id in ids:
                    self._engine.cancel(request_id)
                raise
            self._listeners.update(dict.fromkeys(ids, deliver))
            return ids

        command = asyncio.wrap_future(self._call(submit_all))
        try:
            return await asyncio.shield(command), events
        except asyncio.CancelledError:  # the caller has gone before the command ran
            command.add_done_callback(lambda done: self.cancel(done.result()) if not done.exception() else None)
            raise

    def cancel(self, request_ids: Sequence[RequestId]) -> None:
        """Cancels requests before the next step."""

        def cancel_all() -> None:
            for request_id in request_ids:
                self._listeners.pop(request_id, None)
                self._engine.cancel(request_id)

        self._commands.put(cancel_all)

    def wake(self) -> None:
        """Lets an engine that waits for features look for them. Callable from any thread."""

        def note() -> None:
            self._has_news = True

        self._commands.put(note)

    async def stats(self) -> EngineStats:
        """Reads the statistics between two steps."""
        return await asyncio.wrap_future(self._call(self._engine.stats))

    def stop(self) -> None:
        """Ends the thread after the current step."""
        self._commands.put(None)
        self._thread.join(timeout=10.0)

    def _call(self, function: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            if self.error is not None:
                future.set_exception(RuntimeError(self.error))
                return
            try:
                future.set_result(function())
            except Exception as error:  # noqa: BLE001 - belongs to the caller; the thread must go on
                future.set_exception(error)

        self._commands.put(run)
        return future

    def _run(self) -> None:
        while True:
            try:
                command = self._commands.get(block=self._is_idle())
            except queue.Empty:
                self._step()
                continue
            if command is None:
                return
            command()

    def _is_idle(self) -> bool:
        if self.error is not None or not self._engine.has_work:
            return True
        return self._engine.is_stalled and not self._has_news

    def _step(self) -> None:
        self._has_news = False
        try:
            events = self._engine.step()
        except Exception as error:  # reported to every listener; the replica ends
            logger.exception("the engine's step failed; this replica takes no more requests")
            self.error = f"the engine has failed: {type(error).__name__}"
            events = [Failed(request_id=request_id, error=self.error) for request_id in self._listeners]
        for event in events:
            deliver = self._listeners.get(event.request_id)
            if deliver is None:
                continue
            if not isinstance(event, Token):
                del self._listeners[event.request_id]
            deliver(event)
