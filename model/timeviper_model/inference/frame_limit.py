"""The longest video that a memory holds, by arithmetic."""

from __future__ import annotations

from typing import Literal

import torch

from timeviper_model.config import TimeViperConfig
from timeviper_model.inference.memory import request_memory, serving_bytes
from timeviper_model.inference.requests import EngineConfig
from timeviper_model.layers.cache import HybridCache

MAX_FRAMES = 2**24
"""Half a year at one frame per second."""


def frames_that_fit(
    config: TimeViperConfig,
    max_bytes: int,
    *,
    dtype: torch.dtype,
    logits: Literal["last", "all"] = "last",
    num_text: int = 128,
    num_new: int = 128,
    device_type: str = "cuda",
) -> int:
    """Returns the most frames of one prompt that fit, with weights, caches, a chunk's activations and logits.

    Args:
        logits: `last` position, as here, or `all`: fp32 logits of the whole prompt and a copy in `dtype`, as many
            implementations of prefill make them.
    """
    limits = EngineConfig(num_slots=1, max_new_tokens=num_new, kv_cache_bytes=1, prefix_cache_bytes=0)
    base = serving_bytes(config, limits, dtype=dtype, device_type=device_type).total - 1
    cache = HybridCache(config.text, 1, device="meta", dtype=dtype)

    def fits(num_frames: int) -> bool:
        num_vision = num_frames * config.vision.tokens_per_frame
        memory = request_memory(config, num_text, num_vision, num_new, dtype=dtype)
        num_logits = 1 if logits == "last" else num_text + num_vision
        logits_bytes = num_logits * config.text.vocab_size * (4 + (dtype.itemsize if logits == "all" else 0))
        return base + cache.room_bytes(memory.tokens) + memory.working_bytes + logits_bytes <= max_bytes

    low, high = 0, MAX_FRAMES  # `low` fits or is 0, `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
