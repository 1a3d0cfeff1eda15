from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from reference.slow_timeviper import slow_loss_sum
from reference.small_models import SMALL, make_features, make_model, make_sample, pack
from timeviper_model.batching.batch import Sample, pack_samples
from timeviper_model.batching.segments import Segments
from timeviper_model.config import PRESETS, TransVSite, parse_transv_plan, progressive_importance, pyramid_drop
from timeviper_model.layers.evs import keep_changes
from timeviper_model.layers.transv import TokenStream, apply_site, num_kept
from timeviper_model.timeviper import TimeViper

Select = Literal["uniform", "attention"]
KINDS_OF_TRANSFER: tuple[Literal["cross_attention", "none"], ...] = ("cross_attention", "none")


def with_sites(*sites: TransVSite) -> TimeViper:
    return make_model(replace(SMALL, transv=sites))


def vision_stream(num_vision: int, hidden: Tensor | None = None) -> TokenStream:
    kinds = torch.tensor([0, *[1] * num_vision, 2], dtype=torch.int8)
    return TokenStream(
        hidden_TD=torch.arange(num_vision + 2.0)[:, None].repeat(1, 24) if hidden is None else hidden,
        segments=Segments(torch.zeros(num_vision + 2, dtype=torch.long), 1),
        token_kind_T=kinds,
        labels_T=torch.full((num_vision + 2,), -100),
        original_counts=(num_vision,),
    )


@pytest.mark.parametrize(
    ("keep", "indices"),
    [(1.0, list(range(9))), (0.5, [0, 2, 4, 6, 8]), (0.3, [0, 4, 8]), (0.1, [0]), (0.0, [])],
)
def test_uniform_keeps_evenly_spaced_tokens_with_first_and_last(keep: float, indices: list[int]) -> None:
    site = TransVSite(layer=1, select="uniform", keep=keep, transfer="none")
    left = apply_site(vision_stream(9), site, None, None)
    assert left.hidden_TD[:, 0].tolist() == [0.0, *(index + 1.0 for index in indices), 10.0]


def test_rounding_is_half_up_and_at_most_the_tokens_present() -> None:
    assert [num_kept(5, 5, 0.5), num_kept(5, 2, 0.5), num_kept(3, 3, 0.5), num_kept(10, 10, 0.04)] == [3, 2, 2, 0]


def test_equal_scores_keep_the_lower_index() -> None:
    model = make_model()
    hidden = torch.ones(11, 24, dtype=torch.float64)
    site = TransVSite(layer=2, select="attention", keep=1 / 3, transfer="none")
    stream = vision_stream(9, hidden)
    marked = replace(stream, labels_T=torch.arange(11))
    left = apply_site(marked, site, None, model.backbone.block(2))
    assert left.labels_T.tolist() == [0, 1, 2, 3, 10]


