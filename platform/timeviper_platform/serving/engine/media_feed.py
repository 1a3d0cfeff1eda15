"""Vision rows of one request, passed to the engine as they arrive. Does not import Ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from timeviper_platform.serving.messages import FeatureReference, Refusal

logger = logging.getLogger(__name__)

ReadFeatures = Callable[[FeatureReference], AsyncGenerator[np.ndarray | Refusal]]
"""Yields (frames, tokens, dim) int16 arrays of a reference in order; a Refusal is last. Raises RuntimeError when they
are lost."""


class MediaFeed:
    """Reads media in order, on the running event loop, for requests that another thread runs."""

    def __init__(self, media: Sequence[FeatureReference], read: ReadFeatures, on_rows: Callable[[], None]) -> None:
        """Begins to read. `on_rows` is called when rows have arrived."""
        self.media = tuple(media)
        self._read, self._on_rows = read, on_rows
        self._blocks: list[Tensor] = []
        self._is_complete = False
        self._error: str | None = None
        self.outcome: asyncio.Future[Refusal | MediaFeed | None] = asyncio.get_running_loop().create_future()
        """None once all rows have arrived; a Refusal if a medium cannot be read; if fewer frames decoded than `media`
        count, a complete feed of those frames, for another prompt."""
        self._task = asyncio.create_task(self._run(self.media))

    @property
    def is_streamed(self) -> bool:
        return any(reference.stream is not None for reference in self.media)

    def close(self) -> None:
        self._task.cancel()

    def blocks(self) -> Iterator[Tensor]:
        """Yields (rows, dim) bfloat16 rows; an empty block while none has arrived.

        Raises:
            RuntimeError: when a medium cannot be read.
        """
        number = 0
        while True:
            is_complete, error = self._is_complete, self._error  # before the blocks, which another thread adds
            if number < len(self._blocks):
                yield self._blocks[number]
                number += 1
            elif is_complete:
                return
            elif error is not None:
                raise RuntimeError(error)
            else:
                yield torch.empty(0)

    async def _run(self, media: Sequence[FeatureReference]) -> None:
        blocks, counts = list[Tensor](), list[int]()
        expected = [medium.num_frames for medium in media]
        for number, reference in enumerate(media):
            counts.append(0)
            try:
                async with aclosing(self._read(reference)) as arrays:
                    async for array in arrays:
                        if isinstance(array, Refusal):
                            self._fail(array)
                            return
                        counts[-1] += len(array)
                        blocks.append(_rows(array))
                        if counts[:number] == expected[:number]:  # else the prompt has them elsewhere
                            self._blocks.append(blocks[-1])
                            self._on_rows()
            except RuntimeError as error:
                logger.warning("features are lost: %s", type(error).__name__)
                message = "the video's features were lost, try again"
                self._fail(Refusal(status=503, message=message, code="features_lost"))
                return
            except Exception:  # the request would wait for ever
                logger.exception("features cannot be read")
                self._fail(Refusal(status=500, message="the video's features cannot be read", code="internal_error"))
                return
        if counts == expected:
            self._is_complete = True
            self.outcome.set_result(None)
            self._on_rows()
        else:
            found = [replace(medium, num_frames=count) for medium, count in zip(media, counts, strict=True)]
            self.outcome.set_result(self._recounted(found, blocks))

    def _recounted(self, media: Sequence[FeatureReference], blocks: list[Tensor]) -> MediaFeed:
        other = MediaFeed((), self._read, self._on_rows)
        other.media, other._blocks = tuple(media), blocks
        return other

    def _fail(self, refusal: Refusal) -> None:
        self.outcome.set_result(refusal)
        self._error = refusal.message
        self._on_rows()


def _rows(array: np.ndarray) -> Tensor:
    # copied: the object store returns read-only arrays, which PyTorch does not support
    return torch.from_numpy(array.copy()).view(torch.bfloat16).flatten(0, 1)
