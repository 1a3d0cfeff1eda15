"""An engine service with a tiny model, its requests and answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reference.tiny_serving import CONFIG_WITH_TRANSV, byte_tokenizer
from timeviper_model.inference.answer import SamplingParams
from timeviper_model.inference.requests import EngineConfig
from timeviper_platform.serving.engine.service import EngineService, EngineServiceConfig
from timeviper_platform.serving.messages import (
    AnswerDelta,
    ChatTurn,
    FeatureReference,
    FeatureStream,
    GenerateRequest,
    Refusal,
)

TOKENIZER = byte_tokenizer()
DIM = CONFIG_WITH_TRANSV.vision.hidden_size
Scenario = Callable[[EngineService], Awaitable[Any]]


def bits(num_frames: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(num_frames)
    features = torch.randn(num_frames, 4, DIM, generator=generator).to(torch.bfloat16)
    return features.view(torch.int16).numpy()


def video(num_frames: int = 6) -> FeatureReference:
    return FeatureReference(
        key="k",
        ref=bits(num_frames),
        num_frames=num_frames,
        num_tokens_per_frame=4,
        modality="video",
        duration_seconds=float(num_frames),
    )


def request(text: str = "What?", *, media: tuple[FeatureReference, ...] = (), **values: Any) -> GenerateRequest:
    turns = (ChatTurn(role="user", text=text, media=media),)
    options = {name: values.pop(name) for name in SamplingParams.__dataclass_fields__ if name in values}
    sampling = SamplingParams(**{"max_new_tokens": 8, **options})
    return GenerateRequest(**{"tenant": "a", "turns": turns, "sampling": sampling, **values})


async def read(reference: FeatureReference) -> AsyncGenerator[np.ndarray | Refusal]:
    """Yields a whole array, or the items of an iterator that stands for a stream."""
    if reference.stream is not None:
        async for item in reference.stream.board():
            yield item
        return
    if reference.ref is None:
        raise RuntimeError("its owner has died")
    yield reference.ref


def run(weights: Path | str, scenario: Scenario, **config: Any) -> Any:
    async def main() -> Any:
        service = EngineService(str(weights), EngineServiceConfig(**config), read)
        try:
            return await asyncio.wait_for(scenario(service), 60)
        finally:
            service.stop()

    return asyncio.run(main())


async def collect(service: EngineService, submitted: GenerateRequest) -> list[AnswerDelta | Refusal]:
    return [item async for item in service.generate(submitted)]


def text_of(items: list[AnswerDelta | Refusal], index: int = 0) -> str:
    return "".join(item.text for item in items if isinstance(item, AnswerDelta) and item.index == index)


def refusal_of(items: list[AnswerDelta | Refusal]) -> Refusal:
    (item,) = items
    assert isinstance(item, Refusal)
    return item


def streamed(items: Callable[[], AsyncGenerator[Any]], num_frames: int = 6) -> FeatureReference:
    stream = FeatureStream(board=items, stream_id="s", param="messages.0.content.0")
    return replace(video(num_frames), ref=None, stream=stream)


TWO_FRAMES = EngineConfig(num_slots=2, max_prefill_tokens=8, prefix_cache_bytes=2**24)
"""Chunks of two frames."""


def usages(items: list[AnswerDelta | Refusal]) -> list[tuple[int, int]]:
    """(prompt tokens, cached tokens) of every answer."""
    found = [item.usage for item in items if isinstance(item, AnswerDelta) and item.usage is not None]
    return [(usage.prompt_tokens, usage.cached_tokens) for usage in found]
