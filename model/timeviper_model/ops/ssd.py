"""Mamba-2 recurrence (state space duality, arXiv 2405.21060).

    h_t = exp(dt_t A) h_(t-1) + dt_t B_t x_t      y_t = C_t h_t + D x_t      (per head; h is P x N)

Runs in at least fp32 without positive exponents; sums of log decays are fp64, because only their differences matter.
The backward pass recomputes the C x C matrices.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from timeviper_model.ops.precision import wide_dtype

MATRIX_ELEMENTS = 2**18
"""Elements of C x C matrices at once on a CPU: 1 MiB."""

DEVICE_MATRIX_ELEMENTS = 2**26
"""On a device: 256 MiB, because launches dominate."""

MIN_EXPONENT = -80.0
"""exp(-80) = 2e-35 is negligible; below exp(-87) fp32 is denormal and slow."""


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
    matrix_elements: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Chunked scan (arXiv 2405.21060, section 6, listing 1).

    Args:
        dt_TH: step sizes >= 0, after softplus and clamping.
        A_H: negative decay rates.
        B_TGN: input projections; head h uses group h // (H / G).
        chunk_size: affects speed only, like `matrix_elements`.
        initial_state_HPN: default zeros.
        seq_idx_T: segment numbers; None = one segment.

    Returns:
        y (T, H, P) and the last state (H, P, N), at least fp32.
    """
    dtype = wide_dtype(x_THP.dtype)
    x, dt, A, B, C, D = (tensor.to(dtype) for tensor in (x_THP, dt_TH, A_H, B_TGN, C_TGN, D_H))
    (_, num_heads, head_dim), state_size = x.shape, B.shape[-1]
    state = x.new_zeros(num_heads, head_dim, state_size) if initial_state_HPN is None else initial_state_HPN.to(dtype)
    chunk = chunk_length(chunk_size, state_size, x.device)
    if 0 < len(x) <= chunk and seq_idx_T is None and not torch.is_grad_enabled():
        return _scan_one_chunk(x, dt, A, B, C, D, state)
    runs = chunk_runs(x, chunk, matrix_elements)
    y, last = _Scan.apply(x, dt, A, B, C, D, state, runs, seq_idx_T)  # type: ignore[no-untyped-call]
    return y, last


def chunk_length(chunk_size: int, state_size: int, device: torch.device) -> int:
    """Tokens per chunk: `chunk_size` on a device, at most the state size within 32 to 64 on a CPU.

    Operations per token and head: 2 C (N + P) plus exponentials, and 4 N P for states.
    """
    if device.type != "cpu":
        return chunk_size
    return min(chunk_size, max(32, min(64, state_size)))


def ssd_step(
    x_BHP: Tensor, dt_BH: Tensor, A_H: Tensor, B_BGN: Tensor, C_BGN: Tensor, *, D_H: Tensor, state_BHPN: Tensor
) -> Tensor:
    """(B, H, P); updates `state_BHPN` (fp32)."""
    dtype = state_BHPN.dtype
    x, dt = x_BHP.to(dtype), dt_BH.to(dtype)
    heads_per_group = x.shape[1] // B_BGN.shape[1]
    B_BHN, C_BHN = (
        group_BGN.to(dtype)[:, :, None].expand(-1, -1, heads_per_group, -1).flatten(1, 2)
        for group_BGN in (B_BGN, C_BGN)
    )  # a view for a single group
    state_BHPN.mul_(torch.exp(dt * A_H.to(dtype))[..., None, None])
    state_BHPN.addcmul_((x * dt[..., None])[..., None], B_BHN[:, :, None, :])
    read_BHP = (C_BHN[:, :, None] @ state_BHPN.transpose(-1, -2)).squeeze(-2)  # 2.7 times as fast as state @ C on a CPU
    return read_BHP.addcmul_(D_H.to(dtype)[:, None], x)


