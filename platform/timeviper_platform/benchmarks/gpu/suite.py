"""Row groups of the `gpu` suite. Each group creates its models and frees them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from timeviper_platform.benchmarks.gpu.kernels import kernel_rows
from timeviper_platform.benchmarks.gpu.prefill import prefill_rows
from timeviper_platform.benchmarks.gpu.token_decode import decode_rows
from timeviper_platform.benchmarks.gpu.training import training_rows
from timeviper_platform.benchmarks.gpu.vision import vision_rows
from timeviper_platform.benchmarks.gpu.vllm import vllm_rows
from timeviper_platform.benchmarks.measure import Row

logger = logging.getLogger(__name__)


def gpu_groups(device: torch.device) -> dict[str, Callable[[Path | None], list[Row]]]:
    return {
        "kernels": lambda film: kernel_rows(device),
        "vision": lambda film: vision_rows(device),
        "prefill": lambda film: prefill_rows(device),
        "decode": lambda film: decode_rows(device),
        "training": lambda film: training_rows(device),
        "vllm": lambda film: vllm_rows(device),
        "film": lambda film: _film_rows(device, film),
    }


def _film_rows(device: torch.device, film: Path | None) -> list[Row]:
    try:
        from timeviper_platform.benchmarks.gpu.film import film_rows
    except ModuleNotFoundError as error:  # only `film` needs a video decoder
        logger.warning("no rows of films: %s is not installed", error.name)
        return []
    return film_rows(device, film)


def require_cuda() -> torch.device:
    """Raises RuntimeError if there is none."""
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"the gpu suite needs a CUDA device, and torch {torch.__version__} sees none; run it on a machine with one"
        )
    return torch.device("cuda")
