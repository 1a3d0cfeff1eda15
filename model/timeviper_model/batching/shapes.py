"""Letters for tensor dimensions in names (`x_TD`) and comments, and moves of rows.

T  tokens of a pack           L  tokens of a row or segment
S  segments                   R  padded rows
D  hidden_size                V  vision rows, or vocabulary in `logits_BV`
H  heads                      P  Mamba head_dim
G  groups sharing B and C     N  ssm_state_size
C  tokens of a chunk          Z  chunks of a scan
E  attention head_dim         K  convolution taps
B  slots decoded together
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Returns `x[index]` for DISTINCT indices (K,); its backward copies instead of accumulating."""
    taken: Tensor = _TakeRows.apply(x, index)  # type: ignore[no-untyped-call]
    return taken


def put_rows(x: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """Puts `x` (K, ...) at DISTINCT rows of zeros (num_rows, ...)."""
    put: Tensor = _PutRows.apply(x, index, num_rows)  # type: ignore[no-untyped-call]
    return put


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        return put_rows(grads[0], index, ctx.num_rows), None


class _PutRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(index)
        rows = x.new_zeros((num_rows, *x.shape[1:]))
        return rows.index_copy_(0, index, x) if len(index) else rows  # index_copy_ rejects an empty copy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        return take_rows(grads[0], index), None, None
