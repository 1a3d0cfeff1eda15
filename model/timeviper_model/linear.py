"""A linear map that a CPU multiplies with oneDNN where no gradient is kept; everything else is PyTorch's own.

Knows one product. PyTorch gives fp32 products on x86 to MKL, which on AMD's processors leaves their widest registers
idle. On one core of an EPYC with AVX-512, oneDNN, which PyTorch brings along, was 2.1 times as fast for 512 tokens, 1.1
to 2.2 times for 8 to 32, and 1.2 for a single one; below MIN_PRODUCTS its call costs more than it saves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MIN_PRODUCTS = 2**20
"""multiplications, from which on oneDNN is no slower"""


def _find_onednn() -> Any | None:
    """PyTorch's own entrance to oneDNN's linear map, with no public name; None in a build without it."""
    is_built_in = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if is_built_in else None


_onednn = _find_onednn()


class Linear(nn.Linear):
    """`x W^T + b`, with nn.Linear's parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)"""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, by whatever is faster."""
    if _onednn is None or not _is_for_onednn(x, weight):
        return F.linear(x, weight, bias)
    product: Tensor = _onednn(x, weight, bias, "none", [], "")
    return product


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * len(weight) >= MIN_PRODUCTS
    )
