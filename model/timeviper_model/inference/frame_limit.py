"""The longest video that a memory holds, by arithmetic."""

from __future__ import annotations

from collections.abc import Callable
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
    """Returns the most frames of one prompt that fit, see `prompt_bytes`."""
    needed = prompt_bytes(
        config, dtype=dtype, logits=logits, num_text=num_text, num_new=num_new, device_type=device_type
    )
    low, high = 0, MAX_FRAMES  # `low` fits or is 0, `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needed(middle) <= max_bytes else (low, middle)
    return low


def prompt_bytes(
    config: TimeViperConfig,
    *,
    dtype: torch.dtype,
    logits: Literal["last", "all"] = "last",
    num_text: int = 128,
    num_new: int = 128,
    device_type: str = "cuda",
) -> Callable[[int], int]:
    """Returns the bytes of one prompt by its frames: weights, caches, a chunk's activations and logits.

    On a CPU the features of the whole prompt count too; a GPU holds those of a chunk.

    Args:
        logits: `last` position, as here, or `all`: fp32 logits of the whole prompt and a copy in `dtype`, as many
            implementations of prefill make them.
    """
    limits = EngineConfig(num_slots=1, max_new_tokens=num_new, kv_cache_bytes=1, prefix_cache_bytes=0)
    base = serving_bytes(config, limits, dtype=dtype, device_type=device_type).total - 1
    cache = HybridCache(config.text, 1, device="meta", dtype=dtype)

    def of(num_frames: int) -> int:
        num_vision = num_frames * config.vision.tokens_per_frame
        memory = request_memory(config, num_text, num_vision, num_new, dtype=dtype)
        num_logits = 1 if logits == "last" else num_text + num_vision
        logits_bytes = num_logits * config.text.vocab_size * (4 + (dtype.itemsize if logits == "all" else 0))
        features_bytes = num_vision * config.vision.row_size * dtype.itemsize if device_type == "cpu" else 0
        return base + cache.room_bytes(memory.tokens) + memory.working_bytes + features_bytes + logits_bytes

    return of
