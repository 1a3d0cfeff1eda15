"""The letters that stand for tensor dimensions, and moves of rows between layouts of a batch.

A suffix in a name (`x_TD`) or a trailing comment `# (T, D)` uses these letters and no others:

    T  tokens of a flat pack               L  tokens of a padded row or of one segment
    S  segments (samples) in a pack        R  padded rows
    D  hidden_size                         V  rows of vision features; the vocabulary in `logits_BV`
    H  Mamba heads / attention heads       P  Mamba head_dim          K  taps of the convolution
    G  groups that share B and C           N  ssm_state_size          Z  chunks of the scan
    C  tokens of a chunk                   E  attention head_dim      B  slots decoded together
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """`x[index]` for DISTINCT indices, with a backward that copies instead of accumulating.

    Args:
        x: (M, ...).
        index: (K,) int64, without repeats.
    """
    taken: Tensor = _TakeRows.apply(x, index)  # type: ignore[no-untyped-call]
    return taken


def put_rows(x: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """(num_rows, ...) of zeros with `x` (K, ...) at the DISTINCT rows `index` (K,): the inverse of `take_rows`."""
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
