"""Row group `decode`: tokens per second at 32k in, 1k out, batch 32, against a Transformer of Qwen3-8B's shape.

Both run the same code. One prefill and some steps from the middle of the answer are timed: a batch takes
`batch * prefill + new tokens * step`. If the cache does not fit, fewer sequences are decoded.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch

from timeviper_model.config import PRESETS, HybridConfig, Qwen2Config, TimeViperConfig
from timeviper_model.inference.chunked_transv import plan_sites
from timeviper_model.inference.decode_graph import DecodeGraph
from timeviper_model.inference.memory import tokens_by_layer
from timeviper_model.layers.cache import HybridCache
from timeviper_model.timeviper import TimeViper
from timeviper_platform.benchmarks.gpu.device import DTYPE, free_memory, make_model, make_row, measure, synchronize
from timeviper_platform.benchmarks.gpu.prefill import read_prompt
from timeviper_platform.benchmarks.measure import Row
from timeviper_platform.benchmarks.model.models import NUM_QUESTION, NUM_SYSTEM, TOKENS_PER_FRAME, video_question

logger = logging.getLogger(__name__)

QWEN3_8B_SHAPE = Qwen2Config(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
)
"""Sizes of Qwen3-8B's config.json, with Qwen2's biases instead of query and key norms."""

MEMORY_SHARE = 0.85
"""Share of the free memory used for the cache."""


class Side(NamedTuple):
    tokens_per_second: float
    """Decoding only."""
    whole_tokens_per_second: float
    """Including prefill."""


def decode_rows(
    device: torch.device,
    *,
    ours: TimeViperConfig = PRESETS["9b"],
    transformer: Qwen2Config = QWEN3_8B_SHAPE,
    num_frames: int = 2048,
    num_new: int = 1024,
    batch: int = 32,
    num_steps: int = 64,
    repeats: int = 3,
) -> list[Row]:
    """Rows of three models, and ratios of the first two to the third.

    Args:
        ours: hybrid with its TransV plan; also measured without.
        num_frames: frames per prompt, 16 tokens each.
        num_steps: steps per measured pass.
    """
    plain = TimeViperConfig(text=ours.text, vision=ours.vision)
    configs = {
        "9b with the paper's plan": ours,
        "9b without TransV": plain,
        "Transformer of Qwen3-8B's shape": TimeViperConfig(text=transformer, vision=ours.vision),
    }
    rows: list[Row] = []
    sides: list[Side] = []
    for name, config in configs.items():
        found, side = decode_side(name, config, device, num_frames, num_new, batch, num_steps, repeats)
        rows += found
        sides.append(side)
        free_memory(device)
    for name, side in zip(list(configs)[:2], sides[:2], strict=True):
        decoding = side.tokens_per_second / sides[2].tokens_per_second
        whole = side.whole_tokens_per_second / sides[2].whole_tokens_per_second
        rows += [
            make_row("decode", f"{name} over the Transformer, decoding alone", decoding, "x tokens/s"),
            make_row("decode", f"{name} over the Transformer, prompts included", whole, "x tokens/s"),
        ]
    return rows


def fitting_batch(config: TimeViperConfig, num_vision: int, num_text: int, free_bytes: float) -> int:
    return int(free_bytes // slot_bytes(config, num_vision, num_text))


def slot_bytes(config: TimeViperConfig, num_vision: int, num_text: int) -> int:
    """Cache bytes of one sequence: the keys and values that the plan keeps in each layer, and Mamba states."""
    text, plans, present, total = config.text, plan_sites(config, num_vision), num_vision, 0
    for layer, kind in enumerate(text.block_types):
        present = plans[layer].num_kept if layer in plans else present
        if kind == "attention":
            total += 2 * text.num_key_value_heads * text.head_dim * (present + num_text) * DTYPE.itemsize
        elif kind == "mamba":
            assert isinstance(text, HybridConfig)
            total += 4 * text.mamba_intermediate_size * text.ssm_state_size
            total += (text.conv_kernel - 1) * text.conv_dim * DTYPE.itemsize
    return total


@torch.inference_mode()
def fill_cache(cache: HybridCache, config: TimeViperConfig, num_vision: int, num_text: int, num_new: int) -> None:
    """Fills every slot with random states, keys and values of the lengths that prefill would leave."""
    slots = range(cache.num_slots)
    for layer, length in tokens_by_layer(config, num_text, num_vision).items():
        attention = cache.attention[layer]
        for slot in slots:
            attention.reserve(slot, length + num_new)
            attention.lengths[slot] = length
            for tensor in attention.content(slot):
                tensor.normal_()
    for state in cache.mamba.values():
        state.window_BKD.normal_(0.0, 0.1)
        state.ssm_BHPN.normal_(0.0, 0.1)
    cache.num_tokens = [num_vision + num_text for _ in slots]


def decode_side(
    name: str,
    config: TimeViperConfig,
    device: torch.device,
    num_frames: int,
    num_new: int,
    batch: int,
    num_steps: int,
    repeats: int,
    *,
    group: str = "decode",
) -> tuple[list[Row], Side]:
    model, words = make_model(config, device)
    prompt = video_question(num_frames)
    reading = measure(lambda: read_prompt(model, prompt, num_frames, device), device, repeats=repeats)
    free_memory(device)
    num_vision, num_text = num_frames * TOKENS_PER_FRAME, NUM_SYSTEM + NUM_QUESTION
    if device.type == "cuda":
        free_bytes = torch.cuda.mem_get_info(device)[0] * MEMORY_SHARE
        batch = min(batch, fitting_batch(config, num_vision, num_text + num_new, free_bytes))
    in_graph, eager = _step_seconds(model, device, num_vision, num_text + num_new // 2, batch, num_steps, repeats)
    decoding = batch / in_graph
    whole = batch * num_new / (batch * reading.seconds + num_new * in_graph)
    label = f"{name}, {len(prompt)} in, {num_new} out, batch {batch}"
    how = "a CUDA graph" if device.type == "cuda" else "no CUDA graph"
    values = [
        (f"{label}: prefill of one prompt ({words})", reading.seconds, "s"),
        (f"{label}: decoding alone ({how})", decoding, "tokens/s"),
        (f"{label}: decoding alone, step by step from Python", batch / eager, "tokens/s"),
        (f"{label}: prompts included ({how})", whole, "tokens/s"),
    ]
    return [make_row(group, *value) for value in values], Side(decoding, whole)


@torch.inference_mode()
def _step_seconds(
    model: TimeViper, device: torch.device, num_vision: int, num_text: int, batch: int, num_steps: int, repeats: int
) -> tuple[float, float]:
    """Seconds per step as a CUDA graph, and called from Python."""
    cache = model.new_cache(batch, device=device, dtype=DTYPE)
    # one warm-up pass and the measured ones, in the graph and then from Python
    total = num_steps * (repeats + 1)
    fill_cache(cache, model.config, num_vision, num_text, 2 * total)
    slots = list(range(batch))
    graph = DecodeGraph(model, cache, slots, [0] * batch, max_steps=total)
    in_graph = measure(lambda: [graph.step() for _ in range(num_steps)], device, repeats=repeats)
    graph.finish()
    synchronize(device)
    ids, slot_ids = torch.zeros(batch, dtype=torch.long, device=device), torch.tensor(slots)
    eager = measure(
        lambda: [model.decode_step(ids, cache, slot_ids) for _ in range(num_steps)], device, repeats=repeats
    )
    return in_graph.seconds / num_steps, eager.seconds / num_steps
