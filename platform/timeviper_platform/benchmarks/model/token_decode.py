"""Row group `decode`: tokens per second with a long context against a short one, and many sequences against one.

Slots hold random keys and values, as many as prefill would leave: a step's time depends only on their number.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from timeviper_model.analysis.transformer_twin import transformer_twin
from timeviper_model.config import TimeViperConfig
from timeviper_model.inference.memory import tokens_by_layer
from timeviper_model.layers.cache import HybridCache
from timeviper_model.timeviper import TimeViper
from timeviper_platform.benchmarks.measure import Row, compare
from timeviper_platform.benchmarks.model.models import (
    NUM_QUESTION,
    NUM_SYSTEM,
    make_model,
    narrow_config,
)

COMMAND = "python jobs/benchmark.py model --only decode"


def decode_rows(
    *,
    width: int = 1024,
    contexts: tuple[int, int] = (1024, 32768),
    num_steps: int = 5,
    batch: int = 32,
    batch_width: int = 256,
    context_repeats: int = 25,
    repeats: int = 5,
) -> list[Row]:
    """Long against short contexts: the paper's plan, no TransV, the control. Then `batch` sequences against one.

    The first three differ by hundredths while turns vary by a quarter, so they run more turns.
    """
    paper = narrow_config(width)
    no_plan = narrow_config(width, plan=())
    kinds: list[tuple[str, TimeViperConfig, str | None]] = [
        ("the paper's plan", paper, ">= 0.9"),
        ("no TransV", no_plan, None),
        ("all-attention control, no TransV", transformer_twin(no_plan), None),
    ]
    rows = [_context_row(name, config, bar, contexts, num_steps, context_repeats) for name, config, bar in kinds]
    return [*rows, _batch_row(narrow_config(batch_width, plan=()), batch, num_steps, repeats)]


def fill_slot(cache: HybridCache, slot: int, config: TimeViperConfig, num_text: int, num_vision: int) -> None:
    """Fills a slot with random states, keys and values of the lengths that prefill would leave."""
    for layer, length in tokens_by_layer(config, num_text, num_vision).items():
        attention = cache.attention[layer]
        keys, values = torch.randn(2, attention.num_kv_heads, length, attention.head_dim).unbind()
        attention.put(slot, keys, values)
    for state in cache.mamba.values():
        state.window_BKD[slot].normal_(0.0, 0.1)
        state.ssm_BHPN[slot].normal_(0.0, 0.1)
    cache.num_tokens[slot] = num_text + num_vision


@torch.inference_mode()
def _context_row(
    name: str, config: TimeViperConfig, bar: str | None, contexts: tuple[int, int], num_steps: int, repeats: int
) -> Row:
    model = make_model(config)
    short, long = (_decoding(model, context, 1, num_steps) for context in contexts)
    result = compare(long, short, repeats=repeats)
    return Row(
        name=f"decoding at {contexts[1]} tokens of context over {contexts[0]}, width {config.text.hidden_size},"
        f" {name} (noise {result.noise:.0%})",
        value=result.speedup,
        unit="x tokens/s",
        bar=bar,
        command=COMMAND,
    )


@torch.inference_mode()
def _batch_row(config: TimeViperConfig, batch: int, num_steps: int, repeats: int) -> Row:
    model = make_model(config)
    one, many = (_decoding(model, 512, count, num_steps) for count in (1, batch))
    result = compare(many, one, repeats=repeats)
    return Row(
        name=f"decoding {batch} sequences over one, width {config.text.hidden_size}, context 512"
        f" (noise {result.noise:.0%})",
        value=batch * result.speedup,
        unit="x tokens/s",
        bar=">= 6",
        command=COMMAND,
    )


def _decoding(model: TimeViper, context: int, batch: int, num_steps: int) -> Callable[[], None]:
    cache = model.new_cache(batch, device="cpu", dtype=torch.float32)
    num_text = NUM_SYSTEM + NUM_QUESTION
    for slot in range(batch):
        fill_slot(cache, slot, model.config, num_text, context - num_text)
    slots = torch.arange(batch)

    def steps() -> None:
        ids = torch.zeros(batch, dtype=torch.long)
        for _ in range(num_steps):
            ids = model.decode_step(ids, cache, slots).argmax(-1)

    return steps
