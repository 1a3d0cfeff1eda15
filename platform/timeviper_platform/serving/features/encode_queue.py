"""Encodes frames of several media together. Does not import Ray.

The encoder pads every batch, so that a single picture takes as long as a full batch.
"""

from __future__ import annotations

import asyncio
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from timeviper_platform.data.encode.frame_encoder import FrameEncoder

MAX_BATCHES = 2
"""Batches per call of the encoder: long videos let others in between."""


class _Waiting(NamedTuple):
    frames: np.ndarray
    features: asyncio.Future[Tensor]


class EncodeQueue:
    """One encoder thread. Frames that arrive during a call are encoded together in the next one."""

    def __init__(self, encoder: FrameEncoder) -> None:
        self.encoder = encoder
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode")
        self._waiting: deque[_Waiting] = deque()
        self._task: asyncio.Task[None] | None = None

    async def encode(self, frames: np.ndarray) -> Tensor:
        """As FrameEncoder.encode, for (F, S, S, 3) uint8 frames."""
        features: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(frames, features))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        return await features

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while taken := self._take():
            frames = np.concatenate([one.frames for one in taken]) if len(taken) > 1 else taken[0].frames
            try:
                encoded = await loop.run_in_executor(self._thread, self.encoder.encode, frames)
            except Exception as error:  # noqa: BLE001 - belongs to the callers
                for one in taken:
                    if not one.features.done():
                        one.features.set_exception(error)
                continue
            for one, features in zip(taken, torch.split(encoded, [len(one.frames) for one in taken]), strict=True):
                if not one.features.done():  # cancelled
                    one.features.set_result(features)

    def _take(self) -> list[_Waiting]:
        """Takes those that fit into a call, in order; at least one."""
        taken: list[_Waiting] = []
        left = MAX_BATCHES * self.encoder.config.encode_batch_frames
        while self._waiting and (not taken or len(self._waiting[0].frames) <= left):
            one = self._waiting.popleft()
            if not one.features.done():
                taken.append(one)
                left -= len(one.frames)
        return taken
