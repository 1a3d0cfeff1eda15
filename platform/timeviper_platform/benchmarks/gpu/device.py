"""What the groups of the `gpu` suite share: peak rates, seconds and memory of a run, and models made on the device.

Every function takes the device, and the CPU will do: a test runs the groups there at toy sizes. Knows devices and
random weights; not what is measured.
"""

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
"""frames of one block of features that a prompt's iterator yields"""


class Measurement(NamedTuple):
    """What a run took."""

    seconds: float
    """median of the measured passes"""
    peak_bytes: int
    """most that PyTorch held on the device during them, weights included; 0 on a CPU"""
    num_passes: int


def measure(
    run: Callable[[], object],
    device: torch.device,
    *,
    repeats: int,
    budget_seconds: float = 60.0,
    warm_up: bool = True,
) -> Measurement:
    """Times `run`, with the device's work done.

    Args:
        run: what is measured.
        device: it works on.
        repeats: passes, at most; fewer once `budget_seconds` are spent, and at least one.
        budget_seconds: of all measured passes together.
        warm_up: one unmeasured pass first; not where a shorter run has already called the same kernels.
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
    """Returns when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device) -> int:
    """Most that PyTorch has held on the device since the peak was last begun anew; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def free_memory(device: torch.device) -> None:
    """Gives what nobody holds any more back to the device, and begins the peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def make_model(config: TimeViperConfig, device: torch.device, *, dtype: torch.dtype = DTYPE) -> tuple[TimeViper, str]:
    """A model with random weights, made on the device in its dtype, and in words what computes its mixers."""
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
    """Random features on the device, a block of frames at a time."""
    generator = torch.Generator(device=device).manual_seed(1)
    per_frame = config.vision.num_tokens_per_frame
    for start in range(0, num_frames, FRAMES_PER_BLOCK):
        rows = min(FRAMES_PER_BLOCK, num_frames - start) * per_frame
        yield torch.randn(rows, config.vision.row_size, generator=generator, device=device, dtype=DTYPE)


def make_row(group: str, name: str, value: float, unit: str, bar: str | None = None) -> Row:
    """A row of one of the suite's groups; it is logged at once, as the next one may fail."""
    row = Row(name=name, value=value, unit=unit, bar=bar, command=f"python jobs/benchmark.py gpu --only {group}")
    logger.info("%s: %.4g %s", name, value, unit)
    return row
