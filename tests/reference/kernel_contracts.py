"""Three CUDA kernels in plain torch, with assertions on how they must be called.

Written from the packages' documentation and source (state-spaces/mamba, Dao-AILab/causal-conv1d, torch 2.13).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from reference.slow_scan import slow_conv_silu, slow_scan
from timeviper_model.ops import kernels


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_states: bool = False,
) -> tuple[Tensor, Tensor]:
    """(1, T, H, P) in the dtype of `x` and the fp32 last state; the initial state belongs to segment 0 only."""
    assert x.shape[:2] == dt.shape[:2] == B.shape[:2] == C.shape[:2]
    assert len(x) == 1
    assert x.shape[1]
    assert return_final_states
    initial = None if initial_states is None else initial_states[0]
    assert initial is None or initial.dtype == torch.float32
    if seq_idx is not None:
        assert seq_idx.shape == x.shape[:2]
        assert seq_idx.dtype == torch.int32
        assert seq_idx.is_contiguous()
        initial = initial if seq_idx[0, 0] == 0 else None
    operands = (tensor[0].float() for tensor in (x, dt, B, C))
    x_THP, dt_TH, B_TGN, C_TGN = operands
    y, last = slow_scan(x_THP, dt_TH, A, B_TGN, C_TGN, D, initial, None if seq_idx is None else seq_idx[0])
    return y[None].to(x.dtype), last[None]


def causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, seq_idx: Tensor, activation: str
) -> Tensor:
    """(1, D, T), channels last, rows and their first element at multiples of eight elements."""
    assert x.shape[2]
    assert x.stride(1) == 1
    assert x.shape[2] * x.stride(2) <= kernels.MAX_OFFSET
    assert x.stride(2) % 8 == 0
    assert x.storage_offset() % 8 == 0
    assert seq_idx.shape == (1, x.shape[2])
    assert seq_idx.dtype == torch.int32
    assert seq_idx.is_contiguous()
    assert activation == "silu"
    ids = seq_idx[0].tolist()
    positions = [sum(ids[j] == own for j in range(t)) for t, own in enumerate(ids)]
    rows = slow_conv_silu(x[0].t(), weight, bias if bias is not None else 0 * weight[:, 0], torch.tensor(positions))
    return rows.t()[None]


def selective_state_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor
) -> Tensor:
    """(B, H, P) in the dtype of `x`; updates the fp32 `state`. Heads are tied: one dt, A, D and bias a head."""
    batch, heads, dim, size = state.shape
    assert x.shape == dt.shape == (batch, heads, dim)
    assert A.shape == (heads, dim, size)
    assert D.shape == dt_bias.shape == (heads, dim)
    assert dt.stride(-1) == A.stride(-1) == A.stride(-2) == dt_bias.stride(-1) == D.stride(-1) == 0
    assert state.dtype == dt.dtype == torch.float32
    repeats = heads // B.shape[1]
    B_BHN, C_BHN = (each.float().repeat_interleave(repeats, 1) for each in (B, C))
    step = (dt + dt_bias)[..., None]
    state.copy_(state * torch.exp(step * A) + step * x.float()[..., None] * B_BHN[:, :, None])
    return ((state * C_BHN[:, :, None]).sum(-1) + D * x.float()).to(x.dtype)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:
    """(B, D); shifts `conv_state` (B, D, K - 1)."""
    assert conv_state.shape == (*x.shape, weight.shape[1] - 1)
    assert conv_state.dtype == x.dtype
    assert activation == "silu"
    assert cache_seqlens is None
    taps = torch.cat([conv_state, x[..., None]], dim=-1)
    conv_state.copy_(taps[..., 1:])
    mixed = (taps.float() * weight.float()).sum(-1)
    return F.silu(mixed if bias is None else mixed + bias.float()).to(x.dtype)


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """(T, H, E): attention inside each sequence, causal for the window (-1, 0)."""
    assert len(query)
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert window_size == (-1, 0)
    ends = cu_seq_q.tolist()
    assert max_q == max_k == max(stop - start for start, stop in pairwise(ends))
    mixed = torch.zeros_like(query)
    for start, stop in pairwise(ends):
        q, k, v = (tensor[start:stop].transpose(0, 1)[None] for tensor in (query, key, value))
        if stop > start:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=enable_gqa)
            mixed[start:stop] = out[0].transpose(0, 1)
    return mixed
