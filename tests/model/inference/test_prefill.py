"""prefill: chunks change no answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reference.slow_timeviper import slow_logits
from reference.small_models import SMALL, SMALL_QWEN, first_tokens, make_features, make_model, make_sample, pack
from timeviper_model.batching.batch import Sample
from timeviper_model.config import TransVSite
from timeviper_model.inference.prefill import Prefill, PrefixEntry, last_mixer, prefill, prefix_length
from timeviper_model.layers.cache import MIN_CAPACITY, HybridCache
from timeviper_model.timeviper import TimeViper


def uniform(layer: int, keep: float) -> TransVSite:
    return TransVSite(layer=layer, select="uniform", keep=keep)


def by_attention(layer: int, keep: float) -> TransVSite:
    return TransVSite(layer=layer, select="attention", keep=keep)


def by_importance(layer: int, keep: float) -> TransVSite:
    return TransVSite(layer=layer, select="importance", keep=keep, transfer="none")


EVS = TransVSite(layer=0, select="evs", keep=0.6, transfer="none")

PLANS: dict[str, tuple[TransVSite, ...]] = {
    "none": (),
    "uniform": (uniform(1, 0.5),),
    "attention first": (by_attention(2, 0.4),),
    "two uniform, then attention": (uniform(1, 0.7), uniform(3, 0.5), by_attention(4, 0.2)),
    "attention twice, uniform between": (by_attention(2, 0.6), uniform(3, 0.4), by_attention(4, 0.25)),
    "importance at Mamba, then at attention": (by_importance(3, 0.5), by_importance(4, 0.2)),
    "EVS": (EVS,),
    "EVS, then uniform and importance": (EVS, uniform(1, 0.4), by_importance(3, 0.3)),
    "all dropped": (uniform(1, 0.5), by_attention(4, 0.0)),
    "all kept by attention": (by_attention(2, 1.0), uniform(3, 0.5)),
}

QWEN_PLANS: dict[str, tuple[TransVSite, ...]] = {
    "none, RoPE": (),
    "uniform, then attention, RoPE": (uniform(1, 0.5), by_attention(2, 0.2)),
    "EVS, then importance, RoPE": (EVS, by_importance(1, 0.3)),
    "attention twice, RoPE": (by_attention(0, 0.7), by_attention(2, 0.3)),
}
CONFIGS = {name: replace(SMALL, transv=plan) for name, plan in PLANS.items()} | {
    name: replace(SMALL_QWEN, transv=plan) for name, plan in QWEN_PLANS.items()
}


def with_plan(name: str, **changes: Any) -> TimeViper:
    config = CONFIGS[name]
    sites = (site if site.select == "evs" else replace(site, **changes) for site in config.transv)
    return make_model(replace(config, transv=tuple(sites)))


def start(
    model: TimeViper, prompt: Sample, features: Callable[[], Iterable[Tensor]], cache: HybridCache, **options: Any
) -> Prefill:
    return Prefill(
        model, torch.tensor(prompt.input_ids), torch.tensor(prompt.token_kind), features, cache, 0, **options
    )


@torch.no_grad()
def finish(reading: Prefill) -> Tensor:
    while (logits := reading.advance()) is None:
        pass
    return logits


@settings(max_examples=30)
@example(plan="two uniform, then attention", changes={}, layout="ss" + "v" * 20 + "iii", max_tokens=7, rows=3)
@example(plan="attention first", changes={}, layout="svviivvvvirriivvi", max_tokens=4, rows=5)
@given(
    plan=st.sampled_from(sorted(CONFIGS)),
    changes=st.sampled_from([{}, {"transfer": "none"}, {"transfer_from": "kept"}]),
    layout=st.one_of(
        st.text(alphabet="svvvir", max_size=24),
        st.builds(
            lambda s, v, i: "s" * s + "v" * v + "i" * i, st.integers(0, 3), st.integers(0, 25), st.integers(0, 5)
        ),
    ).map(lambda text: text + "i"),
    max_tokens=st.integers(1, 30),
    rows=st.integers(1, 12),
)
def test_a_prompt_in_chunks_equals_the_formulas_written_out(
    plan: str, changes: dict[str, Any], layout: str, max_tokens: int, rows: int
) -> None:
    model = with_plan(plan, **changes)
    sample = make_sample(layout + "rr", seed=len(layout))
    features = make_features(sample)
    expected, _ = slow_logits(model, sample, features)
    cache = model.new_cache(1, device="cpu", dtype=torch.float64)
    prompt = first_tokens(sample, len(layout))
    found = [finish(start(model, prompt, lambda: features.split(rows), cache, max_chunk_tokens=max_tokens))]
    for token in sample.input_ids[len(layout) :]:
        found.append(model.decode_step(torch.tensor([token]), cache, torch.tensor([0]))[0])
    torch.testing.assert_close(torch.stack(found), expected[-3:].detach(), rtol=1e-8, atol=1e-8)
    assert cache.num_tokens == [len(sample)]


@pytest.mark.parametrize("max_tokens", [5, 16, 1000])
def test_prefill_takes_the_same_chunk_size(max_tokens: int) -> None:
    model = make_model()
    sample = make_sample("ss" + "v" * 40 + "iiii")
    cache = model.new_cache(2, device="cpu", dtype=torch.float64)
    expected, _ = slow_logits(model, sample, make_features(sample, seed=sum(sample.input_ids)))
    found = prefill(model, pack([sample]), cache, 1, max_chunk_tokens=max_tokens)
    torch.testing.assert_close(found, expected[-1].detach())
    with pytest.raises(ValueError, match="chunks of 0"):
        prefill(model, pack([sample]), cache, 1, max_chunk_tokens=0)


def test_logits_are_computed_only_for_the_last_token() -> None:
    model = make_model()
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    prefill(
        model, pack([make_sample("ss" + "v" * 40 + "iiii")]), model.new_cache(1, device="cpu", dtype=torch.float64), 0
    )
    assert rows == [1]


@pytest.mark.parametrize("plan", ["two uniform, then attention", "uniform, then attention, RoPE"])
def test_behind_the_last_mixer_only_a_chunks_last_token_is_computed(plan: str) -> None:
    model = with_plan(plan)
    last = last_mixer(model.config)
    assert last is not None
    rows: dict[str, list[int]] = {}
    for name, module in model.backbone.block(last).named_modules():
        if name.endswith("_proj"):
            seen = rows.setdefault(name.rpartition(".")[2], [])
            module.register_forward_hook(lambda module, args, output, seen=seen: seen.append(len(args[0])))
    prompt = pack([make_sample("ss" + "v" * 40 + "iiii")])
    cache = model.new_cache(1, device="cpu", dtype=torch.float64)
    prefill(model, prompt, cache, 0, max_chunk_tokens=10)
    num_chunks = len(rows["v_proj"])
    assert sum(rows["v_proj"]) == 2 + 8 + 4
    assert rows["o_proj"] == [1] * num_chunks
    assert rows["q_proj"][-num_chunks:] == [1] * num_chunks  # the site's own query is before


def test_a_site_behind_the_last_mixer_needs_every_token() -> None:
    assert last_mixer(replace(SMALL, transv=())) == 4
    assert SMALL.text.block_types[5:] == ("mlp",)
    assert last_mixer(replace(SMALL, transv=(uniform(5, 0.5),))) is None


class _LargestTensor(TorchDispatchMode):
    """The most elements that one operation has given."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() >= tensor.nbytes:
                self.numel = max(self.numel, tensor.numel())
        return output


