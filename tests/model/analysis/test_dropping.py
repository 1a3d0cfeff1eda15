from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reference.slow_timeviper import slow_loss_sum
from reference.small_models import SMALL, make_features, make_model, make_sample, pack
from timeviper_model.analysis.dropping import with_plan
from timeviper_model.config import TransVSite

SAMPLES = [make_sample("ss" + "v" * 12 + "iiirrr", seed=1), make_sample("svvvvvirr", seed=2)]


@pytest.mark.parametrize(
    "sites",
    [
        (),
        (TransVSite(layer=0, select="uniform", keep=0.3, transfer="none"),),
        (TransVSite(layer=2, select="attention", keep=0.5, transfer="none"),),
        (
            TransVSite(layer=1, select="uniform", keep=0.5),
            TransVSite(layer=5, select="uniform", keep=0.0, transfer="none"),
        ),
    ],
)
def test_a_model_under_another_plan_equals_the_formulas_written_out(sites: tuple[TransVSite, ...]) -> None:
    model = with_plan(make_model(), sites)
    expected = sum(slow_loss_sum(model, s, make_features(s, seed=sum(s.input_ids))) for s in SAMPLES)
    torch.testing.assert_close(model(pack(SAMPLES)).loss_sum, expected)


def test_the_plan_changes_the_answer_and_leaves_the_model_unchanged() -> None:
    model, batch = make_model(), pack(SAMPLES)
    before = model(batch)
    twin = with_plan(model, [TransVSite(layer=2, select="attention", keep=0.25, transfer="none")])
    assert twin(batch).num_vision_tokens.tolist() == [17, 4]
    assert not torch.equal(twin(batch).loss_sum, before.loss_sum)
    assert torch.equal(model(batch).loss_sum, before.loss_sum)
    assert {id(p) for p in twin.parameters()} < {id(p) for p in model.parameters()}


def test_the_models_own_plan_is_the_model_exactly() -> None:
    model, batch = make_model(dtype=torch.float32), pack(SAMPLES, dtype=torch.float32)
    assert torch.equal(with_plan(model, SMALL.transv)(batch).loss_sum, model(batch).loss_sum)


def test_invalid_sites_are_refused() -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"which is a mamba block.*attention blocks are at \[2, 4\]"):
        with_plan(model, [TransVSite(layer=3, select="attention", keep=0.5, transfer="none")])
    with pytest.raises(ValueError, match=r"no cross-attention at layers \[2\], only at \[1, 4\]"):
        with_plan(model, [replace(SMALL.transv[0], layer=2)])
