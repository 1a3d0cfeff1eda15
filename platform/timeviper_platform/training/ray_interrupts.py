"""Interrupts under Ray Train: node removals and stop requests."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from ray import train
from ray.experimental import internal_kv

from timeviper_platform.common import storage
from timeviper_platform.training.distributed import from_rank_0
from timeviper_platform.training.interrupts import Interrupt, StoppedError

logger = logging.getLogger(__name__)

LAST_SAVE_S = 120.0
"""Seconds before a node's removal at which to save again."""
SIGNAL_POLL_S = 0.2
PULSE_S = 1.0
NO_PULSE_S = 5.0
"""Seconds without a pulse after which no worker is running."""
PULSE_NAMESPACE = b"timeviper-pulse"


class Pulse:
    """Signs of life of a run's workers, in the cluster's key-value store, which has no public API."""

    def __init__(self, run: str) -> None:
        self._key = run.encode()

    def start(self) -> None:
        threading.Thread(target=self._send, name="pulse", daemon=True).start()

    def _send(self) -> None:
        number = 0
        while True:
            with contextlib.suppress(Exception):  # while the cluster's store restarts; a later pulse arrives
                internal_kv._internal_kv_put(self._key, f"{os.getpid()} {number}".encode(), namespace=PULSE_NAMESPACE)
            number += 1
            time.sleep(PULSE_S)

    def last(self) -> bytes | None:
        value: bytes | None = internal_kv._internal_kv_get(self._key, namespace=PULSE_NAMESPACE)
        return value


class StopFile:
    """Stop request from the driver to the workers: a file on shared storage."""

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def exists(self) -> bool:
        """Returns False while the storage does not answer."""
        try:
            return storage.exists(self._uri)
        except storage.StorageUnavailableError as error:  # checked again in seconds
            logger.warning("cannot check for a stop request: %s", error)
            return False

    @contextlib.contextmanager
    def created_on_sigterm(self, last_pulse: Callable[[], object] | None = None) -> Iterator[None]:
        """Creates the file on SIGTERM inside the block.

        Args:
            last_pulse: the workers' last sign of life.

        Raises:
            StoppedError: after SIGTERM, if no worker shows a sign of life, so that none can stop.
        """
        if threading.current_thread() is not threading.main_thread():  # signals arrive in the main thread only
            yield
            return
        main = threading.get_ident()
        received, no_worker, ended = threading.Event(), threading.Event(), threading.Event()

        def note(number: int, frame: FrameType | None) -> None:
            received.set()
            if no_worker.is_set() and not ended.is_set():
                raise KeyboardInterrupt  # ray.get passes on no other exception

        def watch() -> None:
            while not received.wait(SIGNAL_POLL_S):
                if ended.is_set():
                    return
            logger.warning("SIGTERM: the workers save and stop")
            storage.write_bytes(self._uri, b"")
            while last_pulse is not None and not ended.is_set():
                before = last_pulse()
                if not ended.wait(NO_PULSE_S) and last_pulse() == before:
                    no_worker.set()
                    signal.pthread_kill(main, signal.SIGTERM)  # wakes the main thread
                    return

        before = signal.signal(signal.SIGTERM, note)
        thread = threading.Thread(target=watch, name="sigterm", daemon=True)
        thread.start()
        try:
            yield
        except KeyboardInterrupt:
            if not no_worker.is_set():
                raise
            raise StoppedError("stopped on request while no worker was running; start it again to continue") from None
        finally:
            ended.set()
            thread.join()
            signal.signal(signal.SIGTERM, before)


class PreemptionWatch:
    """Requests SAVE when Ray announces a node's removal and again shortly before it, and STOP on request.

    Ray's query is a barrier, so rank 0 schedules the next one for all ranks.

    Args:
        interval_s: seconds between queries; removals are announced 30 s ahead or more.
    """

    def __init__(
        self,
        stop_requested: Callable[[], bool] = lambda: False,
        *,
        query: Callable[[], train.PreemptionInfo | None] = train.get_preemption_info,
        clock: Callable[[], float] = time.time,
        interval_s: float = 5.0,
    ) -> None:
        self._stop_requested = stop_requested
        self._query = query
        self._clock = clock
        self._interval_s = interval_s
        self._steps_per_query = 1
        self._num_steps = 0
        self._queried_at = clock()
        self._announced: set[str] = set()
        self._announced_late: set[str] = set()

    def __call__(self) -> Interrupt:
        self._num_steps += 1
        if self._num_steps < self._steps_per_query:
            return Interrupt.NONE
        info = self._query()
        self._steps_per_query, now, stop_requested = from_rank_0(
            lambda: (self._steps_until_next(), self._clock(), self._stop_requested())
        )
        self._num_steps, self._queried_at = 0, self._clock()
        if stop_requested:
            return Interrupt.STOP
        return Interrupt.SAVE if info is not None and self._is_news(info, now) else Interrupt.NONE

    def _is_news(self, info: train.PreemptionInfo, now: float) -> bool:
        left_s = None if info.deadline_ms is None else info.deadline_ms / 1000 - now
        nodes = set(info.preempted_node_ids)
        is_news = not nodes <= self._announced
        self._announced |= nodes
        if left_s is not None and left_s <= LAST_SAVE_S:
            is_news = is_news or not nodes <= self._announced_late
            self._announced_late |= nodes
        if is_news:
            left = "an unknown time" if left_s is None else f"{left_s:.0f} s"
            logger.warning(
                "ranks %s lose their nodes %s in %s: saving now", info.preempted_ranks, info.preempted_node_ids, left
            )
        return is_news

    def _steps_until_next(self) -> int:
        seconds_per_step = (self._clock() - self._queried_at) / self._num_steps
        return max(1, int(self._interval_s / max(seconds_per_step, 1e-3)))
