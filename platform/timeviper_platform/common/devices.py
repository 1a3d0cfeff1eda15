"""What an accelerator can do at most, by the name that its driver gives."""

from __future__ import annotations

import resource
from typing import Literal

import torch

Dtype = Literal["float32", "bfloat16"]

PEAK_FLOPS: dict[str, float] = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
}
"""dense bf16 operations a second by the start of the device's name, the longer names first; NVIDIA's data sheets
(theirs with sparsity are twice these)"""


def torch_dtype(name: Dtype) -> torch.dtype:
    """The torch type of that name."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def device_name(device: torch.device) -> str:
    """As the driver says it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def peak_flops(name: str) -> float | None:
    """The device's dense bf16 operations a second; None for one that PEAK_FLOPS does not have."""
    return next((peak for start, peak in PEAK_FLOPS.items() if name.startswith(start)), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Most that PyTorch has held on a GPU, or this process on a CPU, since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
