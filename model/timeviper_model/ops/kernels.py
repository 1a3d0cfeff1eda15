"""CUDA kernels with the signatures of the PyTorch implementations.

    kernel_scan       mamba-ssm's mamba_chunk_scan_combined     for ssd_scan
    kernel_conv_silu  causal-conv1d's causal_conv1d_fn          for causal_conv_silu
    varlen_attention  torch's varlen_attn (Flash Attention)     for segment_causal_attention
    kernel_scan_step  mamba-ssm's selective_state_update        for ssd_step
    kernel_conv_step  causal-conv1d's causal_conv1d_update      for causal_conv_silu_step

The first two are silently wrong beyond 32-bit offsets (mamba issue 1015), so long packs are split. States pass in fp32
from call to call and, inside mamba-ssm, from chunk to chunk; the copy that a product reads has the dtype of C.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from timeviper_model.batching.segments import Segments
from timeviper_model.ops.causal_conv import causal_conv_silu
from timeviper_model.ops.ssd import ssd_scan

MAX_OFFSET = 2**31 - 1

CONV_ALIGNMENT = 8
"""Row addresses must be multiples of this many elements."""


class Scan(Protocol):
    def __call__(
        self,
        x_THP: Tensor,
        dt_TH: Tensor,
        A_H: Tensor,
        B_TGN: Tensor,
        C_TGN: Tensor,
        *,
        D_H: Tensor,
        chunk_size: int,
        initial_state_HPN: Tensor | None = None,
        seq_idx_T: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...


class Convolve(Protocol):
    def __call__(
        self,
        x_TD: Tensor,
        weight_DK: Tensor,
        bias_D: Tensor | None,
        *,
        positions_T: Tensor,
        initial_KD: Tensor | None = None,
    ) -> Tensor: ...


class ScanStep(Protocol):
    def __call__(
        self,
        x_BHP: Tensor,
        dt_BH: Tensor,
        A_H: Tensor,
        B_BGN: Tensor,
        C_BGN: Tensor,
        *,
        D_H: Tensor,
        state_BHPN: Tensor,
    ) -> Tensor: ...


class ConvolveStep(Protocol):
    def __call__(self, x_BD: Tensor, weight_DK: Tensor, bias_D: Tensor | None, window_BKD: Tensor) -> Tensor: ...


def kernel_scan(
    x_THP: Tensor,
    dt_TH: Tensor,
    A_H: Tensor,
    B_TGN: Tensor,
    C_TGN: Tensor,
    *,
    D_H: Tensor,
    chunk_size: int,
    initial_state_HPN: Tensor | None = None,
    seq_idx_T: Tensor | None = None,
    max_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`ssd_scan` by mamba-ssm; y is rounded to the dtype of `x_THP`."""
    operands = x_THP, dt_TH, A_H, B_TGN, C_TGN
    options: dict[str, Any] = {"initial_state_HPN": initial_state_HPN, "seq_idx_T": seq_idx_T}
    if not len(x_THP):  # a kernel cannot be launched for no token
        return ssd_scan(*operands, D_H=D_H, chunk_size=chunk_size, **options)
    max_tokens = max_tokens or max_scan_tokens(x_THP, dt_TH, B_TGN, C_TGN, chunk_size)
    return scan_in_chunks(_mamba_ssm_scan, *operands, D_H=D_H, chunk_size=chunk_size, **options, max_tokens=max_tokens)