def _scan_one_chunk(
    x_THP: Tensor, dt_TH: Tensor, A_H: Tensor, B_TGN: Tensor, C_TGN: Tensor, D_H: Tensor, state_HPN: Tensor
) -> tuple[Tensor, Tensor]:
    """Inference-only path for one chunk: no autograd."""
    (T, H, P), (G, N) = x_THP.shape, B_TGN.shape[1:]
    log_HT = (dt_TH.double() * A_H.double()).t().cumsum(1)
    enter_HT = _decay(log_HT, x_THP.dtype)
    leave_HT = _decay(log_HT[:, -1:] - log_HT, x_THP.dtype)
    within_HTT = _decay(log_HT[:, :, None] - log_HT[:, None], x_THP.dtype)
    B_GTN, C_GTN = B_TGN.transpose(0, 1), C_TGN.transpose(0, 1)
    products_GTT = torch.bmm(C_GTN, B_GTN.transpose(1, 2)).tril_()
    mix_HTT = within_HTT.view(G, H // G, T, T).mul_(products_GTT[:, None]).view(H, T, T)
    xdt_HTP = (x_THP * dt_TH[..., None]).transpose(0, 1)
    y_HTP = torch.bmm(mix_HTT, xdt_HTP)
    read_GTQ = torch.bmm(C_GTN, state_HPN.reshape(G, -1, N).transpose(1, 2))
    read_HTP = read_GTQ.view(G, T, H // G, P).transpose(1, 2).reshape(H, T, P)
    y_HTP.addcmul_(read_HTP, enter_HT[..., None])
    left_GQT = (xdt_HTP * leave_HT[..., None]).transpose(1, 2).reshape(G, -1, T)
    added_HPN = torch.bmm(left_GQT, B_GTN).view(H, P, N)
    y_THP = torch.addcmul(y_HTP.transpose(0, 1), x_THP, D_H[:, None])
    return y_THP.contiguous(), added_HPN.addcmul_(state_HPN, enter_HT[:, -1, None, None])


class _Decays(NamedTuple):
    """Products of decays <= 1; zero across segments."""

    within_HZCC: Tensor
    """Token s (last axis) to l; valid where `keep`."""
    enter_ZCH: Tensor
    leave_ZCH: Tensor
    through_ZH: Tensor
    keep_ZCC: Tensor
    """(Z or 1, C, C): l >= s in the same segment."""


def _decays(dt_ZCH: Tensor, A_H: Tensor, seq_idx: Tensor | None) -> _Decays:
    num_chunks, chunk, _ = dt_ZCH.shape
    log_ZCH = (dt_ZCH.double() * A_H.double()).cumsum(1)
    log_HZC = log_ZCH.permute(2, 0, 1).contiguous()
    within = _decay(log_HZC[..., :, None] - log_HZC[..., None, :], dt_ZCH.dtype)
    enter = _decay(log_ZCH, dt_ZCH.dtype)
    leave = _decay(log_ZCH[:, -1:] - log_ZCH, dt_ZCH.dtype)
    keep = torch.ones(1, chunk, chunk, dtype=torch.bool, device=dt_ZCH.device).tril_()
    if seq_idx is None:
        return _Decays(within, enter, leave, enter[:, -1], keep)
    seq_ZC = seq_idx[1:].view(num_chunks, chunk)
    before_Z1 = seq_idx[:-1].view(num_chunks, chunk)[:, :1]
    keep = keep & (seq_ZC[:, :, None] == seq_ZC[:, None, :])
    enter.mul_((seq_ZC == before_Z1)[..., None])
    leave.mul_((seq_ZC == seq_ZC[:, -1:])[..., None])
    return _Decays(within, enter, leave, enter[:, -1], keep)


def _decay(log: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(log) for log <= 0; positive ones belong to masked pairs."""
    return log.to(dtype).clamp_(MIN_EXPONENT, 0.0).exp_() if log.dtype != dtype else log.clamp(MIN_EXPONENT, 0.0).exp_()


class _Chunks:
    """Neighbouring chunks; states (G, Z + 1, N, r * P) for r heads per group."""

    def __init__(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, seq_idx: Tensor | None) -> None:
        self.x_ZCHP, self.dt_ZCH, self.B_ZCGN, self.C_ZCGN = x, dt, B, C
        (self.Z, self.C, self.H, self.P), (self.G, self.N) = x.shape, B.shape[2:]
        self.r = self.H // self.G
        self.decays = _decays(dt, A, seq_idx)
        self.xdt_ZCHP = x * dt[..., None]
        products = x.new_empty(self.G, self.Z, self.C, self.C)
        for g in range(self.G):
            torch.bmm(C[:, :, g], B[:, :, g].transpose(1, 2), out=products[g])
        products.mul_(self.decays.keep_ZCC)
        within = self.decays.within_HZCC
        self.mix_HZCC = (within.view(self.G, self.r, *within.shape[1:]) * products[:, None]).view(within.shape)
        """(C_l . B_s) times the decay from s to l."""

    def group(self, x_ZCHP: Tensor, g: int) -> Tensor:
        """(Z, C, r * P)"""
        return x_ZCHP[:, :, g * self.r : (g + 1) * self.r].flatten(2)

    def into_states(self, projection_ZCGN: Tensor, values_ZCHP: Tensor, out_GZNQ: Tensor) -> None:
        """Writes each chunk's sum of projection x values."""
        for g in range(self.G):
            torch.bmm(projection_ZCGN[:, :, g].transpose(1, 2), self.group(values_ZCHP, g), out=out_GZNQ[g])

    def from_states(self, projection_ZCGN: Tensor, states_GZNQ: Tensor, weight_ZCH: Tensor, out_ZCHP: Tensor) -> None:
        """Writes each token's weighted product with its chunk's state."""
        for g in range(self.G):
            read_ZCrP = torch.bmm(projection_ZCGN[:, :, g], states_GZNQ[g]).view(self.Z, self.C, self.r, self.P)
            heads = slice(g * self.r, (g + 1) * self.r)
            torch.mul(read_ZCrP, weight_ZCH[:, :, heads, None], out=out_ZCHP[:, :, heads])

    def add_mixed(self, values_ZCHP: Tensor, out_ZCHP: Tensor, *, transposed: bool = False) -> None:
        mixed_HZCP = values_ZCHP.new_empty(self.H, self.Z, self.C, self.P)
        for h in range(self.H):
            mix = self.mix_HZCC[h].transpose(1, 2) if transposed else self.mix_HZCC[h]
            torch.bmm(mix, values_ZCHP[:, :, h], out=mixed_HZCP[h])
        out_ZCHP += mixed_HZCP.permute(1, 2, 0, 3)

    def carry(self, states_GZNQ: Tensor, *, backwards: bool = False) -> None:
        through = self.decays.through_ZH.view(self.Z, self.G, 1, self.r, 1)
        states = states_GZNQ.view(self.G, self.Z + 1, self.N, self.r, self.P)
        for z in reversed(range(self.Z)) if backwards else range(self.Z):
            old, new = (z + 1, z) if backwards else (z, z + 1)
            states[:, new].addcmul_(states[:, old], through[z])


def chunk_runs(x_THP: Tensor, chunk_size: int, matrix_elements: int | None = None) -> list[tuple[int, int, int]]:
    """(start, stop, tokens per chunk) of chunks computed together."""
    num_tokens, num_heads = x_THP.shape[:2]
    full = num_tokens - num_tokens % chunk_size
    elements = matrix_elements or (MATRIX_ELEMENTS if x_THP.device.type == "cpu" else DEVICE_MATRIX_ELEMENTS)
    step = max(1, elements // (num_heads * chunk_size * chunk_size)) * chunk_size
    runs = [(start, min(start + step, full), chunk_size) for start in range(0, full, step)]
    return runs if full == num_tokens else [*runs, (full, num_tokens, num_tokens - full)]


class _Scan(torch.autograd.Function):
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
        runs: list[tuple[int, int, int]],
        seq_idx_T: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.seq_idx = None if seq_idx_T is None else torch.cat([seq_idx_T[:1], seq_idx_T])  # of token t - 1, at t
        ctx.runs = runs
        y = torch.empty(x_THP.shape, dtype=x_THP.dtype, device=x_THP.device)
        last, kept = _from_heads(state_HPN, B_TGN.shape[1]), []
        for start, stop, chunk in runs:
            chunks = _take_chunks((x_THP, dt_TH, B_TGN, C_TGN), A_H, ctx.seq_idx, start, stop, chunk)
            states = last.new_empty(chunks.G, chunks.Z + 1, *last.shape[1:])
            states[:, 0] = last
            chunks.into_states(chunks.B_ZCGN, chunks.xdt_ZCHP * chunks.decays.leave_ZCH[..., None], states[:, 1:])
            chunks.carry(states)
            y_ZCHP = _split(y[start:stop], chunk)
            chunks.from_states(chunks.C_ZCGN, states[:, :-1], chunks.decays.enter_ZCH, y_ZCHP)
            chunks.add_mixed(chunks.xdt_ZCHP, y_ZCHP)
            y_ZCHP.addcmul_(chunks.x_ZCHP, D_H[:, None])
            last = states[:, -1]
            if any(ctx.needs_input_grad):
                kept.append(states)
        ctx.save_for_backward(x_THP, dt_TH, A_H, B_TGN, C_TGN, D_H, *kept)
        return y, _to_heads(last, x_THP.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, *kept = ctx.saved_tensors
        dy = grads[0].contiguous()
        dx, ddt, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, B, C))
        dA, dD = torch.zeros_like(A, dtype=torch.float64), torch.zeros_like(D)
        dlast = _from_heads(grads[1], B.shape[1])
        for (start, stop, chunk), states in zip(reversed(ctx.runs), reversed(kept), strict=True):
            chunks = _take_chunks((x, dt, B, C), A, ctx.seq_idx, start, stop, chunk)
            dy_p, dx_p, ddt_p, dB_p, dC_p = (_split(t[start:stop], chunk) for t in (dy, dx, ddt, dB, dC))
            dstates = torch.empty_like(states)
            dstates[:, -1] = dlast
            dy_enter = dy_p * chunks.decays.enter_ZCH[..., None]
            chunks.into_states(chunks.C_ZCGN, dy_enter, dstates[:, :-1])
            chunks.carry(dstates, backwards=True)
            dlast = dstates[:, 0]
            within_ZCH = _projection_gradients(chunks, dy_p, dy_enter, states, dstates, dB_p, dC_p)
            chunks.from_states(chunks.C_ZCGN, states[:, :-1], chunks.decays.enter_ZCH, dx_p)
            entered_ZCH = _dot(dy_p, dx_p)
            chunks.from_states(chunks.B_ZCGN, dstates[:, 1:], chunks.decays.leave_ZCH, dx_p)
            left_ZCH = _dot(chunks.xdt_ZCHP, dx_p)
            chunks.add_mixed(dy_p, dx_p, transposed=True)  # dx holds the gradient of dt * x until the end of the loop
            dy_x, dxdt_x = _dot(dy_p, chunks.x_ZCHP), _dot(dx_p, chunks.x_ZCHP)
            passed_ZH = _passed(chunks, dstates[:, 1:], states[:, :-1])
            dlog = _decay_gradient(within_ZCH, entered_ZCH, left_ZCH, passed_ZH)
            torch.addcmul(dxdt_x, dlog, A, out=ddt_p)
            dA += (dlog.double() * chunks.dt_ZCH).sum((0, 1))
            dD += dy_x.sum((0, 1))
            dx_p.mul_(chunks.dt_ZCH[..., None]).addcmul_(dy_p, D[:, None])
        return dx, ddt, dA.to(A.dtype), dB, dC, dD, _to_heads(dlast, x.shape[1]), None, None


def _take_chunks(
    operands: tuple[Tensor, Tensor, Tensor, Tensor],
    A: Tensor,
    seq_idx: Tensor | None,
    start: int,
    stop: int,
    chunk: int,
) -> _Chunks:
    x, dt, B, C = (_split(tensor[start:stop], chunk) for tensor in operands)
    return _Chunks(x, dt, A, B, C, None if seq_idx is None else seq_idx[start : stop + 1])


def _projection_gradients(
    chunks: _Chunks, dy: Tensor, dy_enter: Tensor, states: Tensor, dstates: Tensor, dB_ZCGN: Tensor, dC_ZCGN: Tensor
) -> Tensor:
    """Also returns (Z, C, H): the gradient through paths of the chunk across each token."""
    dmix = torch.empty_like(chunks.mix_HZCC)
    for h in range(chunks.H):
        torch.bmm(dy[:, :, h], chunks.xdt_ZCHP[:, :, h].transpose(1, 2), out=dmix[h])
    across_ZCH = _across(dmix * chunks.mix_HZCC)
    dmix.mul_(chunks.decays.within_HZCC)
    dproducts_GZCC = dmix.view(chunks.G, chunks.r, chunks.Z, chunks.C, chunks.C).sum(1).mul_(chunks.decays.keep_ZCC)
    xdt_leave = chunks.xdt_ZCHP * chunks.decays.leave_ZCH[..., None]
    for g in range(chunks.G):
        dC = dproducts_GZCC[g] @ chunks.B_ZCGN[:, :, g]
        dC_ZCGN[:, :, g] = dC.baddbmm_(chunks.group(dy_enter, g), states[g, :-1].transpose(1, 2))
        dB = dproducts_GZCC[g].transpose(1, 2) @ chunks.C_ZCGN[:, :, g]
        dB_ZCGN[:, :, g] = dB.baddbmm_(chunks.group(xdt_leave, g), dstates[g, 1:].transpose(1, 2))
    return across_ZCH


def _across(paths_HZCC: Tensor) -> Tensor:
    """(Z, C, H): sums over l >= t and s < t of paths from s (last axis) to l."""
    size = paths_HZCC.shape[-1]
    before_CC = torch.ones(size, size, dtype=paths_HZCC.dtype, device=paths_HZCC.device).triu_(1)  # [s, t]: s < t
    return (paths_HZCC @ before_CC).tril_().sum(2).permute(1, 2, 0)


def _passed(chunks: _Chunks, dafter_GZNQ: Tensor, before_GZNQ: Tensor) -> Tensor:
    """(Z, H): gradient through the paths that cross a whole chunk."""
    passed_GZr = (dafter_GZNQ * before_GZNQ).sum(2).view(chunks.G, chunks.Z, chunks.r, chunks.P).sum(-1)
    return passed_GZr.transpose(0, 1).reshape(chunks.Z, chunks.H) * chunks.decays.through_ZH


def _decay_gradient(within_ZCH: Tensor, entered_ZCH: Tensor, left_ZCH: Tensor, passed_ZH: Tensor) -> Tensor:
    """(Z, C, H): gradient of the log decay dt_t A, which scales every path from s < t to l >= t.

    Paths lie within the chunk, enter, leave or pass it; no large sums are subtracted.
    """
    to_later = entered_ZCH.flip(1).cumsum(1).flip(1)
    from_earlier = F.pad(left_ZCH[:, :-1], (0, 0, 1, 0)).cumsum(1)
    return within_ZCH + to_later + from_earlier + passed_ZH[:, None]


def _dot(a_ZCHP: Tensor, b_ZCHP: Tensor) -> Tensor:
    return (a_ZCHP * b_ZCHP).sum(-1)


def _split(x_T: Tensor, chunk: int) -> Tensor:
    return x_T.view(len(x_T) // chunk, chunk, *x_T.shape[1:])


def _from_heads(state_HPN: Tensor, num_groups: int) -> Tensor:
    """(H, P, N) -> (G, N, r * P)"""
    grouped = state_HPN.reshape(num_groups, -1, state_HPN.shape[-1])
    return grouped.transpose(1, 2).contiguous()


def _to_heads(state_GNQ: Tensor, num_heads: int) -> Tensor:
    return state_GNQ.transpose(1, 2).reshape(num_heads, -1, state_GNQ.shape[1])
