"""Root-mean-square norms: of hidden states, and of groups of gated channels inside Mamba-2.

Knows tensors alone. On a CPU the gradient is written out and taken in cache-sized blocks: autograd's own walks over
fresh memory six times and took twice as long as the matrix product beside it. Elsewhere PyTorch's norm.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCK_ELEMENTS = 2**17
"""elements handled at one time: half a MiB in fp32"""


class RMSNorm(nn.Module):
    """Norm with a scale, in fp32 inside."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)"""
        return rms_norm(x.unsqueeze(-2), self.weight[None], self.eps).squeeze(-2)


class GatedRMSNorm(nn.Module):
    """`RMSNorm(x * silu(gate))` with the mean square taken in each group apart, then scaled."""

    def __init__(self, size: int, num_groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.num_groups = num_groups
        self.eps = eps

    def forward(self, x_TD: Tensor, gate_TD: Tensor) -> Tensor:
        """(T, D) in the gate's dtype; computed in that of `x_TD` (fp32)."""
        gated = x_TD * F.silu(gate_TD.to(x_TD.dtype))
        grouped = gated.view(len(gated), self.num_groups, gated.shape[1] // self.num_groups)
        weight = self.weight.view(self.num_groups, -1).to(x_TD.dtype)
        return rms_norm(grouped, weight, self.eps).flatten(1).to(gate_TD.dtype)


def rms_norm(x: Tensor, weight_GD: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension of (..., G, D)."""
    if x.device.type == "cpu":
        if not torch.is_grad_enabled():
            return _normed(x, weight_GD, eps)  # the function around it would cost a decoded token as much again
        y: Tensor = _RMSNorm.apply(x, weight_GD, eps)  # type: ignore[no-untyped-call]
        return y
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (F.rms_norm(x.to(dtype), x.shape[-1:], eps=eps) * weight_GD.to(dtype)).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_GD: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight_GD)
        ctx.eps = eps
        return _normed(x, weight_GD, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_GD = ctx.saved_tensors
        x_MGD, dy_MGD = (tensor.reshape(-1, *weight_GD.shape) for tensor in (x, grads[0]))
        weight = _wide(weight_GD)
        dx, dweight = torch.empty(x.shape, dtype=x.dtype), torch.zeros_like(weight)
        dx_MGD = dx.view(-1, *weight_GD.shape)
        for part in _blocks(x_MGD):
            block, dy = _wide(x_MGD[part]), _wide(dy_MGD[part])
            inverse = _inverse_rms(block, ctx.eps)
            normed = block * inverse
            dweight += (dy * normed).sum(0)
            scaled = dy * weight
            along = (scaled * normed).mean(-1, keepdim=True)
            dx_MGD[part] = scaled.addcmul_(normed, along, value=-1).mul_(inverse)
        return dx, dweight.to(weight_GD.dtype), None


def _normed(x: Tensor, weight_GD: Tensor, eps: float) -> Tensor:
    if x.numel() <= BLOCK_ELEMENTS:
        block = _wide(x)
        return (block * _inverse_rms(block, eps)).mul_(_wide(weight_GD)).to(x.dtype)
    y = torch.empty(x.shape, dtype=x.dtype)
    x_MGD, y_MGD = x.reshape(-1, *weight_GD.shape), y.view(-1, *weight_GD.shape)
    weight = _wide(weight_GD)
    for part in _blocks(x_MGD):
        block = _wide(x_MGD[part])
        y_MGD[part] = (block * _inverse_rms(block, eps)).mul_(weight)
    return y


def _wide(x: Tensor) -> Tensor:
    """At least fp32; the tensor itself where it is."""
    return x if x.dtype == torch.float64 else x.float()


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    # the fewest operations that say it; a number as operand would become a tensor of its own each time
    squares = torch.linalg.vecdot(x, x).unsqueeze(-1)
    return torch.add(_constant(eps, x.dtype), squares, alpha=1 / x.shape[-1]).rsqrt_()


@lru_cache(maxsize=16)
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # else no graph could hold it later
        return torch.tensor(value, dtype=dtype, device="cpu")


def _blocks(x_MGD: Tensor) -> list[slice]:
    length = max(1, BLOCK_ELEMENTS // max(1, x_MGD[:1].numel()))
    return [slice(start, start + length) for start in range(0, len(x_MGD), length)]
