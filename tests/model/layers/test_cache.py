from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reference.small_models import SMALL, make_model, make_sample, pack
from timeviper_model.batching.segments import Segments
from timeviper_model.inference.prefill import prefill
from timeviper_model.layers.cache import KEPT_BYTES, MIN_CAPACITY, HybridCache
from timeviper_model.timeviper import TimeViper


def make_cache(num_slots: int = 3) -> HybridCache:
    return HybridCache(SMALL.text, num_slots, device="cpu", dtype=torch.float32)


def test_empty_cache_holds_states_of_fixed_size_and_no_keys() -> None:
    per_mamba_layer = 3 * (24 + 2 * 2 * 5) + 4 * 6 * 5  # convolution window and state
    assert make_cache(3).num_bytes == 3 * 2 * per_mamba_layer * 4
    assert set(make_cache().mamba) == {0, 3}
    assert set(make_cache().attention) == {2, 4}


def test_layers_behind_a_drop_keep_fewer_tokens() -> None:
    model = make_model()
    cache = model.new_cache(2, device="cpu", dtype=torch.float64)
    prefill(model, pack([make_sample("ss" + "v" * 40 + "iii")]), cache, 1)
    assert {layer: attention.lengths for layer, attention in cache.attention.items()} == {2: [0, 25], 4: [0, 15]}
    assert cache.num_tokens == [0, 45]


@pytest.mark.parametrize("kept_bytes", [0, KEPT_BYTES])
def test_capacity_grows_and_is_freed_when_all_slots_are_empty(
    kept_bytes: int,
) -> None:
    model = make_model()
    cache = HybridCache(model.config.text, 2, device="cpu", dtype=torch.float64, kept_bytes=kept_bytes)
    empty = cache.num_bytes
    prefill(model, pack([make_sample("i" * (MIN_CAPACITY - 2))]), cache, 0)
    filled = cache.num_bytes
    for _ in range(MIN_CAPACITY + 2):  # prefill leaves room for MIN_CAPACITY
        model.decode_step(torch.tensor([1]), cache, torch.tensor([0]))
    assert empty < filled < cache.num_bytes
    assert cache.attention[2].lengths == [2 * MIN_CAPACITY, 0]
    grown = cache.num_bytes
    cache.reset(0)
    assert cache.num_bytes == (grown if kept_bytes else empty)
    assert cache.num_tokens == [0, 0]


def test_a_reused_slot_has_no_old_state() -> None:
    model = make_model()
    first, second = pack([make_sample("svvvvvvii", seed=1)]), pack([make_sample("ii", seed=2)])
    used = model.new_cache(1, device="cpu", dtype=torch.float64)
    prefill(model, first, used, 0)
    model.decode_step(torch.tensor([5]), used, torch.tensor([0]))
    fresh = model.new_cache(1, device="cpu", dtype=torch.float64)
    assert torch.equal(prefill(model, second, used, 0), prefill(model, second, fresh, 0))
    step = [model.decode_step(torch.tensor([5]), cache, torch.tensor([0])) for cache in (used, fresh)]
    torch.testing.assert_close(step[0], step[1])


@pytest.mark.parametrize("slots", [[], [1, 1], [2, 0], [-1], [3]])
def test_invalid_slots_are_refused(slots: list[int]) -> None:
    with pytest.raises(ValueError, match="slot"):
        make_cache(3).view(slots)


def test_a_cache_needs_a_slot() -> None:
    with pytest.raises(ValueError, match="num_slots = 0"):
        make_cache(0)


def test_reset_clears_the_states_of_that_slot_alone() -> None:
    model = make_model()
    cache = model.new_cache(2, device="cpu", dtype=torch.float64)
    for slot in (0, 1):
        prefill(model, pack([make_sample("iiii")]), cache, slot)
    cache.reset(0)
    for state in cache.mamba.values():
        assert not state.ssm_BHPN[0].any()
        assert not state.window_BKD[0].any()
        assert state.ssm_BHPN[1].any()
        assert state.window_BKD[1].any()


@pytest.mark.parametrize("loads", [False, True])
def test_nan_in_a_slot_is_not_read_by_the_next_sequence(loads: bool) -> None:
    model = make_model()
    cache, clean = (model.new_cache(2, device="cpu", dtype=torch.float64) for _ in range(2))
    long, short = pack([make_sample("i" * 6)]), pack([make_sample("iii")])
    prefill(model, long, cache, 0)
    for attention in cache.attention.values():
        attention.values[0, :, :6] = torch.nan
    for each in (cache, clean):
        prefill(model, short, each, 1)
    if loads:
        cache.load(0, cache.save(1, SMALL.text.num_hidden_layers))
        cache.num_tokens[0] = 3
    else:
        prefill(model, short, cache, 0)
    prefill(model, short, clean, 0)
    for each in (cache, clean):
        prefill(model, long, each, 1)
    steps = [model.decode_step(torch.tensor([5, 5]), each, torch.tensor([0, 1])) for each in (cache, clean)]
    torch.testing.assert_close(steps[0], steps[1])


def through_blocks(model: TimeViper, hidden_TD: Tensor, cache: HybridCache | None) -> Tensor:
    segments = Segments(torch.zeros(len(hidden_TD), dtype=torch.long), 1)
    for layer in range(model.config.text.num_hidden_layers):
        state = None if cache is None else cache.view([1]).layer(layer)
        hidden_TD = model.backbone.block(layer)(hidden_TD, segments, state)
    return hidden_TD


@settings(max_examples=20)
@given(num_tokens=st.integers(1, 40), cuts=st.sets(st.integers(1, 39), max_size=4), wide=st.booleans())
def test_chunks_that_continue_a_slot_equal_the_whole(num_tokens: int, cuts: set[int], wide: bool) -> None:
    dtype, tolerance = (torch.float64, 1e-11) if wide else (torch.float32, 2e-5)
    model = make_model(dtype=dtype)
    hidden = torch.randn(num_tokens, 24, generator=torch.Generator().manual_seed(num_tokens), dtype=dtype)
    edges = [0, *sorted(cut for cut in cuts if cut < num_tokens), num_tokens]
    cache = model.new_cache(3, device="cpu", dtype=dtype)
    with torch.no_grad():
        whole = through_blocks(model, hidden, None)
        chunks = [through_blocks(model, hidden[start:stop], cache) for start, stop in pairwise(edges)]
    torch.testing.assert_close(torch.cat(chunks), whole, rtol=tolerance, atol=tolerance)
    assert cache.attention[2].lengths == [0, num_tokens, 0]
