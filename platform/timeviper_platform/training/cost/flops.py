"""Counts floating-point operations as MFU does (no recomputation); leaves out norms, projector and TransV layers."""

from __future__ import annotations

from timeviper_model.config import HybridConfig, TextConfig, TimeViperConfig
from timeviper_platform.common.devices import PEAK_FLOPS
from timeviper_platform.training.batches.packing import Pack
from timeviper_platform.training.cost.memory import vision_by_layer

ASSUMED_DEVICE = "NVIDIA H100"
ASSUMED_MFU = 0.4
"""Assumed share of the peak; published figures for this model size: 0.33 to 0.43."""


def training_flops(config: TimeViperConfig, pack: Pack, *, use_transv: bool, trained_share: float) -> float:
    """Counts a forward and backward pass.

    Backward costs a forward pass for the gradients of activations, and another for those of weights.

    Args:
        trained_share: `parameter_groups.trained_share`; frozen weights need no gradient.
    """
    return forward_flops(config, pack, use_transv=use_transv) * (2 + trained_share)


def forward_flops(config: TimeViperConfig, pack: Pack, *, use_transv: bool) -> float:
    """Counts a forward pass, with text split evenly among the samples."""
    text = config.text
    counts = pack.vision_counts or (0,)
    text_per_sample = (pack.num_tokens - pack.num_vision_tokens) / len(counts)
    total = 2.0 * pack.num_targets * text.hidden_size * text.vocab_size
    for layer, present in enumerate(vision_by_layer(config, pack, use_transv=use_transv)):
        total += _block_flops(text, layer, [count + text_per_sample for count in present or counts])
    return total


def gpu_hours(flops: float) -> float:
    return flops / (PEAK_FLOPS[ASSUMED_DEVICE] * ASSUMED_MFU) / 3600


def _block_flops(text: TextConfig, layer: int, lengths: list[float]) -> float:
    """Counts two operations per weight and token, and the unmasked half of attention."""
    tokens, pairs = sum(lengths), sum(length * length for length in lengths)
    query_size = text.num_attention_heads * text.head_dim
    attention_weights = 2 * text.hidden_size * text.head_dim * (text.num_attention_heads + text.num_key_value_heads)
    attention = tokens * 2 * attention_weights + pairs * 2 * query_size
    if not isinstance(text, HybridConfig):
        return attention + tokens * 6 * text.hidden_size * text.intermediate_size  # gate, up, down
    kind = text.block_types[layer]
    if kind == "attention":
        return attention
    if kind == "mlp":
        return tokens * 4 * text.hidden_size * text.intermediate_size
    inner, state = text.mamba_intermediate_size, text.ssm_state_size
    weights = text.hidden_size * (inner + text.conv_dim + text.mamba_num_heads) + inner * text.hidden_size
    # scan (arXiv 2405.21060, section 6): a triangle per chunk; the state is written and read once
    return tokens * (2 * weights + text.chunk_size * (text.n_groups * state + inner) + 4 * inner * state)
