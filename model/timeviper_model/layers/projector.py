"""Projection of vision features to the language model's width (paper section 3.2).

Order of two towers' tokens within a frame, narrower ones zero-padded:

    equal counts  abababab      otherwise  aaaabb
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timeviper_model.batching.shapes import put_rows, take_rows
from timeviper_model.config import VisionConfig
from timeviper_model.ops.linear import Linear


class Projector(nn.Module):
    """Linear, GELU, Linear, with biases; no norm."""

    def __init__(self, vision_size: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = Linear(vision_size, hidden_size)
        self.fc2 = Linear(hidden_size, hidden_size)

    def forward(self, features_VD: Tensor, rows_V: Tensor) -> Tensor:
        projected: Tensor = self.fc2(F.gelu(self.fc1(features_VD)))
        return projected


class TwoTowerProjector(nn.Module):
    def __init__(self, vision: VisionConfig, hidden_size: int) -> None:
        super().__init__()
        assert vision.second is not None
        self.sizes = (vision.hidden_size, vision.second.hidden_size)
        self.first, self.second = (Projector(size, hidden_size) for size in self.sizes)
        self.order = tower_order(vision.num_tokens_per_frame, vision.second.num_tokens_per_frame)

    def forward(self, features_VD: Tensor, rows_V: Tensor) -> Tensor:
        """(V, hidden_size); `rows_V` index the pack's features, which hold whole frames."""
        tower_V = torch.tensor(self.order, device=rows_V.device)[rows_V % len(self.order)]
        projected = torch.zeros((), device=features_VD.device, dtype=features_VD.dtype)
        for tower, (projector, size) in enumerate(zip((self.first, self.second), self.sizes, strict=True)):
            index = (tower_V == tower).nonzero().squeeze(1)
            tokens = projector(take_rows(features_VD, index)[:, :size], rows_V)
            projected = projected + put_rows(tokens, index, len(features_VD))
        return projected


def make_projector(vision: VisionConfig, hidden_size: int) -> Projector | TwoTowerProjector:
    if vision.second is None:
        return Projector(vision.hidden_size, hidden_size)
    return TwoTowerProjector(vision, hidden_size)


def combine_towers(first_FND: Tensor, second_FND: Tensor) -> Tensor:
    """(F, N1 + N2, max(D1, D2))"""
    width = max(first_FND.shape[2], second_FND.shape[2])
    both = [F.pad(tokens, (0, width - tokens.shape[2])) for tokens in (first_FND, second_FND)]
    order = torch.tensor(tower_order(first_FND.shape[1], second_FND.shape[1]), device=first_FND.device)
    return torch.cat(both, dim=1)[:, order.argsort(stable=True).argsort()]


def tower_order(num_first: int, num_second: int) -> list[int]:
    """Tower of each token of a frame."""
    if num_first == num_second:
        return [0, 1] * num_first
    return [0] * num_first + [1] * num_second
