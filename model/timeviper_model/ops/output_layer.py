"""The output matrix, with a cross entropy that never holds all logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from timeviper_model.ops.linear import Linear
from timeviper_model.ops.precision import widen


class OutputLayer(Linear):
    def loss_sum(self, hidden_KD: Tensor, targets_K: Tensor, chunk_length: int) -> Tensor:
        """fp32 cross entropy, from `chunk_length` rows of logits at a time.

        One call of the module, which is a collective under ZeRO-3, however many targets this rank has.
        """
        loss_sum: Tensor = self(hidden_KD, targets_K, chunk_length)
        return loss_sum

    def forward(self, x: Tensor, targets_K: Tensor | None = None, chunk_length: int = 1) -> Tensor:
        if targets_K is None:
            return super().forward(x)
        loss_sum = torch.zeros((), device=x.device)
        for chunk in chunks(x, targets_K, chunk_length):
            if len(chunk[1]) < len(targets_K) and torch.is_grad_enabled():
                loss_sum = loss_sum + checkpoint(self._chunk_loss, *chunk, use_reentrant=False)
            else:
                loss_sum = loss_sum + self._chunk_loss(*chunk)
        return loss_sum

    def _chunk_loss(self, hidden_KD: Tensor, targets_K: Tensor) -> Tensor:
        return F.cross_entropy(widen(super().forward(hidden_KD)), targets_K, reduction="sum")


def chunks(hidden_KD: Tensor, targets_K: Tensor, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields one empty chunk if nothing is labelled."""
    for start in range(0, max(1, len(targets_K)), length):
        yield hidden_KD[start : start + length], targets_K[start : start + length]
