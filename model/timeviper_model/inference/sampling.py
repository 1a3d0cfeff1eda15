"""Logits to the next tokens, all rows together; the host waits for the device once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from timeviper_model.inference.answer import SamplingParams

ROUNDING = 1e-6
"""Bound on the relative error of fp32 sums."""


class SampledToken(NamedTuple):
    """A token with log-probabilities before temperature, top-k, top-p and JSON schemas."""

    id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]
    """Most likely (id, log-probability) pairs."""
    is_finite: bool = True
    """False for rows with infinite or NaN logits."""


def sample_tokens(
    logits_BV: Tensor,
    params: Sequence[SamplingParams],
    generators: Sequence[torch.Generator],
    allowed_BV: Tensor | None = None,
) -> list[SampledToken]:
    """Chooses one token per row of float32 or float64 logits, among those of `allowed_BV` (bool).

    `generators` are on the CPU; greedy rows do not advance theirs.
    """
    num_rows = len(params)
    logprobs_BV = torch.log_softmax(logits_BV, dim=-1)
    is_finite_B = logits_BV.sum(dim=-1).isfinite()  # five times as fast as isfinite().all()
    if allowed_BV is not None:
        logits_BV = logits_BV.masked_fill(~allowed_BV.to(logits_BV.device), -torch.inf)
    drawn = [row for row in range(num_rows) if params[row].temperature > 0]
    options = [params[row] for row in drawn]
    uniforms = [torch.rand((), generator=generators[row], dtype=torch.float64).item() for row in drawn]
    if len(drawn) == num_rows:
        ids_B = _draw(logits_BV, options, uniforms)
    else:
        ids_B = torch.argmax(logits_BV, dim=-1)
        if drawn:
            index = torch.tensor(drawn, device=logits_BV.device)
            ids_B = ids_B.index_copy(0, index, _draw(logits_BV.index_select(0, index), options, uniforms))
    columns = [ids_B, logprobs_BV.gather(1, ids_B[:, None])[:, 0], is_finite_B]
    table = torch.stack([column.double() for column in columns], dim=1)
    shown = [row for row in range(num_rows) if params[row].num_logprobs]
    count = min(max((params[row].num_logprobs or 0 for row in shown), default=0), logits_BV.shape[1])
    if shown:
        index = torch.tensor(shown, device=logits_BV.device)
        best = torch.topk(logprobs_BV.index_select(0, index), count)
        pairs = torch.cat([best.indices.double(), best.values.double()], dim=1)
        table = torch.cat([table, table.new_zeros(num_rows, 2 * count).index_copy(0, index, pairs)], dim=1)
    return [
        SampledToken(
            int(row[0]), row[1], _most_likely(row[3 : 3 + count], row[3 + count :], param.num_logprobs), bool(row[2])
        )
        for row, param in zip(table.tolist(), params, strict=True)
    ]


def _draw(logits_RV: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    """(R,) token ids by inverse CDF, most likely tokens first: one uniform number per token."""
    if logits_RV.device.type == "cpu":
        buffer_V = torch.empty_like(logits_RV[0])
        rows = zip(logits_RV, params, uniforms, strict=True)
        return torch.cat([_draw_on_cpu(*row, buffer_V) for row in rows])
    size = logits_RV.shape[1]
    options = [[param.temperature, param.top_p, param.top_k or size] for param in params]
    options_R3 = torch.tensor(options, dtype=torch.float64, device=logits_RV.device)
    temperature_R1, top_p_R1, top_k_R1 = torch.split(options_R3, 1, dim=1)
    sorted_RV = logits_RV.sort(dim=-1, descending=True).values
    probs_RV = (sorted_RV.double() - sorted_RV[:, :1]).div_(temperature_R1).exp_()
    probs_RV.masked_fill_(torch.arange(size, device=logits_RV.device) >= top_k_R1, 0.0)
    uniform_R1 = torch.tensor(uniforms, dtype=torch.float64, device=logits_RV.device)[:, None]
    return _take(logits_RV, sorted_RV, probs_RV.cumsum(dim=-1), top_p_R1, uniform_R1)


def _draw_on_cpu(logits_V: Tensor, params: SamplingParams, uniform: float, buffer_V: Tensor) -> Tensor:
    """(1,) token id. NumPy sorts ten times as fast as PyTorch; overwrites `buffer_V`, as new memory is slow."""
    highest, candidates, tail = logits_V.max(), None, 0.0
    if not highest.isfinite():
        return torch.zeros(1, dtype=torch.long)
    if not params.top_k and params.top_p < 1:
        probs = torch.sub(logits_V, highest, out=buffer_V).div_(params.temperature).exp_().numpy()
        candidates, tail = _likely(probs, params.top_p)
        logits_V = logits_V[candidates]
    sorted_K = torch.from_numpy(np.sort(logits_V.numpy())).flip(0)[: params.top_k or None]
    probs_K = sorted_K.to(torch.float64, copy=True).sub_(highest.double()).div_(params.temperature).exp_()
    cumulative_K = probs_K.cumsum_(0)
    share = params.top_p * (1 + tail / float(cumulative_K[-1]))
    index = _take(logits_V[None], sorted_K[None], cumulative_K[None], share, uniform)
    return index if candidates is None else candidates[index]


def _likely(probs_V: np.ndarray, top_p: float) -> tuple[Tensor, float]:
    """Ascending indices that include the smallest set with `top_p` of the sum, and the sum of all others.

    Tokens below `floor` hold less than 1 - top_p, and often so do those below 32 * `floor`. Overwrites `probs_V`.
    """
    total = float(probs_V.sum())
    floor = (1 - top_p) * total / len(probs_V) * (1 - ROUNDING)
    for limit in (32 * floor, floor):
        likely = np.flatnonzero(probs_V >= limit)
        if probs_V[likely].sum() > (top_p + ROUNDING) * total:
            break
    probs_V[likely] = 0.0
    return torch.from_numpy(likely), float(probs_V.sum())


def _take(
    logits_RV: Tensor, sorted_RK: Tensor, cumulative_RK: Tensor, top_p: Tensor | float, uniform: Tensor | float
) -> Tensor:
    """(R,) indices in `logits_RV`, by its K highest logits, descending, and their cumulative probabilities."""
    # a token stays while those before it have less than top_p
    last_R1 = torch.searchsorted(cumulative_RK, top_p * cumulative_RK[:, -1:])
    last_R1.clamp_(max=cumulative_RK.shape[1] - 1)
    rank_R1 = torch.searchsorted(cumulative_RK, uniform * cumulative_RK.gather(1, last_R1), right=True)
    rank_R1 = torch.minimum(rank_R1, last_R1)
    value_R1 = sorted_RK.gather(1, rank_R1)
    # among equal logits, the lower id comes first
    number_R1 = rank_R1 - (sorted_RK > value_R1).sum(dim=-1, keepdim=True)
    num_equal_RV = (logits_RV == value_R1).float().cumsum(dim=-1)
    return torch.searchsorted(num_equal_RV, (number_R1 + 1).float())[:, 0].clamp_(max=logits_RV.shape[1] - 1)


def _most_likely(ids: Sequence[float], logprobs: Sequence[float], count: int | None) -> tuple[tuple[int, float], ...]:
    return tuple(zip(map(int, ids[: count or 0]), logprobs[: count or 0], strict=True))
