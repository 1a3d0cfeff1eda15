"""The short causal convolution of a Mamba-2 mixer, one filter a channel, with SiLU: over a pack, and one step of it.

Knows tensors alone. A token never sees the segment before its own; the first tokens of a segment see zeros, or the
given window. With K taps written for K = 4:

    y_t = silu(bias + w_0 x_(t-3) + w_1 x_(t-2) + w_2 x_(t-1) + w_3 x_t)

Written as K shifted multiply-adds over cache-sized blocks: on a CPU several times as fast as `conv1d`, which wants
channels first and pays for two transpositions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK_ELEMENTS = 2**17
"""elements of a block of the pack: half a MiB in fp32"""


def causal_conv_silu(
    x_TD: Tensor, weight_DK: Tensor, bias_D: Tensor | None, *, positions_T: Tensor, initial_KD: Tensor | None = None
) -> Tensor:
    """(T, D): the convolved and activated channels.

    Args:
        x_TD: the pack.
        weight_DK: taps, oldest first.
        bias_D: or None.
        positions_T: (T,) int64, each token's place in its segment.
        initial_KD: (K - 1, D) inputs before the pack, oldest first; only for a pack of one segment.
    """
    bias = weight_DK.new_zeros(len(weight_DK)) if bias_D is None else bias_D
    if initial_KD is not None and initial_KD.shape[0]:
        joined = torch.cat([initial_KD.to(x_TD.dtype), x_TD])
        positions = torch.arange(len(joined), device=x_TD.device)
        before: Tensor = _CausalConv.apply(joined, weight_DK, bias, positions)  # type: ignore[no-untyped-call]
        return F.silu(before[len(initial_KD) :])
    convolved: Tensor = _CausalConv.apply(x_TD, weight_DK, bias, positions_T)  # type: ignore[no-untyped-call]
    return F.silu(convolved)


def causal_conv_silu_step(x_BD: Tensor, weight_DK: Tensor, bias_D: Tensor | None, window_BKD: Tensor) -> Tensor:
    """One token for each of B sequences (B, D); shifts it into `window_BKD` (B, K - 1, D), oldest first, in place."""
    taps = torch.cat([window_BKD, x_BD[:, None].to(window_BKD.dtype)], dim=1)
    window_BKD.copy_(taps[:, 1:])
    y_BD = (taps.to(x_BD.dtype) * weight_DK.t()).sum(1)
    return F.silu(y_BD if bias_D is None else y_BD + bias_D)


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_DK: Tensor, bias_D: Tensor, positions_T: Tensor) -> Tensor:
        num_taps = weight_DK.shape[1]
        ctx.save_for_backward(x_TD, weight_DK, positions_T)
        y = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
        taps = weight_DK.t().contiguous()
        for start, stop in _blocks(x_TD):
            torch.addcmul(bias_D, x_TD[start:stop], taps[-1], out=y[start:stop])
            for back in range(1, num_taps):
                first = min(max(start, back), stop)
                y[first:stop].addcmul_(x_TD[first - back : stop - back], taps[-1 - back])
        rows = (positions_T < num_taps - 1).nonzero().squeeze(1)  # these mixed in the segment before: again, apart
        fresh = torch.addcmul(bias_D, x_TD[rows], taps[-1])
        for back in range(1, num_taps):
            inside = (positions_T[rows] >= back)[:, None]
            fresh += torch.where(inside, x_TD[(rows - back).clamp(min=0)] * taps[-1 - back], 0.0)
        return y.index_copy_(0, rows, fresh)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_DK, positions_T = ctx.saved_tensors
        dy = grads[0]
        num_tokens, num_taps = len(x_TD), weight_DK.shape[1]
        taps = weight_DK.t().contiguous()
        dx = torch.empty_like(dy)
        dtaps = torch.zeros_like(taps)
        for start, stop in _blocks(x_TD):
            torch.mul(dy[start:stop], taps[-1], out=dx[start:stop])
            dtaps[-1] += (dy[start:stop] * x_TD[start:stop]).sum(0)
            for back in range(1, num_taps):
                last = max(start, min(stop, num_tokens - back))
                dx[start:last].addcmul_(dy[start + back : last + back], taps[-1 - back])
                dtaps[-1 - back] += (dy[start + back : last + back] * x_TD[start:last]).sum(0)
        for back in range(1, num_taps):  # take back what crossed into the next segment
            rows = (positions_T[back:] < back).nonzero().squeeze(1)
            crossed = dy[rows + back]
            dtaps[-1 - back] -= (crossed * x_TD[rows]).sum(0)
            dx.index_add_(0, rows, crossed * taps[-1 - back], alpha=-1)
        return dx, dtaps.t(), dy.sum(0), None


def _blocks(x_TD: Tensor) -> list[tuple[int, int]]:
    length = max(1, BLOCK_ELEMENTS // max(1, x_TD.shape[1]))
    return [(start, min(start + length, len(x_TD))) for start in range(0, len(x_TD), length)]
