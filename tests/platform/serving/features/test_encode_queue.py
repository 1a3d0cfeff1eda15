"""encode_queue: frames of many media share the encoder's batches, bit for bit as alone."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest
import torch

from reference.tiny_serving import IMAGE_SIZE, make_serving_folders
from timeviper_platform.data.encode.frame_encoder import FrameEncoder
from timeviper_platform.serving.features.encode_queue import EncodeQueue


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> FrameEncoder:
    return FrameEncoder(make_serving_folders(tmp_path_factory.mktemp("encoder")).encoder)  # batches of 4


def frames_of(number: int, count: int = 1) -> np.ndarray:
    generator = np.random.default_rng(number)
    return generator.integers(0, 256, (count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)


def bits(features: torch.Tensor) -> np.ndarray:
    return features.view(torch.int16).numpy()


def test_what_arrives_during_a_call_is_encoded_together(encoder: FrameEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, each picture filled its batch with padding: 16 took the encoder 16 batches of four."""
    media = [frames_of(number, 7 if number == 9 else 1) for number in range(16)]
    encode, calls, go = encoder.encode, list[int](), threading.Event()

    def counted(frames: Any) -> torch.Tensor:
        calls.append(len(frames))
        go.wait(30)
        return encode(frames)

    monkeypatch.setattr(encoder, "encode", counted)

    async def scenario() -> list[torch.Tensor]:
        queue = EncodeQueue(encoder)
        tasks = [asyncio.ensure_future(queue.encode(frames)) for frames in media]
        while not calls:
            await asyncio.sleep(0.01)
        go.set()
        return list(await asyncio.gather(*tasks))

    found = asyncio.run(scenario())
    assert calls == [8, 8, 6]  # in order: eight pictures, one and the seven frames, six
    for frames, features in zip(media, found, strict=True):
        np.testing.assert_array_equal(bits(features), bits(encode(frames)))


def test_an_error_belongs_to_those_that_were_encoded_and_the_queue_goes_on(
    encoder: FrameEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, calls = encoder.encode, list[int]()

    def failing(frames: Any) -> torch.Tensor:
        calls.append(len(frames))
        if len(calls) == 1:
            raise RuntimeError("device")
        return encode(frames)

    monkeypatch.setattr(encoder, "encode", failing)

    async def scenario() -> list[Any]:
        queue = EncodeQueue(encoder)
        gone = asyncio.ensure_future(queue.encode(frames_of(1)))
        await asyncio.sleep(0)
        gone.cancel()  # before its turn
        first = await asyncio.gather(queue.encode(frames_of(2)), queue.encode(frames_of(3)), return_exceptions=True)
        return [*first, await queue.encode(frames_of(4))]

    first, second, third = asyncio.run(asyncio.wait_for(scenario(), 30))
    assert isinstance(first, RuntimeError)
    assert second is first
    assert len(calls) == 2
    np.testing.assert_array_equal(bits(third), bits(encode(frames_of(4))))
