"""Root-mean-square norms. On a CPU the gradient runs in cache-sized blocks; autograd's takes longer."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timeviper_model.ops.precision import widen

BLOCK_ELEMENTS = 2**17
"""Half a MiB in fp32."""


class RMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x.unsqueeze(-2), self.weight[None], self.eps).squeeze(-2)


class GatedRMSNorm(nn.Module):
    """`RMSNorm(x * silu(gate))` with a mean square per group."""

    def __init__(self, size: int, num_groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.num_groups = num_groups
        self.eps = eps

    def forward(self, x_TD: Tensor, gate_TD: Tensor) -> Tensor:
        """Computes in the dtype of `x_TD`; returns the gate's."""
        gated = x_TD * F.silu(gate_TD.to(x_TD.dtype))
        grouped = gated.view(len(gated), self.num_groups, gated.shape[1] // self.num_groups)
        weight = self.weight.view(self.num_groups, -1).to(x_TD.dtype)
        return rms_norm(grouped, weight, self.eps).flatten(1).to(gate_TD.dtype)


def rms_norm(x: Tensor, weight_GD: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension."""
    if x.device.type == "cpu":
        if not torch.is_grad_enabled():
            return _normed(x, weight_GD, eps)  # without the autograd function, which doubles the time for one token
        y: Tensor = _RMSNorm.apply(x, weight_GD, eps)  # type: ignore[no-untyped-call]
        return y
    wide = widen(x)
    return (F.rms_norm(wide, x.shape[-1:], eps=eps) * weight_GD.to(wide.dtype)).to(x.dtype)


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
        weight = widen(weight_GD)
        dx, dweight = torch.empty(x.shape, dtype=x.dtype), torch.zeros_like(weight)
        dx_MGD = dx.view(-1, *weight_GD.shape)
        for rows in _blocks(x_MGD):
            block, dy = widen(x_MGD[rows]), widen(dy_MGD[rows])
            inverse = _inverse_rms(block, ctx.eps)
            normed = block * inverse
            dweight += (dy * normed).sum(0)
            scaled = dy * weight
            along = (scaled * normed).mean(-1, keepdim=True)
            dx_MGD[rows] = scaled.addcmul_(normed, along, value=-1).mul_(inverse)
        return dx, dweight.to(weight_GD.dtype), None


def _normed(x: Tensor, weight_GD: Tensor, eps: float) -> Tensor:
    if x.numel() <= BLOCK_ELEMENTS:
        block = widen(x)
        return (block * _inverse_rms(block, eps)).mul_(widen(weight_GD)).to(x.dtype)
    y = torch.empty(x.shape, dtype=x.dtype)
    x_MGD, y_MGD = x.reshape(-1, *weight_GD.shape), y.view(-1, *weight_GD.shape)
    weight = widen(weight_GD)
    for rows in _blocks(x_MGD):
        block = widen(x_MGD[rows])
        y_MGD[rows] = (block * _inverse_rms(block, eps)).mul_(weight)
    return y


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    # a Python number would become a tensor in each call
    squares = torch.linalg.vecdot(x, x).unsqueeze(-1)
    return torch.add(_constant(eps, x.dtype), squares, alpha=1 / x.shape[-1]).rsqrt_()


@lru_cache(maxsize=16)
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be saved for backward
        return torch.tensor(value, dtype=dtype, device="cpu")


def _blocks(x_MGD: Tensor) -> list[slice]:
    length = max(1, BLOCK_ELEMENTS // max(1, x_MGD[:1].numel()))
    return [slice(start, start + length) for start in range(0, len(x_MGD), length)]
