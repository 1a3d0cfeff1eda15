"""Compares mamba-ssm's Triton kernels, run by Triton's interpreter on the CPU, with PyTorch in fp32.

A program for an environment that has mamba-ssm built without CUDA, triton and einops. Prints one JSON object:
name of a tensor -> largest difference from the reference, relative to the reference's largest value.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

import json
import sys
import types
from typing import Any

import torch
import triton
from torch import Tensor

from reference.slow_scan import slow_scan
from timeviper_model.ops.kernels import kernel_scan, kernel_scan_step, scan_in_chunks
from timeviper_model.ops.ssd import ssd_scan, ssd_step

CHUNK_SIZE = 16
SEGMENT_LENGTHS = (5, 22, 1, 12)
NUM_TOKENS = sum(SEGMENT_LENGTHS)
NUM_HEADS, HEAD_DIM, NUM_GROUPS, STATE_SIZE = 4, 16, 2, 16
OPERANDS = ("x", "dt", "A", "B", "C", "D", "initial state")


class NoDevice:
    """Stands in for `torch.cuda.device`: a context manager that selects nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def replace_cuda() -> None:
    """Replaces what mamba-ssm's Python code wants of CUDA; the autotuner keeps each kernel's first configuration."""
    for name in ("selective_scan_cuda", "causal_conv1d_cuda"):
        sys.modules[name] = types.ModuleType(name)
    cuda: Any = torch.cuda
    cuda.device = NoDevice
    cuda.get_device_properties = lambda *_: types.SimpleNamespace(multi_processor_count=1, warp_size=32)
    autotune = triton.autotune
    triton.autotune = lambda configs, key, **options: autotune(configs[:1], key, **options)


def operands() -> list[Tensor]:
    """x, dt, A, B, C, D and the initial state, fp32 with gradients."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    values = [
        randn(NUM_TOKENS, NUM_HEADS, HEAD_DIM),
        randn(NUM_TOKENS, NUM_HEADS).sub(2).exp(),
        -randn(NUM_HEADS).exp(),
        0.3 * randn(NUM_TOKENS, NUM_GROUPS, STATE_SIZE),
        0.3 * randn(NUM_TOKENS, NUM_GROUPS, STATE_SIZE),
        randn(NUM_HEADS),
        randn(NUM_HEADS, HEAD_DIM, STATE_SIZE),
    ]
    return [value.requires_grad_() for value in values]


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute expected value."""
    found, expected = found.detach(), expected.detach()
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def gradients(y: Tensor, state: Tensor, values: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a sum in which every output has a weight of its own."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(out.shape, generator=generator).to(out.dtype) for out in (y, state)]
    return torch.autograd.grad((y * weights[0]).sum() + (state * weights[1]).sum(), values)


def naive_scan_differences() -> dict[str, float]:
    """`mamba_chunk_scan_combined` and the recurrence, one token at a time in fp64."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    values = [value.detach() for value in operands()]
    x, dt, A, B, C, D, initial = values
    y, state = mamba_chunk_scan_combined(
        *(x[None], dt[None], A, B[None], C[None], CHUNK_SIZE),
        D=D,
        initial_states=initial[None],
        return_final_states=True,
    )
    expected_y, expected_state = slow_scan(*(value.double() for value in values))
    return {"naive y": difference(y[0], expected_y), "naive state": difference(state[0], expected_state)}


def packed_scan_differences() -> dict[str, float]:
    """`kernel_scan` over packed segments, in pieces that carry the state, and `ssd_scan` over the whole."""
    values = operands()
    *scanned, D, initial = values
    seq_idx = torch.repeat_interleave(torch.arange(len(SEGMENT_LENGTHS)), torch.tensor(SEGMENT_LENGTHS))
    options: dict[str, Any] = {"D_H": D, "chunk_size": CHUNK_SIZE, "initial_state_HPN": initial, "seq_idx_T": seq_idx}
    y, state = scan_in_chunks(kernel_scan, *scanned, **options, max_tokens=CHUNK_SIZE)
    expected_y, expected_state = ssd_scan(*scanned, **options)
    found = {"packed y": difference(y, expected_y), "packed state": difference(state, expected_state)}
    pairs = zip(OPERANDS, gradients(y, state, values), gradients(expected_y, expected_state, values), strict=True)
    return found | {f"packed gradient of {name}": difference(own, expected) for name, own, expected in pairs}


def step_differences() -> dict[str, float]:
    """`kernel_scan_step` and `ssd_step`, three tokens of two sequences."""
    x, dt, A, B, C, D, initial = (value.detach() for value in operands())
    state = torch.stack([initial, 2 * initial])
    expected_state, worst = state.clone(), 0.0
    for token in range(0, 6, 2):
        two = slice(token, token + 2)
        y = kernel_scan_step(x[two], dt[two], A, B[two], C[two], D_H=D, state_BHPN=state)
        expected = ssd_step(x[two], dt[two], A, B[two], C[two], D_H=D, state_BHPN=expected_state)
        worst = max(worst, difference(y, expected))
    return {"step y": worst, "step state": difference(state, expected_state)}


if __name__ == "__main__":
    replace_cuda()
    json.dump(naive_scan_differences() | packed_scan_differences() | step_differences(), sys.stdout)