def scan_in_chunks(
    scan: Scan,
    x_THP: Tensor,
    dt_TH: Tensor,
    A_H: Tensor,
    B_TGN: Tensor,
    C_TGN: Tensor,
    *,
    D_H: Tensor,
    chunk_size: int,
    initial_state_HPN: Tensor | None = None,
    seq_idx_T: Tensor | None = None,
    max_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Carries the state between calls of `scan` for at most `max_tokens` tokens."""
    state, outputs = initial_state_HPN, []
    for start in range(0, len(x_THP), max_tokens):
        chunk = slice(start, start + max_tokens)
        if start and seq_idx_T is not None and bool(seq_idx_T[start] != seq_idx_T[start - 1]):
            state = None  # the chunk begins with a segment
        y, state = scan(
            x_THP[chunk],
            dt_TH[chunk],
            A_H,
            B_TGN[chunk],
            C_TGN[chunk],
            D_H=D_H,
            chunk_size=chunk_size,
            initial_state_HPN=state,
            seq_idx_T=None if seq_idx_T is None else seq_idx_T[chunk],
        )
        outputs.append(y)
    assert state is not None  # there is at least one token
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)), state


def max_scan_tokens(x_THP: Tensor, dt_TH: Tensor, B_TGN: Tensor, C_TGN: Tensor, chunk_size: int) -> int:
    """Tokens that the kernels can address, a multiple of `chunk_size`.

    The widest row decides, among operands and allocations (gradients per head, chunk states, C . B).
    """
    (_, num_heads, head_dim), (_, num_groups, state_size) = x_THP.shape, B_TGN.shape
    return max_tokens_below_limit(
        max(
            *(tensor.stride(0) for tensor in (x_THP, dt_TH, B_TGN, C_TGN)),
            num_heads * head_dim,
            num_heads * state_size,
            -(-num_heads * head_dim * state_size // chunk_size),
            num_groups * chunk_size,
        ),
        multiple_of=chunk_size,
    )


def max_tokens_below_limit(elements_per_token: int, *, multiple_of: int = 1) -> int:
    return max(MAX_OFFSET // elements_per_token // multiple_of, 1) * multiple_of


def _mamba_ssm_scan(
    x_THP: Tensor,
    dt_TH: Tensor,
    A_H: Tensor,
    B_TGN: Tensor,
    C_TGN: Tensor,
    *,
    D_H: Tensor,
    chunk_size: int,
    initial_state_HPN: Tensor | None = None,
    seq_idx_T: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    # the kernel gives the initial state to segment 0
    seq_idx = None if seq_idx_T is None else (seq_idx_T - seq_idx_T[0]).int()[None].contiguous()
    y, last = mamba_chunk_scan_combined(
        x_THP[None],
        dt_TH[None],
        A_H,
        B_TGN[None],
        C_TGN[None],
        chunk_size,
        D=D_H.float(),
        initial_states=None if initial_state_HPN is None else initial_state_HPN[None].contiguous(),
        seq_idx=seq_idx,
        return_final_states=True,
    )
    return y[0].float(), last[0].float()


def kernel_conv_silu(
    x_TD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    *,
    positions_T: Tensor,
    initial_KD: Tensor | None = None,
    max_tokens: int | None = None,
) -> Tensor:
    if not len(x_TD):  # a kernel cannot be launched for no token
        return causal_conv_silu(x_TD, weight_DK, bias_D, positions_T=positions_T)
    if initial_KD is not None and initial_KD.shape[0]:
        joined = torch.cat([initial_KD.to(x_TD.dtype), x_TD])
        positions = torch.arange(len(joined), device=x_TD.device)
        convolved = kernel_conv_silu(joined, weight_DK, bias_D, positions_T=positions, max_tokens=max_tokens)
        return convolved[len(initial_KD) :]
    max_tokens = max_tokens or max_tokens_below_limit(max(x_TD.stride(0), x_TD.shape[1]))
    return conv_in_chunks(_causal_conv1d, x_TD, weight_DK, bias_D, positions_T=positions_T, max_tokens=max_tokens)


def conv_in_chunks(
    convolve: Convolve, x_TD: Tensor, weight_DK: Tensor, bias_D: Tensor | None, *, positions_T: Tensor, max_tokens: int
) -> Tensor:
    """Starts each call K - 1 tokens early."""
    ahead = weight_DK.shape[1] - 1
    outputs = []
    for start in range(0, len(x_TD), max_tokens - ahead):
        first = max(0, start - ahead)
        chunk = slice(first, start + max_tokens - ahead)
        convolved = convolve(x_TD[chunk], weight_DK, bias_D, positions_T=positions_T[chunk])
        outputs.append(convolved[start - first :])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _causal_conv1d(
    x_TD: Tensor, weight_DK: Tensor, bias_D: Tensor | None, *, positions_T: Tensor, initial_KD: Tensor | None = None
) -> Tensor:
    from causal_conv1d import causal_conv1d_fn

    assert initial_KD is None  # prepended by the caller: the kernel does not accept it with seq_idx
    aligned = x_TD.stride(0) % CONV_ALIGNMENT == 0 and x_TD.storage_offset() % CONV_ALIGNMENT == 0
    # seq_idx needs channels last; contiguous() would not copy a single unaligned row
    x_1DT = (x_TD if aligned else x_TD.clone(memory_format=torch.contiguous_format))[None].transpose(1, 2)
    seq_idx = (positions_T == 0).cumsum(0, dtype=torch.int32)[None].contiguous()
    y_1DT: Tensor = causal_conv1d_fn(x_1DT, weight_DK, bias_D, seq_idx=seq_idx, activation="silu")
    return y_1DT.transpose(1, 2)[0]


def kernel_scan_step(
    x_BHP: Tensor, dt_BH: Tensor, A_H: Tensor, B_BGN: Tensor, C_BGN: Tensor, *, D_H: Tensor, state_BHPN: Tensor
) -> Tensor:
    """`ssd_step` by mamba-ssm; y is rounded to the dtype of `x_BHP`."""
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    (num_heads, head_dim), state_size = x_BHP.shape[1:], state_BHPN.shape[-1]
    y: Tensor = selective_state_update(
        state_BHPN,
        x_BHP,
        dt_BH[..., None].expand(-1, -1, head_dim),
        A_H[:, None, None].expand(-1, head_dim, state_size),
        B_BGN,
        C_BGN,
        D=D_H[:, None].expand(-1, head_dim),
        dt_bias=dt_BH.new_zeros(1, 1).expand(num_heads, head_dim),  # required by the kernel for tied heads
    )
    return y.float()


def kernel_conv_step(x_BD: Tensor, weight_DK: Tensor, bias_D: Tensor | None, window_BKD: Tensor) -> Tensor:
    from causal_conv1d import causal_conv1d_update

    y_BD: Tensor = causal_conv1d_update(x_BD, window_BKD.transpose(1, 2), weight_DK, bias_D, activation="silu")
    return y_BD


def varlen_attention(q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, segments: Segments) -> Tensor:
    """`segment_causal_attention` without padded rows."""
    from torch.nn.attention.varlen import varlen_attn

    if not len(q_THE):
        return q_THE + 0.0 * (k_THE.sum() + v_THE.sum())  # keeps every operand in the graph
    ends = segments.lengths_S.cumsum(0, dtype=torch.int32)
    cu_seqlens, longest = torch.nn.functional.pad(ends, (1, 0)), max(segments.lengths)
    mixed = varlen_attn(
        q_THE,
        k_THE,
        v_THE,
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        window_size=(-1, 0),  # causal
        enable_gqa=q_THE.shape[1] != k_THE.shape[1],
    )
    assert isinstance(mixed, Tensor)
    return mixed
