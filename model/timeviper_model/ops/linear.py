"""Linear maps by oneDNN for CPU inference, else by PyTorch.

On AMD, MKL lacks AVX-512: oneDNN takes half the time for 512 tokens. Packed weights save another third for 8 to 32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MIN_PRODUCTS = 2**20
"""Minimum multiplications for oneDNN; below this its call overhead dominates."""


def _find_onednn() -> Any | None:
    """oneDNN's linear map has no public API."""
    is_built_in = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if is_built_in else None


_onednn = _find_onednn()


class Linear(nn.Linear):
    _packed: tuple[Tensor, int, int] | None = None
    """Weight in oneDNN's layout, with its source's identity."""

    def forward(self, x: Tensor) -> Tensor:
        packed = self._packed
        if packed is None or _identity(self.weight) != packed[1:]:
            return linear(x, self.weight, self.bias)
        return linear(x, self.weight, self.bias, packed=packed[0])

    def pack(self) -> None:
        """Adds a copy in oneDNN's layout, ignored once the weight changes."""
        weight = self.weight.detach()
        if _onednn is not None and weight.device.type == "cpu" and weight.dtype == torch.float32:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight), *_identity(weight)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}


def _identity(weight: Tensor) -> tuple[int, int]:
    """Inference tensors have no version and count as final."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


def pack_linears(model: nn.Module) -> None:
    """Packs every Linear of a model with final weights."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.pack()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, packed: Tensor | None = None) -> Tensor:
    if _onednn is None or not _is_for_onednn(x, weight):
        return F.linear(x, weight, bias)
    product: Tensor = _onednn(x, weight if packed is None else packed, bias, "none", [], "")
    return product


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * len(weight) >= MIN_PRODUCTS
        and bool(torch.backends.mkldnn.enabled)
    )