@pytest.mark.parametrize("plan", ["none", "two uniform, then attention"])
def test_every_tensor_grows_at_most_linearly_with_the_prompt(plan: str) -> None:
    num_vision, chunk = 3000, 128
    model = with_plan(plan)
    prompt = make_sample("s" + "v" * num_vision + "iii")
    cache = model.new_cache(1, device="cpu", dtype=torch.float64)
    blocks = (torch.randn(100, 12, dtype=torch.float64) for _ in range(num_vision // 100))
    with _LargestTensor() as largest:
        finish(start(model, prompt, lambda: blocks, cache, max_chunk_tokens=chunk))
    kv_elements = 2 * 8 * num_vision * 1.125  # heads x width, and the room's rounding
    assert largest.numel <= max(kv_elements, 24 * num_vision)
    assert largest.numel < chunk * num_vision / 2  # and no mask or score matrix of a whole chunk


def test_feature_blocks_are_taken_as_chunks_need_them_and_may_come_late() -> None:
    model = make_model()
    prompt = make_sample("ss" + "v" * 40 + "iiii")
    features = make_features(prompt)
    given: list[int] = []

    def blocks() -> Iterator[Tensor]:
        for number, block in enumerate(features.split(8)):
            if number == 2:
                yield features[:0]  # not yet
            given.append(len(block))
            yield block

    cache = model.new_cache(1, device="cpu", dtype=torch.float64)
    reading = start(model, prompt, blocks, cache, max_chunk_tokens=10)
    assert given == []
    trace = []
    with torch.no_grad():
        while (logits := reading.advance()) is None:
            trace.append((sum(given), reading.is_waiting))
    # chunks end at tokens 10, 20, 30, ...: 8, 18, 28, ... vision rows; the second needs a block that comes late
    assert trace[:4] == [(8, False), (16, True), (24, False), (32, False)]
    torch.testing.assert_close(logits, finish(start(model, prompt, lambda: [features], cache)))


@pytest.mark.parametrize(
    ("num_rows", "message"), [(7, "7 rows for 8"), (0, "0 rows for 8"), (9, "more rows than the 8")]
)
def test_features_that_do_not_match_the_prompt_are_an_error(num_rows: int, message: str) -> None:
    model = make_model()
    cache = model.new_cache(1, device="cpu", dtype=torch.float64)
    features = torch.zeros(num_rows, 12, dtype=torch.float64)
    blocks = [block for block in features.split(4) if len(block)]
    with pytest.raises(ValueError, match=message):
        finish(start(model, make_sample("svvvvvvvvii"), lambda: blocks, cache, max_chunk_tokens=3))


def test_a_prompt_that_loses_every_token_is_an_error() -> None:
    model = make_model(replace(SMALL, transv=(uniform(1, 0.0),)))
    with pytest.raises(ValueError, match="every token"):
        prefill(model, pack([make_sample("vvv")]), model.new_cache(1, device="cpu", dtype=torch.float64), 0)


@pytest.mark.parametrize(
    ("layout", "length"),
    [("ssvvvii", 5), ("vvi", 2), ("ssii", 0), ("svivi", 0), ("sivvi", 0), ("svvv", 0), ("svvirii", 3)],
)
def test_a_prefix_ends_after_the_last_vision_token(layout: str, length: int) -> None:
    assert prefix_length(torch.tensor(make_sample(layout).token_kind)) == length


@pytest.mark.parametrize("plan", sorted(CONFIGS))
@pytest.mark.parametrize("changes", [{}, {"transfer": "none"}, {"transfer_from": "kept"}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_question_after_a_cached_prefix_gives_identical_logits(
    plan: str, changes: dict[str, Any], dtype: torch.dtype
) -> None:
    model = with_plan(plan, **changes).to(dtype)
    first, second = make_sample("ss" + "v" * 30 + "iiii", seed=1), make_sample("ss" + "v" * 30 + "iiiiirriii", seed=2)
    second = replace(second, input_ids=first.input_ids[:32] + second.input_ids[32:])
    features = make_features(first, dtype=dtype)
    cache = model.new_cache(1, device="cpu", dtype=dtype)
    entries: list[PrefixEntry] = []
    cut = {"max_chunk_tokens": 7, "boundary": 32}
    finish(start(model, first, lambda: [features], cache, on_prefix=entries.append, **cut))
    (entry,) = entries
    expected = finish(start(model, second, lambda: [features], cache, **cut))

    def never() -> Iterable[Tensor]:
        raise AssertionError("a kept prefix needs no features")

    for _ in range(2):  # the entry is not used up
        assert torch.equal(finish(start(model, second, never, cache, prefix=entry, **cut)), expected)


@torch.no_grad()
@pytest.mark.parametrize("plan", ["none", "two uniform, then attention", "attention twice, uniform between"])
def test_keys_and_values_of_prompt_and_answer_are_never_copied(plan: str) -> None:
    model = with_plan(plan)
    prompt = make_sample("ss" + "v" * 600 + "iii")
    cache = model.new_cache(1, device="cpu", dtype=torch.float64)
    reading = start(
        model, prompt, lambda: [make_features(prompt)], cache, max_chunk_tokens=50, max_new_tokens=MIN_CAPACITY
    )
    rooms = {layer: kv.rooms[0] for layer, kv in cache.attention.items()}
    logits = finish(reading)
    for _ in range(MIN_CAPACITY):
        logits = model.decode_step(logits.argmax()[None], cache, torch.tensor([0]))[0]
    for layer, kv in cache.attention.items():
        room = kv.rooms[0]
        assert room is not None
        assert room is rooms[layer], f"layer {layer} has been copied"
        assert room.bank.capacity == kv.capacity(kv.lengths[0]), f"layer {layer} has more room than was planned"
