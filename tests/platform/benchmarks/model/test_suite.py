"""The model suite at toy sizes: both sides of a ratio do the same work, and each group returns its rows."""

from __future__ import annotations

import math

import pytest
import torch

from timeviper_model.analysis.transformer_twin import transformer_twin
from timeviper_model.config import TimeViperConfig, TransVSite, parse_transv_plan
from timeviper_model.inference.prefill import Prefill
from timeviper_platform.benchmarks.measure import Row, peak_resident_bytes, reset_peak, resident_bytes
from timeviper_platform.benchmarks.model import engine, generate, prefill, prefix, scan
from timeviper_platform.benchmarks.model import token_decode as decode
from timeviper_platform.benchmarks.model.models import (
    iter_features,
    make_model,
    narrow_config,
    video_question,
)
from timeviper_platform.benchmarks.model.suite import MODEL_GROUPS, on_one_thread


def check(rows: list[Row], group: str, bars: list[str | None]) -> None:
    assert [row.bar for row in rows] == bars
    assert {row.command for row in rows} == {f"python jobs/benchmark.py model --only {group}"}
    assert len({row.name for row in rows}) == len(rows)
    assert all(math.isfinite(row.value) for row in rows)  # at toy sizes times are noise; exponents may be negative


def test_the_suite_lists_its_groups() -> None:
    assert list(MODEL_GROUPS) == ["scan", "prefill", "prefix", "decode", "generate", "engine"]


@torch.inference_mode()
def test_our_mixer_equals_that_of_transformers() -> None:
    ours, theirs = scan.make_mixers(16)
    hidden = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(scan.run_ours(ours, hidden), theirs(hidden[None])[0], rtol=1e-4, atol=1e-5)
    check(scan.scan_rows(width=16, num_tokens=64, repeats=3), "scan", [">= 2", "<= 9"])


def test_the_engine_and_transformers_generate_the_same_tokens() -> None:
    ours, theirs = generate.make_pair(16)
    prompts = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8]])
    expected = generate.answer_with_transformers(theirs, prompts, 4)
    assert generate.answer_with_engine(ours, prompts, 4) == expected
    assert [len(answer) for answer in expected] == [4, 4]


@torch.inference_mode()
def test_a_randomly_filled_slot_is_as_long_as_a_prefilled_one() -> None:
    model = make_model(narrow_config(16))
    prompt = video_question(8)
    cache = model.new_cache(2, device="cpu", dtype=torch.float32)
    ids, kinds = torch.tensor(prompt.input_ids), torch.tensor(prompt.token_kind)
    reading = Prefill(model, ids, kinds, lambda: iter_features(8), cache, 0)
    while reading.advance() is None:
        pass
    decode.fill_slot(cache, 1, model.config, len(prompt) - prompt.num_vision_tokens, prompt.num_vision_tokens)
    assert cache.num_tokens[0] == cache.num_tokens[1] == len(prompt)
    for kv in cache.attention.values():
        assert kv.lengths[0] == kv.lengths[1]
    for state in cache.mamba.values():
        assert state.ssm_BHPN[1].std() > 0


@pytest.mark.slow
def test_decode_rows_have_bars_for_the_plan_and_for_batching() -> None:
    rows = decode.decode_rows(
        width=16, contexts=(64, 128), num_steps=1, batch=2, batch_width=16, context_repeats=3, repeats=3
    )
    check(rows, "decode", [">= 0.9", None, None, ">= 6"])


def test_engine_rows_have_bars_and_the_memory_row_holds() -> None:
    rows = engine.engine_rows(width=16, batch=4, num_steps=1, step_repeats=3, num_words=256, repeats=3)
    check(rows, "engine", ["<= 1.2", "<= 1.05", "<= 3"])
    assert 1 < rows[0].value <= 1.2


@pytest.mark.slow
def test_a_second_question_hits_the_prefix_cache() -> None:
    rows = prefix.prefix_rows(width=16, num_frames=4, repeats=3)
    check(rows, "prefix", [">= 12.3", "<= 5", ">= 100", "<= 5"])
    assert [row.value for row in rows[1::2]] == [0, 0]


def test_a_wrong_answer_from_the_prefix_cache_is_an_error() -> None:
    model = make_model(narrow_config(16, plan=parse_transv_plan("uni_7_0.5")))
    ids = iter([[1], [2], [3]])
    with pytest.raises(RuntimeError, match=r"the tokens are \[3\], without \[1\]"):
        prefix.plan_rows(model, "toy", ">= 1", 4, 3, answer=lambda *_, **__: prefix.Answer(1.0, next(ids)))


@pytest.mark.slow
def test_prefill_has_rows_for_memory_time_transv_and_control() -> None:
    def run_here(config: TimeViperConfig, num_frames: int) -> prefill.PrefillRun:
        run = prefill.run_prefill(make_model(config), num_frames)
        return run._replace(peak_bytes=1000 * num_frames)  # too short a video to need another page

    rows = prefill.prefill_rows(width=16, frames=(2, 4), transv_frames=2, repeats=3, run=run_here)
    assert rows[1].value == 1.0
    check(rows, "prefill", [None, "<= 1.15", "<= 1.05", None, None, None, None, ">= 0.7", ">= 2.04"])


def test_peak_memory_covers_freed_tensors_until_it_is_reset() -> None:
    reset_peak()
    before = resident_bytes()
    torch.ones(2**24).sum()
    assert peak_resident_bytes() - before > 2**25
    reset_peak()
    assert peak_resident_bytes() - before < 2**25


def test_block_seconds_by_kind_add_up_to_less_than_the_total() -> None:
    run = prefill.run_prefill(make_model(narrow_config(16)), 4)
    assert all(seconds > 0 for seconds in run.block_seconds.values())
    assert run.linear_seconds + run.block_seconds["attention"] == pytest.approx(sum(run.block_seconds.values()))
    assert sum(run.block_seconds.values()) < run.seconds


def test_the_control_has_equally_many_weights_and_only_attention() -> None:
    config = narrow_config(64, plan=())
    control = transformer_twin(config)
    sizes = [sum(p.numel() for p in make_model(c).backbone.parameters()) for c in (config, control)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)
    assert set(control.text.block_types) == {"attention", "mlp"}


def test_counted_flops_equal_a_calculation_by_hand() -> None:
    tokens = 2 * 16 + 32
    mlp = narrow_config(16, plan=(), pattern="-")
    assert prefill.count_flops(mlp, 2) == tokens * 2 * (2 * 16 * 56)
    attention = narrow_config(16, plan=(), pattern="*")
    assert prefill.count_flops(attention, 2) == tokens * 2 * (16 * 16 * 2 + 2 * 16 * 4) + 4 * 16 * tokens**2 / 2
    dropping = TransVSite(layer=1, select="uniform", keep=0.5, transfer="none")
    halved = narrow_config(16, plan=(dropping,), pattern="--")
    assert prefill.count_flops(halved, 2) == (tokens + tokens - 16) * 2 * (2 * 16 * 56)


def test_a_group_on_one_thread_names_it_in_its_rows() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        (row,) = on_one_thread(lambda: [Row(name="x", value=float(torch.get_num_threads()), unit="", command="c")])()
        assert (row.name, row.value) == ("x, one thread", 1.0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
