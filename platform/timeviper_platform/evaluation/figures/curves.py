"""Two curves of hybrids (arXiv 2603.00198): how sparse importance is in a block, how stable from block to block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from timeviper_model.analysis.dropping import with_plan
from timeviper_model.batching.batch import PackedBatch, TokenKind
from timeviper_model.layers.backbone import DecoderBlock
from timeviper_model.layers.importance import importance, score_inputs
from timeviper_model.layers.transv import TokenStream
from timeviper_model.timeviper import TimeViper
from timeviper_platform.evaluation.figures.sweeps import mixing_layers

MASSES = (0.5, 0.9)
"""Shares of importance whose smallest sets of tokens are measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvesConfig:
    """Importance of vision tokens for the instruction, by block, without drops."""

    num_questions: int = 32
    """Number of questions to average over."""
    top_share: float = 0.1
    """Share of vision tokens that counts as important when blocks are compared."""

    def __post_init__(self) -> None:
        if self.num_questions < 1 or not 0.0 < self.top_share < 1.0:
            raise ValueError(f"{self.num_questions = } must be at least 1 and {self.top_share = } between 0 and 1")


def importance_curves(model: TimeViper, batches: Sequence[PackedBatch], config: CurvesConfig) -> dict[str, Any]:
    """Averages over questions, one per batch.

    Returns:
        `layers` and `blocks` (types); `sparsity`: by mass, the smallest share of vision tokens that holds it, by layer;
        `overlap_LL`: shared part of two blocks' top tokens; `correlation_LL`: Spearman's, of all vision tokens.
    """
    layers = mixing_layers(model, None)
    sparsity = torch.zeros(len(MASSES), len(layers), dtype=torch.float64)
    overlap, correlation = torch.zeros(2, len(layers), len(layers), dtype=torch.float64)
    for batch in batches:
        scores_LV = vision_importance(model, batch, layers)
        num_vision = scores_LV.shape[1]
        ordered_LV = scores_LV.sort(1, descending=True).values
        cumulative_LV = ordered_LV.cumsum(1) / ordered_LV.sum(1, keepdim=True)
        for row, mass in enumerate(MASSES):
            sparsity[row] += ((cumulative_LV < mass).sum(1) + 1).clamp(max=num_vision) / num_vision
        num_top = max(1, round(config.top_share * num_vision))
        is_top_LV = torch.zeros_like(scores_LV).scatter_(1, scores_LV.topk(num_top, dim=1).indices, 1.0)
        overlap += is_top_LV @ is_top_LV.t() / num_top
        correlation += torch.corrcoef(scores_LV.argsort(1).argsort(1).double()).reshape(overlap.shape)
    return {
        "layers": layers,
        "blocks": [model.config.text.block_types[layer] for layer in layers],
        "num_questions": len(batches),
        "top_share": config.top_share,
        "sparsity": {f"{mass:g}": (row / len(batches)).tolist() for mass, row in zip(MASSES, sparsity, strict=True)},
        "overlap_LL": (overlap / len(batches)).tolist(),
        "correlation_LL": (correlation / len(batches)).tolist(),
    }


@torch.no_grad()
def vision_importance(model: TimeViper, batch: PackedBatch, layers: Sequence[int]) -> Tensor:
    """(L, V) importance of vision tokens for the instruction of one question, in the model without drops."""
    scores: list[Tensor] = []
    whole = with_plan(model, ())

    def run(layer: int, block: DecoderBlock, stream: TokenStream) -> Tensor:
        if layer in layers:
            is_vision_T = stream.token_kind_T == TokenKind.VISION
            queries = (stream.token_kind_T == TokenKind.INSTRUCTION).nonzero().squeeze(1)
            inputs = score_inputs(block, stream.hidden_TD, stream.segments)
            scores.append(importance(inputs, queries)[is_vision_T].double().cpu())
        hidden: Tensor = block(stream.hidden_TD, stream.segments)
        return hidden

    whole.run_blocks(whole.embed(batch), run_block=run)
    return torch.stack(scores)
