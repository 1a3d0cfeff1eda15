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
from timeviper_model.layers.cache import CAPACITY_STEP, KEPT_BYTES, MIN_CAPACITY, AttentionCache, HybridCache
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
def test_an_unreserved_slot_grows_alone_and_gives_its_memory_back(kept_bytes: int) -> None:
    model = make_model()
    cache = HybridCache(model.config.text, 2, device="cpu", dtype=torch.float64, kept_bytes=kept_bytes)
    empty = cache.num_bytes
    prefill(model, pack([make_sample("i" * 5)]), cache, 1)
    other = cache.attention[2].rooms[1]
    prefill(model, pack([make_sample("i" * (MIN_CAPACITY - 2))]), cache, 0, max_new_tokens=2)
    filled = cache.num_bytes
    for _ in range(MIN_CAPACITY + 2):
        model.decode_step(torch.tensor([1]), cache, torch.tensor([0]))
    assert cache.attention[2].rooms[1] is other
    assert empty < filled
    assert cache.attention[2].lengths == [2 * MIN_CAPACITY, 5]
    for slot in (0, 1):
        cache.reset(slot)
    assert (cache.num_bytes == empty) == (not kept_bytes)
    assert cache.num_tokens == [0, 0]


def test_each_slot_pays_for_its_own_length() -> None:
    """One tensor for all slots would take 32 times the longest: 30 times the bytes in use."""
    cache = AttentionCache(32, 1, 8, torch.device("cpu"), torch.float32)
    lengths = [65_000, *range(100, 131)]
    for slot, length in enumerate(lengths):
        cache.reserve(slot, length)
    used = sum(lengths) * cache.bytes_per_token
    assert cache.num_bytes <= 1.2 * used
    longest = cache.rooms[0]
    for slot in range(1, 32):
        cache.reset(slot)
        cache.reserve(slot, 150)
    assert cache.rooms[0] is longest  # never copied for the sake of others


def test_rooms_of_a_bank_are_read_together_and_hold_at_most_an_eighth_more() -> None:
    cache = AttentionCache(32, 1, 8, torch.device("cpu"), torch.float32)
    for num_tokens in (1, 63, 64, 65, 1000, 1023, 1025, 4097, 65_000, 130_081, 600_000):
        capacity = cache.capacity(num_tokens)
        assert num_tokens <= capacity <= max(num_tokens + CAPACITY_STEP - 1, 1.125 * num_tokens)
    for slot in range(32):
        cache.reserve(slot, 600)
    assert len({id(room.bank) for room in cache.rooms if room is not None}) <= 6
    assert cache.num_bytes == 32 * cache.room_bytes(600)


def test_a_budget_is_kept_by_freeing_idle_banks_and_by_smaller_banks() -> None:
    cache = make_cache(4)
    limit = 3 * cache.room_bytes({2: 64, 4: 64})
    tokens = {2: 64, 4: 64}
    for slot in (0, 1, 2):
        assert cache.has_space(tokens, limit)
        cache.reserve(slot, tokens, max_bytes=limit)
        assert cache.kv_bytes <= limit
    assert not cache.has_space(tokens, limit)
    cache.reset(1)
    assert cache.has_space(tokens, limit)
    assert not cache.has_space({2: 128, 4: 128}, limit)
    cache.reset(2)
    assert cache.has_space({2: 128, 4: 128}, limit)  # the two idle rooms are freed
    cache.reserve(1, {2: 128, 4: 128}, max_bytes=limit)
    assert cache.kv_bytes == limit == cache.slot_bytes(0) + cache.slot_bytes(1)


def test_swapped_slots_go_on_as_each_other() -> None:
    model = make_model()
    cache, expected = (model.new_cache(3, device="cpu", dtype=torch.float64) for _ in range(2))
    for slot, layout in enumerate(["svvvvii", "iii", "svvi"]):
        for each in (cache, expected):
            prefill(model, pack([make_sample(layout, seed=slot)]), each, slot)
    cache.swap(0, 2)
    ids = torch.tensor([3, 4, 5])
    swapped = model.decode_step(ids[[2, 1, 0]], cache, torch.arange(3))
    torch.testing.assert_close(swapped[[2, 1, 0]], model.decode_step(ids, expected, torch.arange(3)))
    assert cache.num_tokens == expected.num_tokens[::-1]


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


def test_states_of_a_bf16_cache_and_of_its_snapshots_are_fp32() -> None:
    model = make_model(dtype=torch.bfloat16)
    cache = model.new_cache(1, device="cpu", dtype=torch.bfloat16)
    prefill(model, pack([make_sample("svvvvii")], dtype=torch.bfloat16), cache, 0)
    model.decode_step(torch.tensor([1]), cache, torch.tensor([0]))
    saved = cache.save(0, SMALL.text.num_hidden_layers)
    for states in (cache.mamba, saved.mamba):
        for state in states.values():
            assert state.ssm_BHPN.dtype == torch.float32
            assert not torch.equal(state.ssm_BHPN, state.ssm_BHPN.bfloat16().float())  # no rounding on the way
            assert state.window_BKD.dtype == torch.bfloat16  # inputs of the convolution, as the model gives them


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
        attention.content(0)[1].fill_(torch.nan)
    for each in (cache, clean):
        prefill(model, short, each, 1)
    if loads:
        cache.reset(0)
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
