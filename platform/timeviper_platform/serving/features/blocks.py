"""Features of media that are still being decoded, block by block. Imports neither torch nor Ray.

A feature service writes to a board; engine services read from it. Streams that have ended stay readable, since a
request may wait in a queue before its engine reads.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from timeviper_platform.serving.messages import FeatureReference, FeatureStream, Refusal

MAX_ENDED = 256
"""Ended streams per board."""
POLL_S = 10.0
"""Seconds after which a reader that received nothing reads again."""
UNKNOWN_S = 2.0
"""Seconds for which a stream may be read before its first block arrives."""

End = FeatureReference | Refusal


class LostStreamError(RuntimeError):
    """The board does not have the stream, or no longer has it."""


@dataclass(slots=True)
class _Stream:
    blocks: dict[int, Any] = field(default_factory=dict)
    """References to arrays by their number, which may arrive out of order."""
    end: End | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class BlockBoard:
    """Streams by id, on one event loop."""

    def __init__(self) -> None:
        self._streams: dict[str, _Stream] = {}
        self._unknown: dict[str, _Stream] = {}
        """Streams read before their first block."""

    async def append(self, stream_id: str, number: int, block: list[Any]) -> None:
        """Adds one reference, in a list, since Ray would send its array otherwise."""
        stream = self._streams[stream_id] = self._found(stream_id)
        stream.blocks[number] = block[0]
        stream.wake()

    async def end(self, stream_id: str, end: End) -> None:
        """Ends a stream with all of its features, or with the reason why there are none."""
        stream = self._found(stream_id)
        self._streams.pop(stream_id, None)
        stream.end = end
        stream.blocks.clear()
        self._streams[stream_id] = stream  # last, because the oldest ended streams are dropped
        stream.wake()
        ended = [other for other, found in self._streams.items() if found.end is not None]
        for other in ended[:-MAX_ENDED]:
            del self._streams[other]

    def _found(self, stream_id: str) -> _Stream:
        return self._streams.get(stream_id) or self._unknown.pop(stream_id, None) or _Stream()

    async def forget(self, stream_id: str) -> None:
        self._streams.pop(stream_id, None)

    async def read(self, stream_id: str, number: int) -> list[Any] | End | None:
        """Waits for references from `number` on, or the end. Returns [] when nothing has arrived for `POLL_S`, and None
        for a stream that stays unknown.
        """
        stream = self._streams.get(stream_id)
        if stream is None:  # calls may arrive out of order
            stream = self._unknown.setdefault(stream_id, _Stream())
            try:
                await asyncio.wait_for(stream.changed.wait(), UNKNOWN_S)
            except TimeoutError:
                self._unknown.pop(stream_id, None)
                return None
        elif stream.end is None and number not in stream.blocks:
            try:
                await asyncio.wait_for(stream.changed.wait(), POLL_S)
            except TimeoutError:
                return []
        if stream.end is not None:
            return stream.end
        found = list[Any]()
        while number + len(found) in stream.blocks:
            found.append(stream.blocks[number + len(found)])
        return found


class BlockWriter(Protocol):
    """A board's methods for its feature service, which does not wait for them."""

    def append(self, stream_id: str, number: int, ref: Any) -> None: ...

    def end(self, stream_id: str, end: End) -> None: ...

    def forget(self, stream_id: str) -> None: ...

    def address(self) -> Any:
        """Returns the object that readers call."""


async def read_blocks(
    reference: FeatureReference,
    *,
    fetch: Callable[[Any], Awaitable[np.ndarray]],
    next_blocks: Callable[[FeatureStream, int], Awaitable[list[Any] | End | None]],
) -> AsyncGenerator[np.ndarray | Refusal]:
    """Yields arrays (frames, tokens, dim) of a reference in order; a Refusal is last.

    Args:
        fetch: returns the array of a reference.
        next_blocks: calls `BlockBoard.read` for a stream and a number.

    Raises:
        LostStreamError: when the stream is unknown.
    """
    num_blocks = num_frames = 0
    while (stream := reference.stream) is not None:
        found = await next_blocks(stream, num_blocks)
        if found is None:
            raise LostStreamError(f"the features {reference.key} are no longer being computed")
        if isinstance(found, Refusal):
            yield replace(found, param=stream.param)
            return
        if isinstance(found, FeatureReference):
            reference = found
            break
        for ref in found:
            array = await fetch(ref)
            num_blocks, num_frames = num_blocks + 1, num_frames + len(array)
            yield array
    if num_frames < reference.num_frames:
        yield (await fetch(reference.ref))[num_frames:]
