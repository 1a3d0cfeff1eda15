"""The largest number of frames that fits into a memory, with logits of the last position and of all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from timeviper_model.config import TimeViperConfig
from timeviper_model.inference.frame_limit import frames_that_fit

LOGITS: tuple[Literal["last", "all"], ...] = ("last", "all")


def frame_rows(
    model: str, config: TimeViperConfig, memory_gb: Sequence[float], *, dtype: torch.dtype, device_type: str
) -> Iterator[dict[str, Any]]:
    """Yields a row per plan (the model's own, none) and memory, by arithmetic alone."""
    for plan, own in {"as trained": config, "without TransV": replace(config, transv=())}.items():
        for size in memory_gb:
            counts = {
                f"num_frames_{kind}_logits": frames_that_fit(
                    own, int(size * 1e9), dtype=dtype, logits=kind, device_type=device_type
                )
                for kind in LOGITS
            }
            yield {"model": model, "dtype": str(dtype).removeprefix("torch."), "plan": plan, "memory_gb": size} | counts
