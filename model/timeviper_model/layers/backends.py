"""Choice between PyTorch and CUDA kernels."""

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
from timeviper_model.ops.causal_conv import causal_conv_silu, causal_conv_silu_step
from timeviper_model.ops.kernels import (
    Convolve,
    ConvolveStep,
    Scan,
    ScanStep,
    kernel_conv_silu,
    kernel_conv_step,
    kernel_scan,
    kernel_scan_step,
    varlen_attention,
)
from timeviper_model.ops.ssd import ssd_scan, ssd_step

logger = logging.getLogger(__name__)

Backend = Literal["auto", "torch", "kernels"]
"""`auto` uses available kernels, `kernels` requires them."""

KERNEL_DTYPES = (torch.bfloat16, torch.float16)
"""Flash Attention accepts no others, and mamba-ssm rounds fp32 to TF32."""


FLASH_CAPABILITY = (8, 0)
"""Minimum CUDA compute capability (Ampere)."""


class Operations(NamedTuple):
    scan: Scan
    convolution: Convolve
    attention: Callable[[Tensor, Tensor, Tensor, Segments], Tensor]
    scan_step: ScanStep
    convolution_step: ConvolveStep


TORCH = Operations(ssd_scan, causal_conv_silu, segment_causal_attention, ssd_step, causal_conv_silu_step)
KERNELS = Operations(kernel_scan, kernel_conv_silu, varlen_attention, kernel_scan_step, kernel_conv_step)


def set_backend(model: nn.Module, backend: Backend, *, device: torch.device | str, dtype: torch.dtype) -> Operations:
    """Sets and logs the operations of every mixer."""
    operations = choose_operations(backend, device=torch.device(device), dtype=dtype)
    use_operations(model, operations)
    return operations


def use_operations(model: nn.Module, operations: Operations) -> None:
    for module in model.modules():
        if isinstance(module, Mamba2Mixer):
            module.scan, module.convolve = operations.scan, operations.convolution
            module.scan_step, module.convolve_step = operations.scan_step, operations.convolution_step
        elif isinstance(module, Attention):
            module.attend = operations.attention


def choose_operations(backend: Backend, *, device: torch.device, dtype: torch.dtype) -> Operations:
    """Raises RuntimeError when `backend` is `kernels` and one is unavailable."""
    obstacles = (
        dict.fromkeys(Operations._fields, "backend is torch") if backend == "torch" else missing_kernels(device, dtype)
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


def missing_kernels(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Reasons why kernels are unavailable."""
    if device.type != "cuda":
        return dict.fromkeys(Operations._fields, f"the kernels need CUDA, not {device.type}")
    if dtype not in KERNEL_DTYPES:
        return dict.fromkeys(Operations._fields, f"the kernels need bf16 or fp16, not {dtype}")
    reasons = {
        "scan": _missing(
            "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined", {"initial_states", "seq_idx"}
        ),
        "convolution": _missing("causal_conv1d", "causal_conv1d_fn", {"seq_idx"}),
        "attention": _too_old(device)
        or _missing("torch.nn.attention.varlen", "varlen_attn", {"window_size", "enable_gqa"}),
        "scan_step": _missing("mamba_ssm.ops.triton.selective_state_update", "selective_state_update", {"dt_bias"}),
        # without cache_seqlens, the state has one input too many
        "convolution_step": _missing("causal_conv1d", "causal_conv1d_update", {"cache_seqlens"}),
    }
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _too_old(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability >= FLASH_CAPABILITY:
        return None
    own, needed = (".".join(map(str, version)) for version in (capability, FLASH_CAPABILITY))
    return f"Flash Attention needs compute capability {needed}, the device has {own}"


def _missing(module: str, function: str, parameters: set[str]) -> str | None:
    try:
        found = getattr(importlib.import_module(module), function)
    except (
        ImportError,
        AttributeError,
        OSError,
        RuntimeError,
    ) as error:  # missing, or built for another torch or driver
        return f"{module}.{function} cannot be imported ({error}); install the extra [cuda]"
    absent = sorted(parameters - set(inspect.signature(found).parameters))
    return f"{module}.{function} lacks parameter {', '.join(absent)}; install a newer one" if absent else None
