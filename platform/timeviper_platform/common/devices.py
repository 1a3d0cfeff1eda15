"""Devices, dtypes, and peak performance of accelerators."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path
from typing import Literal

import psutil
import torch

Dtype = Literal["float32", "bfloat16"]

PEAK_FLOPS: dict[str, float] = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200 NVL": 836e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 NVL": 836e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
}
"""Dense bf16 FLOP/s by prefix of the device's name, longer prefixes first (NVIDIA's data sheets)."""


CONTROL_GROUP = Path("/sys/fs/cgroup")
"""This process's group as a container sees it (cgroup v2)."""


def torch_dtype(name: Dtype) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def torch_device(name: str) -> torch.device:
    """Raises ValueError for an unknown name, and RuntimeError for a missing CUDA device."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device = {name!r} is not a device of torch; use cpu or cuda") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RuntimeError(f"device = {name!r}: torch sees {torch.cuda.device_count()} CUDA devices; use device: cpu")
    return device


def check_gpus_are_reserved(device: str, num_gpus: float, *, device_key: str, gpus_key: str) -> None:
    """Refuses workers on GPUs that they do not reserve: Ray hides no GPU from a process that reserves none.

    Raises:
        ValueError: for such workers, or a device that torch does not know.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"{device_key} = {device!r} is not a device of torch; use cpu or cuda") from error
    if kind == "cuda" and not num_gpus:
        raise ValueError(
            f"{device_key} = {device!r} and {gpus_key} = 0: every worker would take a node's first GPU; set {gpus_key}:"
            f" 1 (or a share of one), or {device_key}: cpu"
        )


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def peak_flops(name: str) -> float | None:
    """Returns None for an unknown device."""
    return next((peak for start, peak in PEAK_FLOPS.items() if name.startswith(start)), None)


def free_bytes(device: torch.device) -> int:
    """Returns the free memory of a GPU, or of this machine within the limits of its container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # no control group, or "max"
        limit = int((CONTROL_GROUP / "memory.max").read_text())
        stats = dict(line.split() for line in (CONTROL_GROUP / "memory.stat").read_text().splitlines())
        used = int((CONTROL_GROUP / "memory.current").read_text()) - int(stats["inactive_file"])
        free = min(free, limit - used)
    return free


def peak_memory_bytes(device: torch.device) -> int:
    """Returns torch's peak on a GPU, the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
