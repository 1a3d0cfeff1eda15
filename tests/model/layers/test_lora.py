from __future__ import annotations

import pytest
import torch

from reference.small_models import SMALL, make_model, make_sample, pack
from timeviper_model.layers.lora import LoraConfig, LoraLinear, add_lora, merge_lora
from timeviper_model.timeviper import TimeViper

LAYOUTS = ("ssvvvvvviiirr", "sviirrr")


def adapted(config: LoraConfig) -> TimeViper:
    model = make_model()
    generator = torch.Generator().manual_seed(2)
    add_lora(model, config, generator)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoraLinear):
                module.lora_B.normal_(0.0, 0.3, generator=generator)
    return model


def test_new_adapters_change_nothing_and_cover_mixers_and_attention() -> None:
    batch = pack([make_sample(layout, seed=n) for n, layout in enumerate(LAYOUTS)])
    model = make_model()
    expected = model.target_log_probs(batch)[0]
    names = add_lora(model, LoraConfig(rank=3), torch.Generator().manual_seed(0))
    assert torch.equal(model.target_log_probs(batch)[0], expected)
    kinds = {name.rsplit(".", 1)[1] for name in names}
    assert kinds == {"in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"}
    assert all(name.startswith("backbone.layers.") for name in names)
    types = SMALL.text.block_types
    assert len(names) == 2 * types.count("mamba") + 4 * types.count("attention")


def test_merged_weights_give_the_same_answers() -> None:
    batch = pack([make_sample(layout, seed=n) for n, layout in enumerate(LAYOUTS)])
    config = LoraConfig(rank=3, alpha=5.0)
    model = adapted(config)
    plain = make_model(seed=9)
    plain.load_state_dict(merge_lora(model.state_dict(), config.scale))  # strict: names of a plain model
    expected, merged = model.target_log_probs(batch)[0], plain.target_log_probs(batch)[0]
    torch.testing.assert_close(merged, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(merged, make_model().target_log_probs(batch)[0], atol=1e-3)


def test_targets_without_a_match_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'mlp' matches no linear module; there are .*layers.\*.mixer.in_proj"):
        add_lora(make_model(), LoraConfig(targets="mlp"), torch.Generator())
    with pytest.raises(ValueError, match="rank = 0 must be at least 1"):
        LoraConfig(rank=0)
    with pytest.raises(ValueError, match="is not a regular expression"):
        LoraConfig(targets="(")
