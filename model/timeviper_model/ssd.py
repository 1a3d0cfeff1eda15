"""The Mamba-2 recurrence (state space duality, arXiv 2405.21060): a chunked scan for sequences, one step for decoding.

    h_t = exp(dt_t A) h_(t-1) + dt_t B_t x_t          y_t = C_t h_t + D x_t          (per head; h is P x N)

Knows tensors alone: not configurations, caches or samples beyond `seq_idx`. Inside a chunk the recurrence is a masked
matrix product, done for all chunks at once; from chunk to chunk only the state is carried, so time and memory are
linear in length. Everything runs in fp32 (float64 for float64 input) and no exponent is ever positive. The backward
pass is written out: it recomputes the C x C matrices instead of keeping them, and takes the gradient of the decays
from inner products of size T x H (see `_decay_gradient`) where autograd would walk over every matrix again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

PIECE_ELEMENTS = 2**18
"""elements of the C x C matrices computed at one time: 1 MiB in fp32, so that they stay in a core's cache"""


def ssd_scan(
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
    """Outputs and last state of the recurrence over T tokens (arXiv 2405.21060, section 6, listing 1).

    Args:
        x_THP: inputs.
        dt_TH: step sizes >= 0, after softplus and clamping.
        A_H: negative decay rates.
        B_TGN: input projections; head h uses group h // (H / G).
        C_TGN: output projections.
        D_H: skip connection.
        chunk_size: tokens handled by one matrix product; changes speed, not results.
        initial_state_HPN: state before the first token, which belongs to the first segment; default zeros.
        seq_idx_T: integers; the state is reset wherever they change. None = one segment.

    Returns:
        y (T, H, P) and the state after the last token (H, P, N), both fp32 (float64 for float64 `x_THP`).
    """
    dtype = torch.float64 if x_THP.dtype == torch.float64 else torch.float32
    x, dt, A, B, C, D = (tensor.to(dtype) for tensor in (x_THP, dt_TH, A_H, B_TGN, C_TGN, D_H))
    (num_tokens, num_heads, head_dim), state_size = x.shape, B.shape[-1]
    state = x.new_zeros(num_heads, head_dim, state_size) if initial_state_HPN is None else initial_state_HPN.to(dtype)
    chunk = max(1, min(chunk_size, num_tokens))
    piece = max(1, PIECE_ELEMENTS // (num_heads * chunk * chunk)) * chunk
    outputs = []
    pieces = zip(*(tensor.split(piece) for tensor in (x, dt, B, C)), strict=True)
    for start, (x_piece, dt_piece, B_piece, C_piece) in zip(range(0, num_tokens, piece), pieces, strict=True):
        seq_idx = None if seq_idx_T is None else seq_idx_T[max(start - 1, 0) : start + piece]
        if seq_idx is not None and start == 0:
            seq_idx = torch.cat([seq_idx[:1], seq_idx])  # the initial state is the first segment's
        y, state = _ScanPiece.apply(x_piece, dt_piece, A, B_piece, C_piece, D, state, chunk, seq_idx)
        outputs.append(y)
    return torch.cat(outputs) if len(outputs) != 1 else outputs[0], state


def ssd_step(
    x_BHP: Tensor, dt_BH: Tensor, A_H: Tensor, B_BGN: Tensor, C_BGN: Tensor, *, D_H: Tensor, state_BHPN: Tensor
) -> Tensor:
    """One token for each of B sequences: updates `state_BHPN` (fp32) in place and returns y (B, H, P) in its dtype."""
    dtype = state_BHPN.dtype
    x, dt = x_BHP.to(dtype), dt_BH.to(dtype)
    heads_per_group = x.shape[1] // B_BGN.shape[1]
    B_BHN = B_BGN.to(dtype).repeat_interleave(heads_per_group, dim=1)
    C_BHN = C_BGN.to(dtype).repeat_interleave(heads_per_group, dim=1)
    state_BHPN.mul_(torch.exp(dt * A_H.to(dtype))[..., None, None])
    state_BHPN.addcmul_((x * dt[..., None])[..., None], B_BHN[:, :, None, :])
    return (state_BHPN @ C_BHN[..., None]).squeeze(-1) + D_H.to(dtype)[:, None] * x


class _Decays(NamedTuple):
    """Products of decays, all <= 1; zero where the segment changes in between."""

    within_ZHCC: Tensor
    """from token s (last axis) to token l >= s of the same chunk"""
    enter_ZHC: Tensor
    """from the state before the chunk to token l"""
    leave_ZHC: Tensor
    """from token s to the state after the chunk"""
    through_ZH: Tensor
    """from the state before to the state after the chunk"""


def _decays(dt_ZHC: Tensor, A_H: Tensor, seq_idx: Tensor | None) -> _Decays:
    num_chunks, _, chunk = dt_ZHC.shape
    log_ZHC = (dt_ZHC * A_H[:, None]).cumsum(-1)
    keep = torch.ones(chunk, chunk, dtype=torch.bool, device=dt_ZHC.device).tril_()
    within = log_ZHC[..., :, None] - log_ZHC[..., None, :]
    enter, leave = log_ZHC.exp(), (log_ZHC[..., -1:] - log_ZHC).exp_()
    if seq_idx is None:
        within.masked_fill_(~keep, -torch.inf)
        return _Decays(within.exp_(), enter, leave, enter[..., -1])
    padded = F.pad(seq_idx, (0, num_chunks * chunk + 1 - len(seq_idx)), value=0)
    padded[len(seq_idx) :] = seq_idx[-1]
    seq_ZC, before_Z1 = padded[1:].view(num_chunks, chunk), padded[:-1].view(num_chunks, chunk)[:, :1]
    keep_ZCC = keep & (seq_ZC[:, :, None] == seq_ZC[:, None, :])
    within.masked_fill_(~keep_ZCC[:, None], -torch.inf)
    enter.mul_((seq_ZC == before_Z1)[:, None])
    leave.mul_((seq_ZC == seq_ZC[:, -1:])[:, None])
    return _Decays(within.exp_(), enter, leave, enter[..., -1])


class _Chunked(NamedTuple):
    """The operands of a piece cut into Z chunks, in the layouts the matrix products want; r = heads per group."""

    xdt_ZHCP: Tensor
    xdt_leave_ZGCrP: Tensor
    """dt * x decayed to the end of its chunk"""
    B_ZGCN: Tensor
    C_ZGCN: Tensor
    decays: _Decays
    mix_ZHCC: Tensor
    """the quadratic form of the chunk: (C_l . B_s) * decay"""


def _chunked(x_ZCHP: Tensor, dt_ZCH: Tensor, A: Tensor, B_ZCGN: Tensor, C_ZCGN: Tensor, seq: Tensor | None) -> _Chunked:
    Z, C, H, P = x_ZCHP.shape
    G = B_ZCGN.shape[2]
    dt_ZHC = dt_ZCH.transpose(1, 2).contiguous()
    decays = _decays(dt_ZHC, A, seq)
    xdt = x_ZCHP.new_empty(Z, H, C, P)
    torch.mul(x_ZCHP.transpose(1, 2), dt_ZHC[..., None], out=xdt)
    xdt_leave = x_ZCHP.new_empty(Z, G, C, H // G, P)
    weight = (dt_ZHC * decays.leave_ZHC).view(Z, G, H // G, C, 1).transpose(2, 3)
    torch.mul(x_ZCHP.view(Z, C, G, H // G, P).transpose(1, 2), weight, out=xdt_leave)
    B, C_ = (tensor.transpose(1, 2).contiguous() for tensor in (B_ZCGN, C_ZCGN))
    products_ZGCC = C_ @ B.transpose(-1, -2)
    mix = decays.within_ZHCC.view(Z, G, H // G, C, C) * products_ZGCC[:, :, None]
    return _Chunked(xdt, xdt_leave, B, C_, decays, mix.view(Z, H, C, C))


def _carry(added_ZGNrP: Tensor, through_ZH: Tensor, first_HPN: Tensor) -> Tensor:
    """(Z + 1, G, N, r, P): the state before each chunk, and the last one; the only loop over chunks."""
    Z, G, N, r, P = added_ZGNrP.shape
    states = added_ZGNrP.new_empty(Z + 1, G, N, r, P)
    states[0] = first_HPN.view(G, r, P, N).permute(0, 3, 1, 2)
    through = through_ZH.view(Z, G, 1, r, 1)
    for z in range(Z):
        torch.addcmul(added_ZGNrP[z], states[z], through[z], out=states[z + 1])
    return states


def _to_heads(state_GNrP: Tensor) -> Tensor:
    G, N, r, P = state_GNrP.shape
    return state_GNrP.permute(0, 2, 3, 1).reshape(G * r, P, N)


class _ScanPiece(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_THP: Tensor,
        dt_TH: Tensor,
        A_H: Tensor,
        B_TGN: Tensor,
        C_TGN: Tensor,
        D_H: Tensor,
        state_HPN: Tensor,
        chunk: int,
        seq_idx: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        x, dt, B, C = (_cut(tensor, chunk) for tensor in (x_THP, dt_TH, B_TGN, C_TGN))
        parts = _chunked(x, dt, A_H, B, C, seq_idx)
        Z, G, C_, r, P = parts.xdt_leave_ZGCrP.shape
        added = parts.B_ZGCN.transpose(-1, -2) @ parts.xdt_leave_ZGCrP.view(Z, G, C_, r * P)
        states = _carry(added.view(Z, G, -1, r, P), parts.decays.through_ZH, state_HPN)
        from_state = (parts.C_ZGCN @ states[:-1].view(Z, G, -1, r * P)).view(Z, G, C_, r, P)
        y = x.new_empty(Z, C_, G * r, P)
        enter = parts.decays.enter_ZHC.view(Z, G, r, C_, 1).permute(0, 3, 1, 2, 4)
        torch.mul(from_state.transpose(1, 2), enter, out=y.view(Z, C_, G, r, P))
        y += (parts.mix_ZHCC @ parts.xdt_ZHCP).transpose(1, 2)
        y.addcmul_(x, D_H[:, None])
        y_THP = y.view(Z * C_, G * r, P)[: len(x_THP)]
        ctx.save_for_backward(x_THP, dt_TH, A_H, B_TGN, C_TGN, D_H, y_THP, states)
        ctx.chunk, ctx.seq_idx = chunk, seq_idx
        return y_THP, _to_heads(states[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_THP, dt_TH, A_H, B_TGN, C_TGN, D_H, y_THP, states = ctx.saved_tensors
        num_tokens, chunk = len(x_THP), ctx.chunk
        x, dt, B, C, y, dy = (_cut(tensor, chunk) for tensor in (x_THP, dt_TH, B_TGN, C_TGN, y_THP, grads[0]))
        parts = _chunked(x, dt, A_H, B, C, ctx.seq_idx)
        dstates = _state_gradients(parts, dy, grads[1])
        dxdt, dB, dC = _operand_gradients(parts, dy, states, dstates)
        dy_x = torch.einsum("zchp,zchp->zch", dy, x)
        dxdt_x = torch.einsum("zchp,zchp->zch", dxdt, x)
        dy_y = torch.einsum("zchp,zchp->zch", dy, y) - D_H * dy_x
        dlog = _decay_gradient(dy_y - dt * dxdt_x, dstates[1:], states[1:])
        ddt = dxdt_x + dlog * A_H
        dx = dxdt.mul_(dt[..., None]).addcmul_(dy, D_H[:, None])
        return (
            _uncut(dx, num_tokens),
            _uncut(ddt, num_tokens),
            (dlog * dt).sum((0, 1)),
            _uncut(dB, num_tokens),
            _uncut(dC, num_tokens),
            dy_x.sum((0, 1)),
            _to_heads(dstates[0]),
            None,
            None,
        )


def _state_gradients(parts: _Chunked, dy_ZCHP: Tensor, dlast_HPN: Tensor) -> Tensor:
    """(Z + 1, G, N, r, P): gradient of the state before each chunk through all that follows, and of the last one."""
    Z, G, C, r, P = parts.xdt_leave_ZGCrP.shape
    dy_enter = dy_ZCHP.new_empty(Z, G, C, r, P)
    enter = parts.decays.enter_ZHC.view(Z, G, r, C, 1).transpose(2, 3)
    torch.mul(dy_ZCHP.view(Z, C, G, r, P).transpose(1, 2), enter, out=dy_enter)
    read = parts.C_ZGCN.transpose(-1, -2) @ dy_enter.view(Z, G, C, r * P)
    backwards = _carry(read.view(Z, G, -1, r, P).flip(0), parts.decays.through_ZH.flip(0), dlast_HPN)
    return backwards.flip(0)


def _operand_gradients(
    parts: _Chunked, dy_ZCHP: Tensor, states: Tensor, dstates: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of dt * x (Z, C, H, P), B and C (Z, C, G, N)."""
    Z, G, C, r, P = parts.xdt_leave_ZGCrP.shape
    dy_ZHCP = dy_ZCHP.transpose(1, 2).contiguous()
    dmix = dy_ZHCP @ parts.xdt_ZHCP.transpose(-1, -2)
    dproducts_ZGCC = dmix.mul_(parts.decays.within_ZHCC).view(Z, G, r, C, C).sum(2)
    enter = parts.decays.enter_ZHC.view(Z, G, r, C, 1).transpose(2, 3)
    dy_enter = torch.mul(dy_ZHCP.view(Z, G, r, C, P).transpose(2, 3), enter).reshape(Z, G, C, r * P)
    dC = dproducts_ZGCC @ parts.B_ZGCN
    dC += dy_enter @ states[:-1].view(Z, G, -1, r * P).transpose(-1, -2)
    dB = dproducts_ZGCC.transpose(-1, -2) @ parts.C_ZGCN
    dlater_ZGNrP = dstates[1:].view(Z, G, -1, r * P)
    dB += parts.xdt_leave_ZGCrP.view(Z, G, C, r * P) @ dlater_ZGNrP.transpose(-1, -2)
    dxdt = dy_ZCHP.new_empty(Z, C, G * r, P)
    leave = parts.decays.leave_ZHC.view(Z, G, r, C, 1).permute(0, 3, 1, 2, 4)
    through_state = (parts.B_ZGCN @ dlater_ZGNrP).view(Z, G, C, r, P).transpose(1, 2)
    torch.mul(through_state, leave, out=dxdt.view(Z, C, G, r, P))
    dxdt += (parts.mix_ZHCC.transpose(-1, -2) @ dy_ZHCP).transpose(1, 2)
    return dxdt, dB.transpose(1, 2), dC.transpose(1, 2)


def _decay_gradient(balance_ZCH: Tensor, dafter: Tensor, after: Tensor) -> Tensor:
    """(Z, C, H): gradient of the log decay dt_t A.

    That decay scales every path from a token s < t to a token l >= t. A token's paths that end in it are worth
    <dy, y>, those that begin in it <d(dt x), dt x>; `balance` is their difference. Its sum from t to the chunk's end,
    plus what leaves through the state after the chunk, counts exactly the paths across t.
    """
    leaving_ZH = (dafter * after).sum((2, 4)).flatten(1)
    return balance_ZCH.flip(1).cumsum(1).flip(1) + leaving_ZH[:, None]


def _cut(x_T: Tensor, chunk: int) -> Tensor:
    """(T, ...) -> (Z, C, ...), zeros after the end: with dt = 0 they neither decay nor add."""
    missing = -len(x_T) % chunk
    if missing:
        x_T = torch.cat([x_T, x_T.new_zeros(missing, *x_T.shape[1:])])
    return x_T.unflatten(0, (-1, chunk))


def _uncut(x_ZC: Tensor, num_tokens: int) -> Tensor:
    return x_ZC.flatten(0, 1)[:num_tokens]