LAYOUTS = ["ssvvvvvviiirrr", "vvvviirrrviirr", "sssiirr", "svvvvvvvvv", "ssvviivvvviirr", "iivvvrr", "r", "svvvvrrriir"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("transfer_from", ["dropped", "kept"])
@pytest.mark.parametrize("transfer", ["cross_attention", "none"])
def test_packed_samples_equal_the_formulas_written_out(
    layout: str,
    transfer_from: Literal["dropped", "kept"],
    transfer: Literal["cross_attention", "none"],
) -> None:
    model = with_sites(*(replace(site, transfer_from=transfer_from, transfer=transfer) for site in SMALL.transv))
    samples = [make_sample("svvvviirrr", seed=7), make_sample(layout, seed=8), make_sample("ssiiirr", seed=9)]
    expected = sum(slow_loss_sum(model, sample, features_of(sample)).item() for sample in samples)
    out = model(pack(samples))
    assert out.loss_sum.item() == pytest.approx(expected, rel=1e-9)


EVS = TransVSite(layer=0, select="evs", keep=0.6, transfer="none")
REDUCTIONS = {
    "evs": (EVS,),
    "importance": (
        TransVSite(layer=2, select="importance", keep=0.6, transfer="none"),
        TransVSite(layer=3, select="importance", keep=0.3),
    ),
    "evs, uniform, importance": (
        EVS,
        TransVSite(layer=1, select="uniform", keep=0.5),
        TransVSite(layer=4, select="importance", keep=0.2),
    ),
}


@pytest.mark.parametrize("layout", [*LAYOUTS, "s" + "v" * 13 + "iivvvvvvvvvirr"])
@pytest.mark.parametrize("plan", REDUCTIONS)
def test_packed_reductions_equal_the_formulas_written_out(layout: str, plan: str) -> None:
    model = with_sites(*REDUCTIONS[plan])
    samples = [make_sample("s" + "v" * 12 + "iirrr", seed=7), make_sample(layout, seed=8), make_sample("siirr", seed=9)]
    expected = sum(slow_loss_sum(model, sample, features_of(sample)).item() for sample in samples)
    assert model(pack(samples)).loss_sum.item() == pytest.approx(expected, rel=1e-9)
    whole = sum(slow_loss_sum(model, sample, features_of(sample), use_transv=False).item() for sample in samples)
    assert model(pack(samples), use_transv=False).loss_sum.item() == pytest.approx(whole, rel=1e-9)


def test_evs_keeps_the_first_frame_and_what_changes() -> None:
    still, changed = torch.eye(6)[:4], torch.eye(6)[2:]
    frames = torch.stack([still, still, still.flip(0) * 3, changed, changed])  # the third has the same tokens elsewhere
    kinds = torch.tensor([0] + [1] * 20 + [2], dtype=torch.int8)
    kept = keep_changes(frames.flatten(0, 1), kinds, 4, num_kept=6)
    assert kept.nonzero().squeeze(1).tolist() == [0, 1, 2, 3, 14, 15]
    assert keep_changes(frames.flatten(0, 1), kinds, 4, num_kept=2).nonzero().squeeze(1).tolist() == [0, 1]


def test_plans_have_words_for_every_selection() -> None:
    sites = parse_transv_plan("evs_0_0.5-imp_3_0.75")
    assert [(site.select, site.layer, site.keep, site.transfer) for site in sites] == [
        ("evs", 0, 0.5, "none"),
        ("importance", 3, 0.25, "none"),
    ]
    with pytest.raises(ValueError, match="evs selects before block 0"):
        parse_transv_plan("evs_2_0.5")
    with pytest.raises(ValueError, match=r"is not \(uni\|attn\|imp\|evs\)_LAYER_DROPRATE"):
        parse_transv_plan("random_2_0.5")
    with pytest.raises(ValueError, match="importance at layer 1, an MLP block"):
        replace(SMALL, transv=(TransVSite(layer=1, select="importance", keep=0.5, transfer="none"),))


def test_progressive_importance_drops_equal_parts_down_to_its_end() -> None:
    sites = progressive_importance(PRESETS["tiny"].text, 0.25)
    assert [(site.layer, site.keep) for site in sites] == [(2, 0.85), (3, 0.7), (5, 0.55), (7, 0.4), (8, 0.25)]
    assert all((site.select, site.transfer) == ("importance", "none") for site in sites)
    assert len(PRESETS["9b-importance"].transv) == 30


@settings(max_examples=15, deadline=None)
@example(layouts=["v"], keeps=(0.0, 0.0), first="uniform")
@example(layouts=["v", "vv"], keeps=(0.0, 0.5), first="attention")
@given(
    layouts=st.lists(st.text(alphabet="svir", min_size=1, max_size=14), min_size=1, max_size=3),
    keeps=st.tuples(st.sampled_from([0.0, 0.34, 0.5, 1.0]), st.sampled_from([0.0, 0.2, 0.5])),
    first=st.sampled_from(["uniform", "attention"]),
)
def test_any_mix_of_kinds_equals_the_formulas_written_out(
    layouts: list[str], keeps: tuple[float, float], first: Select
) -> None:
    model = with_sites(
        TransVSite(layer=2, select=first, keep=keeps[0]), TransVSite(layer=4, select="attention", keep=keeps[1])
    )
    samples = [make_sample(layout, seed=index) for index, layout in enumerate(layouts)]
    expected = sum(slow_loss_sum(model, sample, features_of(sample)).item() for sample in samples)
    assert model(pack(samples)).loss_sum.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_sample_that_lost_every_token_stays_out_of_later_selections() -> None:
    model = with_sites(
        TransVSite(layer=1, select="uniform", keep=0.34), TransVSite(layer=4, select="attention", keep=0.0)
    )
    alone = make_sample("svvvviirr", seed=0)
    packed = model(pack([alone, make_sample("v", seed=1)]))
    assert packed.num_vision_tokens.tolist() == [5, 1, 0]
    assert packed.loss_sum.item() == pytest.approx(slow_loss_sum(model, alone, features_of(alone)).item(), rel=1e-9)


def test_only_instruction_tokens_receive_and_only_from_earlier_media() -> None:
    model = make_model()
    layer = model.transv_layer(1)
    assert layer is not None
    layout = torch.tensor([0, 2, 1, 1, 2, 3, 1, 1, 2, 3], dtype=torch.int8)  # of TokenKind
    stream = TokenStream(
        hidden_TD=torch.randn(10, 24, dtype=torch.float64),
        segments=Segments(torch.zeros(10, dtype=torch.long), 1),
        token_kind_T=layout,
        labels_T=torch.arange(10),
        original_counts=(4,),
    )
    site = TransVSite(layer=1, select="uniform", keep=0.0)
    left = apply_site(stream, site, layer, None)
    assert left.labels_T.tolist() == [0, 1, 4, 5, 8, 9]
    changed = (left.hidden_TD != stream.hidden_TD[left.labels_T]).any(-1)
    assert changed.tolist() == [False, False, True, False, True, False]
    later = stream.hidden_TD.clone()
    later[6:8] += 1.0
    again = apply_site(stream.with_hidden(later), site, layer, None)
    same = (again.hidden_TD == left.hidden_TD).all(-1)
    assert same.tolist() == [True, True, True, True, False, True]


def test_copies_come_from_the_nearest_attention_block_at_or_after_the_site() -> None:
    model = make_model(
        replace(SMALL, transv=tuple(TransVSite(layer=n, select="uniform", keep=0.5) for n in (1, 2, 3, 5)))
    )
    for site, block in ((1, 2), (2, 2), (3, 4), (5, 4)):
        state = model.state_dict()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            copied = state[f"transv.{site}.{name}.weight"]
            assert torch.equal(copied, state[f"backbone.layers.{block}.mixer.{name}.weight"])


def test_other_sites_share_tensors_and_start_with_closed_gates() -> None:
    model, batch = make_model().train(), pack([make_sample(layout) for layout in LAYOUTS])
    without = model.with_transv(())
    assert without.training
    assert without(batch).loss_sum == model(batch, use_transv=False).loss_sum
    sites = (TransVSite(layer=2, select="attention", keep=0.25), TransVSite(layer=4, select="uniform", keep=0.25))
    other, dropping = (model.with_transv(tuple(replace(s, transfer=t) for s in sites)) for t in KINDS_OF_TRANSFER)
    assert other(batch).loss_sum == dropping(batch).loss_sum != without(batch).loss_sum
    state = other.state_dict()
    assert torch.equal(state["transv.2.k_proj.weight"], state["backbone.layers.2.mixer.k_proj.weight"])
    assert all(parameter.requires_grad for parameter in other.parameters())
    with pytest.raises(ValueError, match="attention blocks are at"):
        model.with_transv((TransVSite(layer=1, select="attention", keep=0.5),))


def test_pyramid_drop_halves_what_every_attention_block_receives() -> None:
    sites = pyramid_drop(PRESETS["9b"].text)
    assert PRESETS["9b-pdrop"] == replace(PRESETS["9b"], transv=sites)
    assert PRESETS["tiny-pdrop"] == replace(PRESETS["tiny"], transv=pyramid_drop(PRESETS["tiny"].text))
    assert [(site.layer, site.keep) for site in sites] == [(14, 0.5), (21, 0.25), (30, 0.125), (39, 0.0625)]
    assert {(site.select, site.transfer) for site in sites} == {("attention", "none")}
    stream = vision_stream(9, torch.ones(11, 24, dtype=torch.float64))
    model = with_sites(*pyramid_drop(SMALL.text))
    for site, num_left in zip(model.config.transv, (5, 2), strict=True):
        stream = apply_site(stream, site, None, model.backbone.block(site.layer))
        assert len(stream.hidden_TD) == num_left + 2


def test_selection_ignores_tokens_after_the_first_response() -> None:
    model = with_sites(TransVSite(layer=2, select="attention", keep=0.25))
    first = make_sample("svvvvvvvviirrr")
    longer = make_sample("svvvvvvvviirrriiirr")
    longer = replace(
        longer,
        input_ids=first.input_ids + longer.input_ids[14:],
        labels=first.labels + longer.labels[14:],
    )
    features = make_features(first)
    short_scores, _ = model.target_log_probs(pack_samples([first], [features]))
    long_scores, _ = model.target_log_probs(pack_samples([longer], [features]))
    torch.testing.assert_close(long_scores[: len(short_scores)], short_scores)


def features_of(sample: Sample) -> Tensor:
    return make_features(sample, seed=sum(sample.input_ids))
