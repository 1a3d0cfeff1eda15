"""Requests to a small random engine, and their events."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from reference.tiny_serving import CONFIG_WITH_TRANSV, byte_tokenizer, prompt
from timeviper_model.batching.batch import Sample
from timeviper_model.inference.answer import SamplingParams
from timeviper_model.inference.engine import InferenceEngine
from timeviper_model.inference.requests import EngineConfig, Event, Failed, Finished, Request, RequestId, Token
from timeviper_model.timeviper import TimeViper

TOKENIZER = byte_tokenizer()
DIM = CONFIG_WITH_TRANSV.vision.hidden_size


def vision(num_tokens: int) -> torch.Tensor:
    return torch.randn(num_tokens, DIM, generator=torch.Generator().manual_seed(num_tokens), dtype=torch.float64)


def ask(question: str = "What?", num_vision: int = 8, **values: Any) -> Request:
    values.setdefault("vision_features", vision(num_vision))
    values.setdefault("prompt", prompt(TOKENIZER, question, num_vision))
    options = {name: values.pop(name) for name in SamplingParams.__dataclass_fields__ if name in values}
    return Request(sampling=replace(values.pop("sampling", SamplingParams()), **options), **values)


def first_id(token_id: int) -> Sample:
    sample = prompt(TOKENIZER, "What?", 8)
    return replace(sample, input_ids=[token_id, *sample.input_ids[1:]])


def vision_rows(*rows: int) -> Sample:
    sample = prompt(TOKENIZER, "What?", 8)
    following = iter(rows)
    return replace(sample, vision_index=[row if row < 0 else next(following) for row in sample.vision_index])


def engine_of(model: TimeViper, **config: int) -> InferenceEngine:
    return InferenceEngine(model, EngineConfig(**config), tokenizer=TOKENIZER)


def run(engine: InferenceEngine) -> dict[RequestId, list[Event]]:
    events: dict[RequestId, list[Event]] = {}
    while engine.has_work:
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
    return events


def ids_of(events: Iterable[Event]) -> list[int]:
    return [event.id for event in events if isinstance(event, Token)]


def text_of(events: Iterable[Event]) -> str:
    return "".join(event.text for event in events if not isinstance(event, Failed))


def answers(model: TimeViper, requests: list[Request], **config: int) -> tuple[list[list[Token]], list[int], Any]:
    """Tokens and cached tokens of each request, all submitted together, and the engine's statistics."""
    engine = engine_of(model, **config)
    ids = [engine.submit(request) for request in requests]
    events = run(engine)
    tokens = [[event for event in events[i] if isinstance(event, Token)] for i in ids]
    cached = [event.usage.cached_tokens for i in ids for event in events[i] if isinstance(event, Finished)]
    return tokens, cached, engine.stats()
