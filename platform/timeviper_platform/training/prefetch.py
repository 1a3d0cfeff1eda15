"""A background thread that runs ahead of its consumer by a bounded number of bytes, whatever the items are."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Iterates `source` in a thread; at most `max_bytes` wait, and always at least one item.

    An exception of the source comes out of the consumer's `next()`. Close it to end the thread early.

    Args:
        source: what to run ahead of.
        num_bytes: size of an item.
        max_bytes: how much may wait.
    """

    def __init__(self, source: Iterator[T], *, num_bytes: Callable[[T], int], max_bytes: int) -> None:
        self._source = source
        self._num_bytes = num_bytes
        self._max_bytes = max_bytes
        self._waiting: deque[tuple[T, int]] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._finished = False
        self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._finished)
            if self._waiting:
                item, size = self._waiting.popleft()
                self._bytes -= size
                self._changed.notify_all()
                return item
            if self._error is not None:
                raise self._error
            raise StopIteration

    def close(self) -> None:
        """Ends the thread and forgets what waits."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            for item in self._source:
                size = self._num_bytes(item)
                with self._changed:
                    self._changed.wait_for(
                        lambda size=size: (  # type: ignore[misc]  # a default binds the loop's value
                            self._closed or not self._waiting or self._bytes + size <= self._max_bytes
                        )
                    )
                    if self._closed:
                        return
                    self._waiting.append((item, size))
                    self._bytes += size
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, which raises it
            self._error = error
        finally:
            with self._changed:
                self._finished = True
                self._changed.notify_all()
