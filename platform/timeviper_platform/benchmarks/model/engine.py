"""Row group `engine`: memory of one long prompt beside short ones, a step after neighbours have ended, and sampling."""

from __future__ import annotations

from collections.abc import Callable

import torch

from timeviper_model.config import PRESETS, TimeViperConfig
from timeviper_model.inference.answer import SamplingParams
from timeviper_model.inference.engine import InferenceEngine
from timeviper_model.inference.memory import tokens_by_layer
from timeviper_model.inference.requests import EngineConfig, Request
from timeviper_model.inference.sampling import sample_tokens
from timeviper_model.layers.cache import HybridCache
from timeviper_model.timeviper import TimeViper
from timeviper_platform.benchmarks.measure import Row, compare
from timeviper_platform.benchmarks.model.models import FEATURE_SIZE, make_model, narrow_config, text_prompt

COMMAND = "python jobs/benchmark.py model --only engine"
NUM_SLOTS = 32
NUM_ANSWER = 128
"""Tokens of every answer."""


def engine_rows(
    *,
    width: int = 256,
    batch: int = 16,
    num_steps: int = 3,
    step_repeats: int = 25,
    num_words: int = 131_072,
    repeats: int = 9,
) -> list[Row]:
    """Allocated over used bytes; scattered over dense steps, which differ by hundredths; sampled over greedy rows."""
    return [
        memory_row(PRESETS["9b"]),
        _slots_row(make_model(narrow_config(width, plan=())), batch, num_steps, step_repeats),
        _sampling_row(num_words, repeats),
    ]


def memory_row(config: TimeViperConfig, *, num_vision: int = 130_000) -> Row:
    """Counts the bytes of tensors without data, at the sizes of `config`. Space for answers counts as unused."""
    cache = HybridCache(config.text, NUM_SLOTS, device="meta", dtype=torch.bfloat16)
    used = 0
    for slot in range(NUM_SLOTS):
        tokens = tokens_by_layer(config, 64 + 8 * slot, 0 if slot else num_vision)
        cache.reserve(slot, {layer: count + NUM_ANSWER for layer, count in tokens.items()})
        used += sum(count * cache.attention[layer].bytes_per_token for layer, count in tokens.items())
    return Row(
        name=f"keys and values allocated over used: a prompt of {num_vision} vision tokens beside {NUM_SLOTS - 1} of 72"
        " to 312 tokens, sizes of the 9B",
        value=cache.kv_bytes / used,
        unit="x",
        bar="<= 1.2",
        command=COMMAND,
    )


@torch.inference_mode()
def _slots_row(model: TimeViper, batch: int, num_steps: int, repeats: int) -> Row:
    num_new = 2 * num_steps * (repeats + 2)
    scattered, dense = (_decoding(model, batch, num_new, num_steps, gaps=gaps) for gaps in (True, False))
    result = compare(dense, scattered, repeats=repeats)
    return Row(
        name=f"decode step of {batch // 2} requests after every second of {batch} has ended, over {batch // 2} alone,"
        f" width {model.config.text.hidden_size} (noise {result.noise:.0%})",
        value=result.speedup,
        unit="x",
        bar="<= 1.05",
        command=COMMAND,
    )


def _decoding(model: TimeViper, batch: int, num_new: int, num_steps: int, *, gaps: bool) -> Callable[[], None]:
    engine = InferenceEngine(model, EngineConfig(num_slots=batch, max_new_tokens=num_new))
    engine.end_token_ids = frozenset()
    ids = [
        engine.submit(
            Request(
                prompt=text_prompt(256, seed=seed),
                vision_features=torch.zeros(0, FEATURE_SIZE),
                sampling=SamplingParams(max_new_tokens=num_new),
            )
        )
        for seed in range(batch if gaps else batch // 2)
    ]
    while engine.stats().prompt_tokens < 256 * len(ids):
        engine.step()
    for request_id in ids[::2] if gaps else []:
        engine.cancel(request_id)
    engine.step()

    def steps() -> None:
        for _ in range(num_steps):
            engine.step()

    return steps


def _sampling_row(num_words: int, repeats: int) -> Row:
    logits = 3.0 * torch.randn(NUM_SLOTS, num_words, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(seed) for seed in range(NUM_SLOTS)]
    greedy, drawn = SamplingParams(), SamplingParams(temperature=0.7, top_p=0.9)
    result = compare(
        lambda: sample_tokens(logits, [greedy] * NUM_SLOTS, generators),
        lambda: sample_tokens(logits, [drawn] * NUM_SLOTS, generators),
        repeats=repeats,
    )
    return Row(
        name=f"{NUM_SLOTS} rows sampled with top-p over greedy ones, {num_words} words (noise {result.noise:.0%})",
        value=result.speedup,
        unit="x",
        bar="<= 3",
        command=COMMAND,
    )
