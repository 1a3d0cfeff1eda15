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
    """(1, T, H, P) in the dtype of `x` and the last state; the initial state belongs to segment 0 only."""
    assert x.shape[:2] == dt.shape[:2] == B.shape[:2] == C.shape[:2]
    assert len(x) == 1
    assert x.shape[1]
    assert return_final_states
    initial = None if initial_states is None else initial_states[0]
    if seq_idx is not None:
        assert seq_idx.shape == x.shape[:2]
        assert seq_idx.dtype == torch.int32
        assert seq_idx.is_contiguous()
        initial = initial if seq_idx[0, 0] == 0 else None
    y, last = slow_scan(x[0], dt[0], A, B[0], C[0], D, initial, None if seq_idx is None else seq_idx[0])
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
