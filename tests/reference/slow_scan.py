"""Mamba-2's recurrence token by token, and its convolution tap by tap, in the inputs' precision."""

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


def slow_hidden_attention(dt_TH: Tensor, A_H: Tensor, B_TGN: Tensor, C_TGN: Tensor) -> Tensor:
    """(H, T, T): the matrix equivalent to the recurrence of one segment, without D."""
    num_tokens, num_heads = dt_TH.shape
    repeats = num_heads // B_TGN.shape[1]
    B_THN, C_THN = B_TGN.repeat_interleave(repeats, 1), C_TGN.repeat_interleave(repeats, 1)
    matrix = dt_TH.new_zeros(num_heads, num_tokens, num_tokens)
    for j in range(num_tokens):
        decay_H = dt_TH.new_ones(num_heads)
        for i in range(j, num_tokens):
            decay_H = decay_H * (torch.exp(dt_TH[i] * A_H) if i > j else 1.0)
            matrix[:, i, j] = (C_THN[i] * B_THN[j]).sum(-1) * decay_H * dt_TH[j]
    return matrix


def slow_conv_silu(
    x_TD: Tensor, weight_DK: Tensor, bias_D: Tensor, positions_T: Tensor, may_read_TT: Tensor | None = None
) -> Tensor:
    """silu(bias + sum over the taps in the token's own segment, on tokens it may read)."""
    num_taps = weight_DK.shape[1]
    rows = []
    for t, position in enumerate(positions_T.tolist()):
        row = bias_D
        for back in range(min(num_taps - 1, position) + 1):
            if may_read_TT is not None and not may_read_TT[t, t - back]:
                continue
            row = row + weight_DK[:, num_taps - 1 - back] * x_TD[t - back]
        rows.append(row)
    return F.silu(torch.stack(rows))
