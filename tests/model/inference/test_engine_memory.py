"""engine: each request pays for its own length, waits for space, and running out of memory ends the longest alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from reference.engine_requests import TOKENIZER, answers, ask, engine_of, ids_of, run, vision
from reference.simulated_cuda import MEMORY_BYTES, simulated_cuda
from reference.tiny_serving import prompt, random_model
from timeviper_model.config import PRESETS
from timeviper_model.inference.engine import InferenceEngine
from timeviper_model.inference.memory import request_memory, serving_bytes
from timeviper_model.inference.prefill import Prefill
from timeviper_model.inference.requests import EngineConfig, Event, Failed, Request
from timeviper_model.layers.cache import HybridCache
from timeviper_model.timeviper import TimeViper


@pytest.fixture(scope="module")
def model() -> TimeViper:
    return random_model()


def bytes_of(model: TimeViper, request: Request) -> int:
    num_vision = request.prompt.num_vision_tokens
    num_text = len(request.prompt) - num_vision
    memory = request_memory(
        model.config, num_text, num_vision, request.sampling.max_new_tokens, dtype=model.lm_head.weight.dtype
    )
    cache = model.new_cache(1, device="cpu", dtype=model.lm_head.weight.dtype)
    return cache.room_bytes(memory.tokens) + memory.working_bytes


def test_one_long_prompt_beside_short_ones_takes_little_more_than_is_in_use(model: TimeViper) -> None:
    engine = engine_of(model, num_slots=32, max_prompt_tokens=10_000)
    requests = [ask(num_vision=6000, max_new_tokens=20), *(ask(num_vision=n, max_new_tokens=20) for n in range(31))]
    for request in requests:
        engine.submit(request)
    engine.step()
    stats = engine.stats()
    assert stats.active_slots == 32
    in_use = sum(bytes_of(model, request) for request in requests)
    assert stats.reserved_kv_bytes <= stats.kv_bytes <= 1.2 * in_use


def test_requests_wait_in_order_for_space_and_answers_stay_the_same(model: TimeViper) -> None:
    requests = [ask(num_vision=n, max_new_tokens=6 + n % 3) for n in (400, 30, 800, 31, 32, 500)]
    expected, _, _ = answers(model, requests, num_slots=6)
    limit = 2_200_000  # the third takes nearly all of it
    limits = {"num_slots": 6, "kv_cache_bytes": limit, "max_prompt_tokens": 900, "max_new_tokens": 8}
    engine = engine_of(model, **limits)
    ids = [engine.submit(request) for request in requests]
    tokens: dict[int, list[int]] = {request_id: [] for request_id in ids}
    begun: list[int] = []
    while engine.has_work:
        for event in engine.step():
            if event.request_id not in begun:
                begun.append(event.request_id)
            tokens[event.request_id] += ids_of([event])
        assert engine.stats().kv_bytes <= limit
    assert [tokens[request_id] for request_id in ids] == [ids_of(answer) for answer in expected]
    assert begun.index(ids[2]) < begun.index(ids[3])  # shorter ones do not overtake


def test_a_prefix_hit_needs_no_second_copy_of_what_waits(model: TimeViper) -> None:
    request = ask(num_vision=800, prefix_key="film", max_new_tokens=2)
    limit = int(1.1 * bytes_of(model, request))
    limits = {"kv_cache_bytes": limit, "max_prompt_tokens": 900, "max_new_tokens": 2, "prefix_cache_bytes": 2**30}
    found, cached, _ = answers(model, [request, request], num_slots=2, **limits)
    assert ids_of(found[0]) == ids_of(found[1])
    assert cached[1] > 800


def test_a_request_that_can_never_fit_is_refused(model: TimeViper) -> None:
    """A prompt of text and vision may take more than one of text or vision alone, for which the limits are checked."""
    dtype, num_prompt, num_new = model.lm_head.weight.dtype, 900, 8
    cache = model.new_cache(1, device="cpu", dtype=dtype)

    def needed(num_vision: int) -> int:
        memory = request_memory(model.config, num_prompt - num_vision, num_vision, num_new, dtype=dtype)
        return cache.room_bytes(memory.tokens) + memory.working_bytes

    limit = max(needed(0), needed(num_prompt))
    num_vision = max(range(num_prompt), key=needed)
    assert needed(num_vision) > limit
    engine = engine_of(model, kv_cache_bytes=limit, max_prompt_tokens=num_prompt, max_new_tokens=num_new)
    text = "?" * (num_prompt - len(prompt(TOKENIZER, "", num_vision)))
    with pytest.raises(ValueError, match=r"the prompt of 900 tokens .* takes \d+ bytes .*; use fewer frames"):
        engine.submit(ask(text, num_vision, max_new_tokens=num_new))


def test_limits_that_the_longest_request_exceeds_are_refused_at_the_start(model: TimeViper) -> None:
    with pytest.raises(ValueError, match=r"cannot hold a prompt of max_prompt_tokens = 900 with an answer of"):
        engine_of(model, kv_cache_bytes=100_000, max_prompt_tokens=900, max_new_tokens=8)


def test_caches_beyond_the_devices_memory_are_refused_at_the_start() -> None:
    with simulated_cuda():
        model = random_model().cuda()
        limits = {"max_prompt_tokens": 900, "max_new_tokens": 8}
        engine_of(model, kv_cache_bytes=MEMORY_BYTES, **limits)
        with pytest.raises(ValueError, match="left besides the weights"):
            engine_of(model, kv_cache_bytes=MEMORY_BYTES, prefix_cache_bytes=1, **limits)


def test_the_memory_of_a_full_engine_is_known_before_it_is_built(model: TimeViper) -> None:
    limits = {"num_slots": 6, "max_prompt_tokens": 600, "max_new_tokens": 8, "prefix_cache_bytes": 4_000_000}
    known = serving_bytes(model.config, EngineConfig(**limits), dtype=torch.float64, device_type="cpu")
    assert known.weights == sum(parameter.nbytes for parameter in model.parameters())
    engine = engine_of(model, **limits)
    assert known.mamba_states == engine.stats().cache_bytes
    for number in range(8):
        engine.submit(ask(num_vision=560, max_new_tokens=8, prefix_key=f"{number}"))
    kv_bytes = prefix_bytes = 0
    while engine.has_work:
        engine.step()
        stats = engine.stats()
        kv_bytes, prefix_bytes = max(kv_bytes, stats.kv_bytes), max(prefix_bytes, stats.prefix_bytes)
    assert kv_bytes <= known.keys_and_values
    assert 0 < prefix_bytes <= known.prefix_cache
    limited = EngineConfig(**limits, kv_cache_bytes=10**6)
    assert serving_bytes(model.config, limited, dtype=torch.float64, device_type="cpu").keys_and_values == 10**6


def test_the_9b_of_the_configuration_fits_80_gb() -> None:
    """Weights, states and caches as docs/serve.md lists them."""
    limits = EngineConfig(
        num_slots=32,
        max_prompt_tokens=163_840,
        max_new_tokens=4096,
        kv_cache_bytes=24 * 2**30,
        prefix_cache_bytes=16 * 2**30,
    )
    known = serving_bytes(PRESETS["9b"], limits, dtype=torch.bfloat16, device_type="cuda")
    rounded = [round(value / 1e9, 1) for value in known]
    assert rounded[:4] == [18.0, 4.6, 25.8, 17.2]
    assert known.total < 80e9
    unlimited = serving_bytes(
        PRESETS["9b"], replace(limits, kv_cache_bytes=0), dtype=torch.bfloat16, device_type="cuda"
    )
    assert 32 * 2.66e9 < unlimited.keys_and_values < 32 * 5e9  # 1.12 and 1.54 GB of a film; a text keeps every token


class OutOfMemoryOnce:
    """Lets a call do its work and then fail, as an allocation late in the pass would."""

    def __init__(self, function: Any, *, call: int) -> None:
        self.function, self.left = function, call

    def __call__(self, *args: Any, **options: Any) -> Any:
        result = self.function(*args, **options)
        self.left -= 1
        if not self.left:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 5}])
def test_running_out_of_memory_while_decoding_ends_the_longest_alone(
    model: TimeViper, monkeypatch: pytest.MonkeyPatch, sampling: dict[str, Any]
) -> None:
    requests = [ask(num_vision=n, max_new_tokens=9, **sampling) for n in (8, 600, 40)]
    expected, _, _ = answers(model, requests, num_slots=3)
    monkeypatch.setattr(TimeViper, "decode_step", broken := OutOfMemoryOnce(TimeViper.decode_step, call=3))
    monkeypatch.setattr(TimeViper, "decode_step", lambda *args: broken(*args))
    engine = engine_of(model, num_slots=3)
    ids = [engine.submit(request) for request in requests]
    events = run(engine)
    failed = events[ids[1]][-1]
    assert isinstance(failed, Failed)
    assert "longest of 3" in failed.error
    assert failed.is_out_of_memory
    for index in (0, 2):
        assert ids_of(events[ids[index]]) == ids_of(expected[index])
    assert (engine.stats().active_slots, engine.stats().reserved_kv_bytes) == (0, 0)


def test_running_out_of_memory_while_reading_ends_the_longest_alone(
    model: TimeViper, monkeypatch: pytest.MonkeyPatch
) -> None:
    long, short = ask(num_vision=600, max_new_tokens=40), ask(num_vision=8, max_new_tokens=5)
    (expected,), _, _ = answers(model, [short])
    engine = engine_of(model, num_slots=2)
    first = engine.submit(long)
    events = engine.step()
    second = engine.submit(short)
    advance, calls = Prefill.advance, []

    def fails_once(reading: Prefill, budget: int | None = None) -> Tensor | None:
        logits = advance(reading, budget)
        if not calls:
            calls.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logits

    monkeypatch.setattr(Prefill, "advance", fails_once)
    rest = run(engine)
    assert isinstance(rest[first][-1], Failed)
    assert ids_of(rest[second]) == ids_of(expected)
    assert events


def test_without_memory_for_its_room_a_request_waits_for_others_to_end(
    model: TimeViper, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [ask(num_vision=8, max_new_tokens=5), ask(num_vision=600, max_new_tokens=4)]
    expected, _, _ = answers(model, requests)
    reserve = HybridCache.reserve

    def limited(cache: HybridCache, slot: int, *args: Any, **options: Any) -> None:
        if any(cache.num_tokens):
            raise torch.OutOfMemoryError("CUDA out of memory")
        reserve(cache, slot, *args, **options)

    engine = engine_of(model, num_slots=2)
    ids = [engine.submit(requests[0])]
    early = engine.step()
    monkeypatch.setattr(HybridCache, "reserve", limited)
    ids.append(engine.submit(requests[1]))
    events: dict[int, list[Event]] = run(engine)
    events[ids[0]] = early + events[ids[0]]
    assert [ids_of(events[request_id]) for request_id in ids] == [ids_of(answer) for answer in expected]


def test_idle_prefixes_make_way_for_the_room_of_a_request(model: TimeViper, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(model, prefix_cache_bytes=2**30)
    run_one = ask(num_vision=40, prefix_key="film", max_new_tokens=2)
    engine.submit(run_one)
    run(engine)
    assert engine.stats().prefix_entries == 1
    reserve = HybridCache.reserve

    def limited(cache: HybridCache, slot: int, *args: Any, **options: Any) -> None:
        if engine.stats().prefix_entries:
            raise torch.OutOfMemoryError("CUDA out of memory")
        reserve(cache, slot, *args, **options)

    monkeypatch.setattr(HybridCache, "reserve", limited)
    request_id = engine.submit(ask(max_new_tokens=3))
    assert len(ids_of(run(engine)[request_id])) == 3
    assert engine.stats().prefix_evictions == 1


def test_features_from_a_function_are_taken_again_when_the_prompt_is_read_again(
    model: TimeViper, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def blocks() -> Iterable[Tensor]:
        calls.append(1)
        return vision(24).split(10)

    requests = [ask(num_vision=24, vision_features=blocks, max_new_tokens=6), ask(num_vision=300, max_new_tokens=6)]
    expected, _, _ = answers(model, requests)
    monkeypatch.setattr(TimeViper, "decode_step", broken := OutOfMemoryOnce(TimeViper.decode_step, call=2))
    monkeypatch.setattr(TimeViper, "decode_step", lambda *args: broken(*args))
    engine = InferenceEngine(model, tokenizer=TOKENIZER)
    ids = [engine.submit(request) for request in requests]
    assert ids_of(run(engine)[ids[0]]) == ids_of(expected[0])
    assert len(calls) == 3


def test_running_slots_stay_neighbours_from_the_first(model: TimeViper, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scattered slots cost a copy of their states in every step."""
    seen: list[list[int]] = []
    step = TimeViper.decode_step

    def recorded(model: TimeViper, ids: Tensor, cache: HybridCache, slots: Tensor) -> Tensor:
        seen.append(slots.tolist())
        return step(model, ids, cache, slots)

    requests = [ask(num_vision=5 * n, max_new_tokens=2 + 7 * n % 11) for n in range(10)]
    expected = [answers(model, [request])[0][0] for request in requests]
    monkeypatch.setattr(TimeViper, "decode_step", recorded)
    found, _, _ = answers(model, requests, num_slots=4, max_prefill_tokens=24)
    assert [ids_of(answer) for answer in found] == [ids_of(answer) for answer in expected]
    assert len({len(slots) for slots in seen}) >= 3
    assert all(slots == list(range(len(slots))) for slots in seen)
