"""engine_thread: errors of one caller leave the thread running."""

from __future__ import annotations

import asyncio
from dataclasses import replace

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
        return [await events.get() for _ in range(3)]

    try:
        assert isinstance(asyncio.run(asyncio.wait_for(ask(), timeout=60))[-1], Finished)
    finally:
        thread.stop()
    assert thread.error is None
