"""A linear map that a CPU multiplies with oneDNN where no gradient is kept; everything else is PyTorch's own.

Knows one product. PyTorch gives fp32 products on x86 to MKL, which on AMD's processors leaves their widest registers
idle. On one core of an EPYC with AVX-512, oneDNN, which PyTorch brings along, was 2.1 times as fast for 512 tokens, 1.1
to 2.2 times for 8 to 32, and 1.2 for a single one; below MIN_PRODUCTS its call costs more than it saves. A weight laid
out as its kernels read it (`pack_linears`) takes 0.6 to 0.7 of that for 8 to 32 tokens, and its memory once more.
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

    _packed: tuple[Tensor, int, int] | None = None
    """the weight in oneDNN's layout; address and version of the one that it was made from"""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)"""
        packed = self._packed
        if packed is None or _identity(self.weight) != packed[1:]:
            return linear(x, self.weight, self.bias)
        return linear(x, self.weight, self.bias, packed=packed[0])

    def pack(self) -> None:
        """Keeps the weight in oneDNN's layout as well; of no effect for other devices and dtypes. A weight that changes
        after that is used as it is."""
        weight = self.weight.detach()
        if _onednn is not None and weight.device.type == "cpu" and weight.dtype == torch.float32:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight), *_identity(weight)

    def __getstate__(self) -> dict[str, Any]:
        """Without what `pack` keeps, which is nothing to copy or to write."""
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}


def _identity(weight: Tensor) -> tuple[int, int]:
    """Address and version; tensors made in inference mode have none and count as final."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


def pack_linears(model: nn.Module) -> None:
    """`Linear.pack` of every Linear of a model whose weights change no more."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.pack()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, packed: Tensor | None = None) -> Tensor:
    """`F.linear`, by whatever is faster; `packed` is the weight in oneDNN's layout."""
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
