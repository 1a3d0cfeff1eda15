"""A thread that runs an InferenceEngine for callers on an event loop."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from timeviper_model.inference.engine import InferenceEngine
from timeviper_model.inference.requests import EngineStats, Event, Failed, Request, RequestId, Token

logger = logging.getLogger(__name__)
T = TypeVar("T")

Batch = list[tuple["asyncio.Queue[list[Event]]", list[Event]]]


class EngineThread:
    """Steps the engine while it has work."""

    def __init__(self, engine: InferenceEngine, *, delivery_s: Callable[[], float] = lambda: 0.0) -> None:
        """Delivers the tokens of all callers together, `delivery_s()` seconds apart, because a delivery interrupts a
        step. Starts and ends of answers do not wait.
        """
        self._engine, self._delivery_s = engine, delivery_s
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._listeners: dict[RequestId, _Listener] = {}
        self._waiting: dict[_Listener, list[Event]] = {}
        self._delivered = 0.0
        self._has_news = False
        """Whether features have arrived since the last step began."""
        self.error: str | None = None
        """The engine's failure; None while it runs."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def submit(self, requests: Sequence[Request]) -> tuple[list[RequestId], asyncio.Queue[list[Event]]]:
        """Submits all requests or none; returns their ids and a queue of their events, as delivered.

        Raises:
            QueueFull, ValueError: as InferenceEngine.submit.
            RuntimeError: when the engine has failed.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[list[Event]] = asyncio.Queue()

        def submit_all() -> list[RequestId]:
            ids: list[RequestId] = []
            try:
                for request in requests:
                    ids.append(self._engine.submit(request))
            except Exception:  # all or none: raised again below
                for request_id in ids:
                    self._engine.cancel(request_id)
                raise
            self._listeners.update(dict.fromkeys(ids, _Listener(loop, events, set(ids))))
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
        """Makes an engine that waits for features check for them. Callable from any thread."""

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
            except Exception as error:  # noqa: BLE001 - raised in the caller; the thread must continue
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
            logger.exception("the engine's step failed; this replica accepts no more requests")
            self.error = f"the engine has failed: {type(error).__name__}"
            events = [Failed(request_id=request_id, error=self.error) for request_id in self._listeners]
        urgent: dict[_Listener, None] = {}
        for event in events:
            listener = self._listeners.get(event.request_id)
            if listener is None:
                continue
            if not isinstance(event, Token):
                del self._listeners[event.request_id]
            if event.request_id in listener.without_token or not isinstance(event, Token):
                listener.without_token.discard(event.request_id)
                urgent[listener] = None
            self._waiting.setdefault(listener, []).append(event)
        if self._is_idle() or time.monotonic() - self._delivered >= self._delivery_s():
            self._delivered = time.monotonic()
            self._deliver(list(self._waiting))
        else:
            self._deliver(urgent)

    def _deliver(self, listeners: Iterable[_Listener]) -> None:
        """Wakes each event loop once."""
        batches: dict[asyncio.AbstractEventLoop, Batch] = {}
        for listener in listeners:
            batches.setdefault(listener.loop, []).append((listener.events, self._waiting.pop(listener)))
        for loop, batch in batches.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_put_all, batch)


class _Listener:
    """Receiver of the events of requests submitted together."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, events: asyncio.Queue[list[Event]], without_token: set[RequestId]
    ) -> None:
        self.loop, self.events = loop, events
        self.without_token = without_token


def _put_all(batch: Batch) -> None:
    for queue_, events in batch:
        queue_.put_nowait(events)
