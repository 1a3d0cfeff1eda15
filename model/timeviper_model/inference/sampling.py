"""Logits to the next token, independent of other rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from timeviper_model.inference.answer import SamplingParams


class SampledToken(NamedTuple):
    """A token with log-probabilities before temperature, top-k and top-p."""

    id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]
    """Most likely (id, log-probability) pairs."""


def sample_tokens(
    logits_BV: Tensor, params: Sequence[SamplingParams], generators: Sequence[torch.Generator]
) -> list[SampledToken]:
    """Chooses one token per row of float32 or float64 logits.

    `generators` are on the CPU; greedy rows do not advance theirs.
    """
    logprobs_BV = torch.log_softmax(logits_BV, dim=-1)
    ids = torch.argmax(logits_BV, dim=-1).tolist()
    for row, (param, generator) in enumerate(zip(params, generators, strict=True)):
        if param.temperature > 0:
            ids[row] = _draw(logits_BV[row], param, generator)
    chosen = logprobs_BV.gather(1, torch.tensor(ids, device=logits_BV.device)[:, None])[:, 0].tolist()
    return [
        SampledToken(token, logprob, _most_likely(logprobs_BV[row], param.num_logprobs))
        for row, (token, logprob, param) in enumerate(zip(ids, chosen, params, strict=True))
    ]


def _draw(logits_V: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Draws by inverse CDF: one uniform number per token."""
    scaled_V, order_V = torch.sort(logits_V.double() / params.temperature, descending=True, stable=True)
    if params.top_k:
        scaled_V = scaled_V[: params.top_k]
    probs_K = torch.softmax(scaled_V, dim=0)
    before_K = torch.cumsum(probs_K, dim=0) - probs_K
    num_kept = max(1, int((before_K < params.top_p).sum()))  # a token stays while those before it have less than top_p
    cumulative_K = torch.cumsum(probs_K[:num_kept], dim=0)
    uniform = torch.rand((), generator=generator, dtype=torch.float64).to(cumulative_K.device)
    index = int(torch.searchsorted(cumulative_K, uniform * cumulative_K[-1], right=True))
    return int(order_V[min(index, num_kept - 1)])


def _most_likely(logprobs_V: Tensor, count: int | None) -> tuple[tuple[int, float], ...]:
    if not count:
        return ()
    best = torch.topk(logprobs_V, min(count, logprobs_V.shape[0]))
    return tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
