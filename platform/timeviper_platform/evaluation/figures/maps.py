"""Pooled maps of attention and Mamba's hidden attention (Figures 5 and 6)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from timeviper_model.analysis.maps import TokenMap, observe
from timeviper_model.analysis.pooling import HeadStatistics, PooledMap, equal_bins, head_statistics, pool_map
from timeviper_model.batching.batch import PackedBatch, TokenKind
from timeviper_model.config import HybridConfig
from timeviper_model.layers.transv import TokenStream
from timeviper_model.timeviper import TimeViper
from timeviper_platform.evaluation.figures.sweeps import mixing_layers

logger = logging.getLogger(__name__)

KINDS = [kind.name.lower() for kind in TokenKind]


@dataclass(frozen=True, kw_only=True, slots=True)
class MapsConfig:
    num_questions: int = 8
    """Number of questions to map."""
    num_bins: int = 48
    """Rows and columns of a map."""
    max_queries: int = 1024
    """Maximum queries per question, evenly spaced."""
    layers: tuple[int, ...] | None = None
    """Mapped blocks; null = all that mix tokens."""
    heads: tuple[tuple[int, int], ...] = ()
    """(block, head) pairs, both from 0, that get maps of their own."""

    def __post_init__(self) -> None:
        if min(self.num_questions, self.num_bins, self.max_queries) < 1:
            raise ValueError(f"{self.num_questions = }, {self.num_bins = }, {self.max_queries = } must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerMap:
    layer: int
    block_type: str
    groups: PooledMap
    """Absolute weights between token kinds, as shares of a query's row (Figure 6)."""
    picture_HBB: Tensor
    """The same between bins, by head (Figure 5); a row sums to 1, or is NaN without queries."""
    heads: HeadStatistics
    """Averages over questions."""
    kind_ends: tuple[float, ...]
    """Where each kind of token ends in this block's input, as a share of it, averaged over questions."""

    @property
    def picture_BB(self) -> Tensor:
        """The map averaged over heads."""
        return self.picture_HBB.mean(0)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yields the shares of a query kind's weights by token kind, averaged over heads."""
        shares = self.groups.share_HAB.mean(0)
        for a, query in enumerate(KINDS):
            for b, source in enumerate(KINDS):
                if self.groups.num_pairs_AB[a, b]:
                    share = float(shares[a, b])
                    yield {
                        "layer": self.layer,
                        "block": self.block_type,
                        "from": query,
                        "to": source,
                        "share": share,
                    }


class _QuestionMap(NamedTuple):
    groups: PooledMap
    picture: PooledMap
    heads: HeadStatistics
    kind_ends_K: Tensor


def layer_maps(model: TimeViper, batches: Sequence[PackedBatch], config: MapsConfig) -> list[LayerMap]:
    """Each batch holds one question.

    Raises:
        ValueError: if a block of `config.heads` is not mapped or lacks the head.
    """
    types = model.config.text.block_types
    layers = mixing_layers(model, config.layers)
    for layer, head in config.heads:
        num_heads = _num_heads(model, layer) if layer in layers else 0
        if not 0 <= head < num_heads:
            raise ValueError(
                f"maps.heads names head {head} of block {layer}, which has {num_heads} mapped heads;"
                f" mapped blocks are {layers}"
            )
    maps: dict[int, list[_QuestionMap]] = {layer: [] for layer in layers}

    def pool(tokens: TokenMap, stream: TokenStream) -> _QuestionMap:
        queries = spread(len(tokens.segments.ids), config.max_queries, stream.hidden_TD.device)
        bins = equal_bins(tokens.segments, config.num_bins)
        counts = torch.bincount(stream.token_kind_T.long(), minlength=len(KINDS))
        return _QuestionMap(
            groups=pool_map(tokens, stream.token_kind_T, len(KINDS), normalise=True, queries=queries),
            picture=pool_map(tokens, bins, config.num_bins, normalise=True, queries=queries),
            heads=head_statistics(tokens, queries=queries),
            kind_ends_K=counts.double().cumsum(0) / len(stream.token_kind_T),
        )

    for index, batch in enumerate(batches):
        for layer, pooled in observe(model, batch, layers, pool).items():
            maps[layer].append(pooled)
        logger.info("maps: %d of %d questions", index + 1, len(batches))
    return [
        LayerMap(
            layer=layer,
            block_type=types[layer],
            groups=_sum([own.groups for own in pooled]),
            picture_HBB=_sum([own.picture for own in pooled]).share_HAB,
            heads=HeadStatistics(
                *(torch.stack(values).mean(0) for values in zip(*(own.heads for own in pooled), strict=True))
            ),
            kind_ends=tuple(torch.stack([own.kind_ends_K for own in pooled]).mean(0).tolist()),
        )
        for layer, pooled in maps.items()
    ]


def _num_heads(model: TimeViper, layer: int) -> int:
    text = model.config.text
    is_mamba = text.block_types[layer] == "mamba"
    return text.mamba_num_heads if is_mamba and isinstance(text, HybridConfig) else text.num_attention_heads


def spread(num_tokens: int, max_queries: int, device: torch.device) -> Tensor:
    """Returns evenly spaced indices: spread(9, 3) -> 2, 5, 8."""
    count = min(num_tokens, max_queries)
    return (torch.arange(1, count + 1, device=device) * num_tokens) // count - 1


def _sum(maps: Sequence[PooledMap]) -> PooledMap:
    return PooledMap(*(torch.stack(values).sum(0) for values in zip(*maps, strict=True)))
