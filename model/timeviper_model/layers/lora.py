"""Low-rank adapters (arXiv 2106.09685, section 4.1)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timeviper_model.ops.linear import Linear
from timeviper_model.ops.output_layer import OutputLayer

LORA_A, LORA_B = "lora_A", "lora_B"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    rank: int = 16
    alpha: float = 32.0
    """Numerator of the adapter's scale, alpha / rank."""
    targets: str = r"backbone\.layers\.\d+\.mixer\.(in_proj|out_proj|q_proj|k_proj|v_proj|o_proj)"
    """Regular expression for whole module names."""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"{self.rank = } must be at least 1 and {self.alpha = } more than 0")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(f"targets: {self.targets!r} is not a regular expression: {error}") from error

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class LoraLinear(Linear):
    """`x W^T + scale * (x A^T) B^T`; W keeps its name."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, linear: nn.Linear, config: LoraConfig) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = config.scale
        like = linear.weight
        self.lora_A = nn.Parameter(torch.empty(config.rank, self.in_features, dtype=like.dtype, device=like.device))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, config.rank, dtype=like.dtype, device=like.device))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


class LoraOutputLayer(OutputLayer, LoraLinear):
    """An adapted output matrix."""


def add_lora(model: nn.Module, config: LoraConfig, generator: torch.Generator) -> list[str]:
    """Adapts matching modules and returns their names.

    A is uniform with Kaiming's bound for a = sqrt(5), as in the authors' code; B is zero.
    """
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and re.fullmatch(config.targets, n)]
    if not names:
        kinds = sorted({re.sub(r"\.\d+\.", ".*.", n) for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ValueError(f"lora.targets: {config.targets!r} matches no linear module; there are {', '.join(kinds)}")
    for name in names:
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        adapted = (LoraOutputLayer if isinstance(linear, OutputLayer) else LoraLinear)(linear, config)
        if not adapted.lora_A.is_meta:
            bound = 1.0 / math.sqrt(adapted.in_features)
            with torch.no_grad():
                adapted.lora_A.uniform_(-bound, bound, generator=generator)
                adapted.lora_B.zero_()
        setattr(model.get_submodule(parent), child, adapted)
    return names


def merge_lora(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Returns the plain model's `W + scale * B A`."""
    merged = {name: tensor for name, tensor in tensors.items() if not name.endswith((f".{LORA_A}", f".{LORA_B}"))}
    for name, a in tensors.items():
        if name.endswith(f".{LORA_A}"):
            module = name.removesuffix(f".{LORA_A}")
            weight = tensors[f"{module}.weight"]
            product = scale * (tensors[f"{module}.{LORA_B}"].double() @ a.double())
            merged[f"{module}.weight"] = (weight.double() + product).to(weight.dtype)
    return merged
