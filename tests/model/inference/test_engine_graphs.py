"""engine: greedy answers on a CUDA device come from decode graphs and stay the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from reference.simulated_cuda import simulated_cuda
from reference.small_models import make_features, make_model, make_sample
from timeviper_model.inference import graph_choice
from timeviper_model.inference.answer import SamplingParams
from timeviper_model.inference.decode_graph import DecodeGraph
from timeviper_model.inference.engine import InferenceEngine
from timeviper_model.inference.requests import EngineConfig, Request, Token
from timeviper_model.timeviper import TimeViper

LAYOUTS = ["ss" + "v" * 12 + "iii", "svvvvii", "iii"]
MIN_GRAPH_STEPS, STEPS_BEFORE_GRAPH = 6, 2
NEW_TOKENS = 2 * MIN_GRAPH_STEPS + STEPS_BEFORE_GRAPH


class CountedGraph(DecodeGraph):
    """A DecodeGraph whose instances and steps are counted."""

    sizes: list[int]
    num_replays: int

    def __init__(self, model: TimeViper, cache: Any, slots: Any, ids: Any, *, max_steps: int) -> None:
        super().__init__(model, cache, slots, ids, max_steps=max_steps)
        type(self).sizes.append(len(slots))

    def step(self) -> torch.Tensor:
        type(self).num_replays += 1
        return super().step()


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[CountedGraph]:
    CountedGraph.sizes, CountedGraph.num_replays = [], 0
    monkeypatch.setattr(graph_choice, "DecodeGraph", CountedGraph)
    return CountedGraph


def request(layout: str, max_new_tokens: int = NEW_TOKENS, **sampling: Any) -> Request:
    sample = make_sample(layout, seed=len(layout))
    return Request(
        prompt=sample,
        vision_features=make_features(sample),
        sampling=SamplingParams(max_new_tokens=max_new_tokens, **sampling),
    )


def new_engine(model: TimeViper, **config: int) -> InferenceEngine:
    return InferenceEngine(
        model,
        EngineConfig(max_new_tokens=NEW_TOKENS, **config),
        min_graph_steps=MIN_GRAPH_STEPS,
        steps_before_graph=STEPS_BEFORE_GRAPH,
    )


def answers(model: TimeViper, requests: list[Request], **config: int) -> list[list[int]]:
    """Token ids of each answer; a request enters at a time, one step after the one before."""
    engine = new_engine(model, num_slots=len(requests), **config)
    ids, tokens = [], {}
    for each in requests:
        ids.append(engine.submit(each))
        tokens[ids[-1]] = []
        events = engine.step()
        for event in events:
            if isinstance(event, Token):
                tokens[event.request_id].append(event.id)
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, Token):
                tokens[event.request_id].append(event.id)
    return [tokens[request_id] for request_id in ids]


def endless_model() -> TimeViper:
    """Never chooses the end token."""
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[model.config.text.eos_token_id] = 0
        model.backbone.embeddings.weight.mul_(4.0)
    return model


def test_greedy_answers_are_the_same_with_graphs_and_without(graphs: type[CountedGraph]) -> None:
    requests = [request(layout, NEW_TOKENS - 2 * index) for index, layout in enumerate(LAYOUTS)]
    expected = answers(endless_model(), requests)
    assert not graphs.sizes  # a CPU has none
    with simulated_cuda():
        model = endless_model().cuda()
        assert answers(model, requests) == expected
        assert graphs.sizes[0] == 3
        assert graphs.num_replays > MIN_GRAPH_STEPS
        assert answers(model, requests, max_graph_steps=MIN_GRAPH_STEPS) == expected
        num_graphs = len(graphs.sizes)
        assert answers(model, requests, max_graph_steps=0) == expected
        assert len(graphs.sizes) == num_graphs


def test_a_cancelled_request_ends_the_graph_of_its_neighbours(graphs: type[CountedGraph]) -> None:
    expected = answers(endless_model(), [request(LAYOUTS[0])])
    with simulated_cuda():
        engine = new_engine(endless_model().cuda(), num_slots=2)
        first, second = engine.submit(request(LAYOUTS[0])), engine.submit(request(LAYOUTS[1]))
        events = [event for _ in range(STEPS_BEFORE_GRAPH + 4) for event in engine.step()]
        assert graphs.sizes == [2]
        assert engine.cancel(second)
        while engine.has_work:
            events += engine.step()
    tokens = [event.id for event in events if isinstance(event, Token) and event.request_id == first]
    assert tokens == expected[0]


@pytest.mark.parametrize("options", [{"temperature": 1.0, "seed": 3}, {"num_logprobs": 2}])
def test_other_answers_are_decoded_without_a_graph(graphs: type[CountedGraph], options: dict[str, Any]) -> None:
    requests = [request(LAYOUTS[0]), request(LAYOUTS[1], **options)]
    expected = answers(endless_model(), requests)
    with simulated_cuda():
        assert answers(endless_model().cuda(), requests) == expected
    assert not graphs.sizes


def test_without_memory_for_a_graph_decoding_goes_on(
    graphs: type[CountedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("capture")

    requests = [request(LAYOUTS[0])]
    expected = answers(endless_model(), requests)
    monkeypatch.setattr(graphs, "__init__", out_of_memory)
    with simulated_cuda():
        assert answers(endless_model().cuda(), requests) == expected


def test_a_decode_step_waits_for_the_device_once() -> None:
    requests = [request(LAYOUTS[0]), request(LAYOUTS[1], temperature=1.0, seed=3)]
    with simulated_cuda() as device:
        engine = new_engine(endless_model().cuda(), num_slots=2)
        for each in requests:
            engine.submit(each)
        engine.step()
        device.syncs.clear()
        engine.step()
        assert sum(device.syncs.values()) == 1


def test_graphs_go_on_while_another_prompt_is_read(graphs: type[CountedGraph]) -> None:
    expected = answers(endless_model(), [request(LAYOUTS[0])])
    with simulated_cuda():
        engine = new_engine(endless_model().cuda(), num_slots=2, max_prefill_tokens=16)
        first = engine.submit(request(LAYOUTS[0]))
        events = [event for _ in range(STEPS_BEFORE_GRAPH + 4) for event in engine.step()]
        engine.submit(request("ss" + "v" * 200 + "iii", max_new_tokens=2))
        before = graphs.num_replays
        events += [event for _ in range(4) for event in engine.step()]
        assert graphs.num_replays == before + 4
        assert len(graphs.sizes) == 1
        while engine.has_work:
            events += engine.step()
    assert [event.id for event in events if isinstance(event, Token) and event.request_id == first] == expected[0]
