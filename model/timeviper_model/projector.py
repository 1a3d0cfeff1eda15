"""The projector: merged vision features to the language model's width (the paper's section 3.2, a two-layer MLP)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Projector(nn.Module):
    """Linear, GELU, Linear, with biases; no norm on its input."""

    def __init__(self, vision_size: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision_size, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features_VD: Tensor) -> Tensor:
        """(V, vision_size) -> (V, hidden_size)"""
        projected: Tensor = self.fc2(F.gelu(self.fc1(features_VD)))
        return projected
