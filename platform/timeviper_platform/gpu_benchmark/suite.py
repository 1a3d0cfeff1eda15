"""The row groups of the `gpu` suite, by their keys; each makes its own models, which are gone behind it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from timeviper_platform.gpu_benchmark.decode import decode_rows
from timeviper_platform.gpu_benchmark.kernels import kernel_rows
from timeviper_platform.gpu_benchmark.prefill import prefill_rows
from timeviper_platform.gpu_benchmark.vision import vision_rows
from timeviper_platform.gpu_benchmark.vllm import vllm_rows
from timeviper_platform.measure import Row

GPU_GROUPS: dict[str, Callable[[torch.device], list[Row]]] = {
    "kernels": kernel_rows,
    "vision": vision_rows,
    "prefill": prefill_rows,
    "decode": decode_rows,
    "vllm": vllm_rows,
}


def require_cuda() -> torch.device:
    """The device that the suite runs on.

    Raises:
        RuntimeError: when there is none.
    """
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"the gpu suite needs a CUDA device, and torch {torch.__version__} sees none; run it on a machine with one"
        )
    return torch.device("cuda")
