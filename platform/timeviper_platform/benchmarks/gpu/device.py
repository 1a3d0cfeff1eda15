"""Timing, memory and random models for the `gpu` suite. Tests run it on a CPU at toy sizes."""

from __future__ import annotations

import gc
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from timeviper_model.config import TimeViperConfig
from timeviper_model.layers.backends import TORCH, set_backend
from timeviper_model.timeviper import TimeViper
from timeviper_platform.benchmarks.measure import Row

logger = logging.getLogger(__name__)

DTYPE = torch.bfloat16

FRAMES_PER_BLOCK = 64
"""Frames per block of features."""


class Measurement(NamedTuple):
    seconds: float
    """Median of the measured passes."""
    peak_bytes: int
    """Peak bytes allocated by PyTorch, weights included; 0 on a CPU."""
    num_passes: int


def measure(
    run: Callable[[], object],
    device: torch.device,
    *,
    repeats: int,
    budget_seconds: float = 60.0,
    warm_up: bool = True,
) -> Measurement:
    """Times `run`, including the work it queues on the device.

    Args:
        repeats: maximum number of passes.
        budget_seconds: no further pass starts after this total.
        warm_up: run one unmeasured pass first.
    """
    if warm_up:
        run()
    synchronize(device)
    free_memory(device)
    seconds: list[float] = []
    while not seconds or (len(seconds) < repeats and sum(seconds) < budget_seconds):
        start = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return Measurement(statistics.median(seconds), peak_bytes(device), len(seconds))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device) -> int:
    """Peak bytes since the last reset; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def free_memory(device: torch.device) -> None:
    """Frees unused memory and resets the peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def make_model(config: TimeViperConfig, device: torch.device, *, dtype: torch.dtype = DTYPE) -> tuple[TimeViper, str]:
    """A model with random weights, and a description of its kernels."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = TimeViper(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.init_weights(torch.Generator(device=device).manual_seed(0))
    operations = set_backend(model, "auto", device=device, dtype=dtype)
    in_torch = [name for name in ("scan", "convolution") if getattr(operations, name) is getattr(TORCH, name)]
    words = f"{' and '.join(in_torch)} in PyTorch" if in_torch else "kernels"
    return model.requires_grad_(False), words


def iter_features(config: TimeViperConfig, num_frames: int, device: torch.device) -> Iterator[Tensor]:
    generator = torch.Generator(device=device).manual_seed(1)
    per_frame = config.vision.num_tokens_per_frame
    for start in range(0, num_frames, FRAMES_PER_BLOCK):
        rows = min(FRAMES_PER_BLOCK, num_frames - start) * per_frame
        yield torch.randn(rows, config.vision.row_size, generator=generator, device=device, dtype=DTYPE)


def make_row(group: str, name: str, value: float, unit: str, bar: str | None = None) -> Row:
    """Logs the row at once, because the next one may fail."""
    row = Row(name=name, value=value, unit=unit, bar=bar, command=f"python jobs/benchmark.py gpu --only {group}")
    logger.info("%s: %.4g %s", name, value, unit)
    return row
