"""Which implementation computes a model's scans, convolutions and attention: PyTorch everywhere, or CUDA kernels.

Turns the setting `auto | torch | kernels`, a device and a dtype into functions and puts them into the mixers. Knows
what each kernel needs; not how it is called (kernels.py) or what for.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from timeviper_model.batching.segments import Segments
from timeviper_model.layers.attention import Attention, segment_causal_attention
from timeviper_model.layers.mamba2 import Mamba2Mixer
from timeviper_model.ops.causal_conv import causal_conv_silu
from timeviper_model.ops.kernels import Convolve, Scan, kernel_conv_silu, kernel_scan, varlen_attention
from timeviper_model.ops.ssd import ssd_scan

logger = logging.getLogger(__name__)

Backend = Literal["auto", "torch", "kernels"]
"""kernels wherever they can be used; PyTorch everywhere; kernels or an error"""

KERNEL_DTYPES = (torch.bfloat16, torch.float16)
"""Flash Attention takes nothing else, and mamba-ssm's products round fp32 to TF32"""


FLASH_CAPABILITY = (8, 0)
"""of a CUDA device: Ampere's, the oldest that Flash Attention 2 and its build in PyTorch run on"""


class Operations(NamedTuple):
    """The functions that mix tokens."""

    scan: Scan
    convolution: Convolve
    attention: Callable[[Tensor, Tensor, Tensor, Segments], Tensor]


TORCH = Operations(ssd_scan, causal_conv_silu, segment_causal_attention)
KERNELS = Operations(kernel_scan, kernel_conv_silu, varlen_attention)


def set_backend(model: nn.Module, backend: Backend, *, device: torch.device | str, dtype: torch.dtype) -> Operations:
    """Makes every mixer of `model` use the operations that `backend` means on `device` in `dtype`, and logs which.

    Raises:
        RuntimeError: when `kernels` is asked for and one of them cannot be used.
    """
    operations = choose_operations(backend, device=torch.device(device), dtype=dtype)
    use_operations(model, operations)
    return operations


def use_operations(model: nn.Module, operations: Operations) -> None:
    """Makes every mixer of `model` use `operations`."""
    for module in model.modules():
        if isinstance(module, Mamba2Mixer):
            module.scan, module.convolve = operations.scan, operations.convolution
        elif isinstance(module, Attention):
            module.attend = operations.attention


def choose_operations(backend: Backend, *, device: torch.device, dtype: torch.dtype) -> Operations:
    """The operations that `backend` means on `device` in `dtype`; logs them.

    Raises:
        RuntimeError: when `kernels` is asked for and one of them cannot be used.
    """
    obstacles = (
        dict.fromkeys(Operations._fields, "backend is torch") if backend == "torch" else _obstacles(device, dtype)
    )
    if backend == "kernels" and obstacles:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in obstacles.items())
        raise RuntimeError(f"backend = kernels cannot be used ({reasons}); set backend to auto or torch")
    chosen = Operations(*(getattr(TORCH if name in obstacles else KERNELS, name) for name in Operations._fields))
    logger.info(
        "backend %s on %s in %s: %s",
        backend,
        device,
        dtype,
        ", ".join(
            f"{name} by {function.__name__}" + (f" ({obstacles[name]})" if name in obstacles else "")
            for name, function in chosen._asdict().items()
        ),
    )
    return chosen


def _obstacles(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Why an operation's kernel cannot be used; nothing for one that can."""
    if device.type != "cuda":
        return dict.fromkeys(Operations._fields, f"the kernels need CUDA, not {device.type}")
    if dtype not in KERNEL_DTYPES:
        return dict.fromkeys(Operations._fields, f"the kernels need bf16 or fp16, not {dtype}")
    found = {
        "scan": _missing(
            "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined", {"initial_states", "seq_idx"}
        ),
        "convolution": _missing("causal_conv1d", "causal_conv1d_fn", {"seq_idx"}),
        "attention": _too_old(device)
        or _missing("torch.nn.attention.varlen", "varlen_attn", {"window_size", "enable_gqa"}),
    }
    return {name: reason for name, reason in found.items() if reason is not None}


def _too_old(device: torch.device) -> str | None:
    """That the device has no Flash Attention, which PyTorch says at the first call alone; None where it has."""
    capability = torch.cuda.get_device_capability(device)
    if capability >= FLASH_CAPABILITY:
        return None
    own, needed = (".".join(map(str, version)) for version in (capability, FLASH_CAPABILITY))
    return f"Flash Attention needs compute capability {needed}, the device has {own}"


def _missing(module: str, function: str, parameters: set[str]) -> str | None:
    """What stands in the way of calling `function` with `parameters`; None if nothing does."""
    try:
        found = getattr(importlib.import_module(module), function)
    except (
        ImportError,
        AttributeError,
        OSError,
        RuntimeError,
    ) as error:  # absent, or built for another torch or driver
        return f"{module}.{function} cannot be imported ({error}); install the extra [cuda]"
    absent = sorted(parameters - set(inspect.signature(found).parameters))
    return f"{module}.{function} has no parameter {', '.join(absent)}; install a newer one" if absent else None
