"""Mamba-2's recurrence one token at a time, and its convolution tap by tap: slow, obvious, in the inputs' precision."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def slow_scan(
    x_THP: Tensor,
    dt_TH: Tensor,
    A_H: Tensor,
    B_TGN: Tensor,
    C_TGN: Tensor,
    D_H: Tensor,
    initial_HPN: Tensor | None = None,
    seq_idx_T: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y (T, H, P) and the last state (H, P, N)."""
    num_tokens, num_heads, head_dim = x_THP.shape
    repeats, size = num_heads // B_TGN.shape[1], B_TGN.shape[2]
    state = x_THP.new_zeros(num_heads, head_dim, size) if initial_HPN is None else initial_HPN
    outputs = []
    for t in range(num_tokens):
        if seq_idx_T is not None and t > 0 and seq_idx_T[t] != seq_idx_T[t - 1]:
            state = torch.zeros_like(state)
        B_HN, C_HN = B_TGN[t].repeat_interleave(repeats, 0), C_TGN[t].repeat_interleave(repeats, 0)
        added = dt_TH[t, :, None, None] * x_THP[t, :, :, None] * B_HN[:, None, :]
        state = torch.exp(dt_TH[t] * A_H)[:, None, None] * state + added
        outputs.append((state * C_HN[:, None, :]).sum(-1) + D_H[:, None] * x_THP[t])
    return torch.stack(outputs), state


def slow_conv_silu(x_TD: Tensor, weight_DK: Tensor, bias_D: Tensor, positions_T: Tensor) -> Tensor:
    """silu(bias + sum over the taps that lie in the token's own segment)."""
    num_taps = weight_DK.shape[1]
    rows = []
    for t, position in enumerate(positions_T.tolist()):
        row = bias_D
        for back in range(min(num_taps - 1, position) + 1):
            row = row + weight_DK[:, num_taps - 1 - back] * x_TD[t - back]
        rows.append(row)
    return F.silu(torch.stack(rows))
