from __future__ import annotations

from typing import Any

import pytest

from reference.small_models import SMALL, SMALL_QWEN
from timeviper_model.config import TextConfig
from timeviper_model.weights.families import text_config_from_dict, text_config_to_dict


@pytest.mark.parametrize("config", [SMALL.text, SMALL_QWEN.text], ids=["hybrid", "qwen"])
def test_text_config_survives_a_round_trip(config: TextConfig) -> None:
    assert text_config_from_dict(text_config_to_dict(config), where="here") == config


def test_attention_head_dim_is_accepted_as_the_head_width() -> None:
    raw = text_config_to_dict(SMALL.text)
    raw["attention_head_dim"] = raw.pop("head_dim")
    assert text_config_from_dict(raw, where="here") == SMALL.text


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (SMALL.text, {"mlp_hidden_act": "silu"}),
        (SMALL.text, {"mamba_hidden_act": "gelu"}),
        (SMALL.text, {"num_hidden_layers": 3}),
        (SMALL.text, {"attention_head_dim": 16}),
        (SMALL_QWEN.text, {"hidden_act": "gelu"}),
        (SMALL_QWEN.text, {"head_dim": 64}),
    ],
)
def test_unsupported_variants_are_refused(config: TextConfig, values: dict[str, Any]) -> None:
    ((name, value),) = values.items()
    with pytest.raises(ValueError, match=f"here: {name} = {value!r} is not supported"):
        text_config_from_dict(text_config_to_dict(config) | values, where="here")
