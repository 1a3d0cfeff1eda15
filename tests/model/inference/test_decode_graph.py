"""decode_graph: its steps equal decode_step, on the CPU, on a simulated device and on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from reference.simulated_cuda import simulated_cuda
from reference.small_models import SMALL, SMALL_QWEN, make_model, make_sample, pack
from timeviper_model.config import TimeViperConfig
from timeviper_model.inference.decode_graph import DecodeGraph
from timeviper_model.inference.prefill import prefill
from timeviper_model.layers.cache import HybridCache
from timeviper_model.timeviper import TimeViper

PROMPTS = ["ss" + "v" * 12 + "iii", "svvvvii", "iii"]


def filled_cache(model: TimeViper, device: str = "cpu") -> tuple[HybridCache, list[int]]:
    """Three prompts of different lengths in slots 1, 2 and 3, and the token that follows each."""
    cache = model.new_cache(4, device=device, dtype=model.lm_head.weight.dtype)
    samples = [pack([make_sample(kinds, seed=seed)]) for seed, kinds in enumerate(PROMPTS)]
    ids = [
        int(prefill(model, sample.to(torch.device(device), cache_dtype(cache)), cache, slot).argmax())
        for slot, sample in enumerate(samples, start=1)
    ]
    return cache, ids


def cache_dtype(cache: HybridCache) -> torch.dtype:
    return next(iter(cache.attention.values())).dtype


def decoded_by_steps(model: TimeViper, num_steps: int, device: str = "cpu") -> tuple[list[list[int]], HybridCache]:
    cache, first = filled_cache(model, device)
    ids, slots = torch.tensor(first, device=device), torch.tensor([1, 2, 3], device=device)
    answers = []
    for _ in range(num_steps):
        ids = model.decode_step(ids, cache, slots).argmax(-1)
        answers.append(ids.tolist())
    return answers, cache


@pytest.mark.parametrize("config", [SMALL, SMALL_QWEN], ids=["hybrid", "rope"])
def test_steps_equal_decode_step(config: TimeViperConfig) -> None:
    model = make_model(config)
    expected, stepped = decoded_by_steps(model, 6)
    cache, ids = filled_cache(model)
    decoding = DecodeGraph(model, cache, [1, 2, 3], ids, max_steps=6)
    assert [decoding.step().tolist() for _ in range(6)] == expected
    decoding.finish()
    assert cache.num_tokens == stepped.num_tokens
    for layer, attention in cache.attention.items():
        assert attention.lengths == stepped.attention[layer].lengths
    slots = torch.tensor([1, 2, 3])
    after = [model.decode_step(torch.tensor([1, 2, 3]), each, slots) for each in (cache, stepped)]
    torch.testing.assert_close(after[0], after[1])


def test_unwritten_room_is_not_read() -> None:
    model = make_model()
    expected, _ = decoded_by_steps(model, 3)
    cache, ids = filled_cache(model)
    for attention in cache.attention.values():
        for room, length in zip(attention.rooms[1:], attention.lengths[1:], strict=True):
            assert room is not None
            room.bank.values[room.row, :, length:] = torch.nan
    decoding = DecodeGraph(model, cache, [1, 2, 3], ids, max_steps=3)
    assert [decoding.step().tolist() for _ in range(3)] == expected


def test_no_step_beyond_max_steps() -> None:
    model = make_model()
    cache, ids = filled_cache(model)
    decoding = DecodeGraph(model, cache, [1, 2, 3], ids, max_steps=1)
    decoding.step()
    with pytest.raises(RuntimeError, match="max_steps = 1 steps are done"):
        decoding.step()


@pytest.mark.parametrize(("slots", "ids"), [([1, 3], [0, 0]), ([0, 1], [0, 0]), ([1, 2], [0])])
def test_slots_that_are_not_neighbours_or_are_empty_are_an_error(slots: list[int], ids: list[int]) -> None:
    model = make_model()
    cache, _ = filled_cache(model)
    with pytest.raises(ValueError, match="they must be neighbours with prompts"):
        DecodeGraph(model, cache, slots, ids, max_steps=1)


@pytest.mark.parametrize("config", [SMALL, SMALL_QWEN], ids=["hybrid", "rope"])
def test_a_captured_graph_gives_the_same_steps_without_synchronization(config: TimeViperConfig) -> None:
    expected, _ = decoded_by_steps(make_model(config), 6)
    with simulated_cuda() as device:
        model = make_model(config).cuda()
        cache, ids = filled_cache(model, "cuda")
        decoding = DecodeGraph(model, cache, [1, 2, 3], ids, max_steps=6)
        device.syncs.clear()
        steps = [decoding.step().clone() for _ in range(6)]
        assert not device.syncs
        assert [ids.tolist() for ids in steps] == expected


def test_log_probabilities_are_those_of_the_logits() -> None:
    model = make_model()
    cache, ids = filled_cache(model)
    logits = model.decode_step(torch.tensor(ids), filled_cache(model)[0], torch.tensor([1, 2, 3]))
    decoding = DecodeGraph(model, cache, [1, 2, 3], ids, max_steps=1)
    chosen = torch.log_softmax(logits, -1).gather(1, decoding.step()[:, None])[:, 0]
    torch.testing.assert_close(decoding.logprobs_B, chosen.float())
    assert decoding.is_finite_B.all()


def test_a_graph_is_captured_on_the_models_device(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []

    @contextlib.contextmanager
    def on(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    with simulated_cuda() as simulated:
        capture = simulated.capture

        def captured(graph: Any) -> Any:
            assert current == [torch.device("cuda", 0)]
            return capture(graph)

        monkeypatch.setattr(torch.cuda, "device", on)
        monkeypatch.setattr(torch.cuda, "graph", captured)
        model = make_model().cuda()
        cache, ids = filled_cache(model, "cuda")
        DecodeGraph(model, cache, [1, 2, 3], ids, max_steps=1)
    assert not current


@pytest.mark.gpu
@pytest.mark.parametrize("config", [SMALL, SMALL_QWEN], ids=["hybrid", "rope"])
def test_captured_steps_equal_decode_step(config: TimeViperConfig) -> None:
    model = make_model(config, dtype=torch.float32).cuda()
    expected, _ = decoded_by_steps(model, 6, "cuda")
    cache, ids = filled_cache(model, "cuda")
    decoding = DecodeGraph(model, cache, [1, 2, 3], ids, max_steps=6)
    assert [decoding.step().tolist() for _ in range(6)] == expected


def test_slots_in_rooms_of_several_sizes_and_any_order_are_read() -> None:
    model, results = make_model(), []
    for in_graph in (False, True):
        cache = model.new_cache(6, device="cpu", dtype=torch.float64)
        for slot, num_new in ((5, 8), (0, 8), (3, 300), (4, 8), (1, 8), (2, 8)):
            sample = pack([make_sample("s" + "v" * (5 + slot) + "ii", seed=slot)])
            prefill(model, sample, cache, slot, max_new_tokens=num_new)
        later, earlier = (cache.attention[2].rooms[slot] for slot in (1, 4))
        assert later is not None
        assert earlier is not None
        assert later.bank is earlier.bank
        assert (earlier.row, later.row) == (0, 1)
        if in_graph:
            decoding = DecodeGraph(model, cache, range(6), [1, 2, 3, 4, 5, 6], max_steps=3)
            results.append([decoding.step().tolist() for _ in range(3)])
        else:
            ids, steps = torch.tensor([1, 2, 3, 4, 5, 6]), []
            for _ in range(3):
                ids = model.decode_step(ids, cache, torch.arange(6)).argmax(-1)
                steps.append(ids.tolist())
            results.append(steps)
    assert results[0] == results[1]


def test_steps_after_a_graph_that_ended_early_do_not_read_its_warm_up() -> None:
    """The warm-up of a slot with NaN writes NaN after its tokens, which later owners of the room must not read."""
    with simulated_cuda():
        model = make_model().cuda()
        cache, ids = filled_cache(model, "cuda")
        for state in cache.mamba.values():
            state.ssm_BHPN[1] = torch.nan
        decoding = DecodeGraph(model, cache, [1, 2, 3], ids, max_steps=6)
        decoding.step()
        decoding.finish()
        for attention in cache.attention.values():
            room, length = attention.rooms[1], attention.lengths[1]
            assert room is not None
            assert bool(room.bank.values[room.row, :, length:].isfinite().all())
