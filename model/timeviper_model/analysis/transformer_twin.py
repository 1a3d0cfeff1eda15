"""A Transformer of a hybrid's size, to compare speed and memory with."""

from __future__ import annotations

from dataclasses import replace

from timeviper_model.config import HybridConfig, TimeViperConfig


def transformer_twin(config: TimeViperConfig) -> TimeViperConfig:
    """Attention instead of Mamba, and wider MLPs for the same number of weights.

    Raises:
        ValueError: if `config` is not a hybrid.
    """
    text = config.text
    if not isinstance(text, HybridConfig):
        raise ValueError("only a hybrid has a Transformer twin; these weights are a Transformer themselves")
    num_mamba, num_mlp = text.hybrid_override_pattern.count("M"), text.hybrid_override_pattern.count("-")
    missing = num_mamba * (mamba_weights(text) - attention_weights(text))
    wider = round(missing / (2 * text.hidden_size * num_mlp)) if num_mlp else 0
    pattern = text.hybrid_override_pattern.replace("M", "*")
    width = max(1, text.intermediate_size + wider)  # narrow Mamba-2 blocks may have fewer weights than attention
    wide = replace(text, hybrid_override_pattern=pattern, intermediate_size=width)
    return replace(config, text=wide)


def mamba_weights(text: HybridConfig) -> int:
    inner = text.mamba_intermediate_size
    return text.hidden_size * (inner + text.conv_dim + text.mamba_num_heads) + inner * text.hidden_size


def attention_weights(text: HybridConfig) -> int:
    return 2 * text.hidden_size * text.head_dim * (text.num_attention_heads + text.num_key_value_heads)
