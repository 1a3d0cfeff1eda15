"""engine_thread: errors of one caller leave the thread running."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from reference.tiny_serving import CONFIG, byte_tokenizer, prompt, random_model
from timeviper_model.inference.answer import SamplingParams
from timeviper_model.inference.engine import InferenceEngine
from timeviper_model.inference.requests import EngineConfig, Finished, Request
from timeviper_platform.serving.engine.engine_thread import EngineThread

TOKENIZER = byte_tokenizer()
REQUEST = Request(
    prompt=prompt(TOKENIZER, "What?"),
    vision_features=torch.zeros(0, CONFIG.vision.hidden_size),
    sampling=SamplingParams(max_new_tokens=2),
)


def test_a_failing_command_raises_in_its_caller_and_the_thread_goes_on() -> None:
    engine = InferenceEngine(random_model(CONFIG), EngineConfig(num_slots=2), tokenizer=TOKENIZER)
    thread = EngineThread(engine)
    words = replace(REQUEST.prompt, input_ids=[*REQUEST.prompt.input_ids[:-1], None])  # type: ignore[list-item]  # wrong

    async def ask() -> list[object]:
        with pytest.raises(TypeError):
            await thread.submit([REQUEST, replace(REQUEST, prompt=words)])
        assert (await thread.stats()).queued_requests == 0  # the first one was cancelled
        ids, events = await thread.submit([REQUEST])
        assert len(ids) == 1
        found: list[object] = []
        while len(found) < 3:
            found += await events.get()
        return found

    try:
        assert isinstance(asyncio.run(asyncio.wait_for(ask(), timeout=60))[-1], Finished)
    finally:
        thread.stop()
    assert thread.error is None


def test_only_the_first_token_and_the_end_wake_the_event_loop_at_once() -> None:
    """Before, each token of each stream did, and took the interpreter from the engine."""
    engine = InferenceEngine(random_model(CONFIG), EngineConfig(num_slots=2), tokenizer=TOKENIZER)
    thread = EngineThread(engine, delivery_s=lambda: 1000.0)
    request = replace(REQUEST, sampling=SamplingParams(max_new_tokens=20))
    deliveries = 0

    async def ask() -> list[object]:
        nonlocal deliveries
        loop = asyncio.get_running_loop()
        wake = loop.call_soon_threadsafe

        def counted(callback: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
            nonlocal deliveries
            deliveries += callback.__name__ == "_put_all"
            return wake(callback, *arguments, **options)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        _, events = await thread.submit([request])
        found: list[object] = [*await events.get()]
        while not isinstance(found[-1], Finished):
            found += await events.get()
        return found

    try:
        found = asyncio.run(asyncio.wait_for(ask(), timeout=60))
    finally:
        thread.stop()
    assert len(found) > 3
    assert deliveries == 2
