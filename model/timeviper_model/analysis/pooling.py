"""Averages of maps, and statistics of heads (Figures 5 and 6)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from timeviper_model.analysis.maps import ROW_ELEMENTS, TokenMap, readable, row_blocks
from timeviper_model.batching.segments import Segments


class PooledMap(NamedTuple):
    """Sums over the queries of group A and the tokens of group B that they may read."""

    sum_HAB: Tensor
    num_queries_A: Tensor
    num_pairs_AB: Tensor
    """Pairs of a query and a token that it may read."""

    @property
    def share_HAB(self) -> Tensor:
        """(H, A, B) average weight of a query of A on all of B; NaN without queries. Normalised rows sum to 1."""
        return self.sum_HAB / self.num_queries_A[:, None]


class HeadStatistics(NamedTuple):
    """Averages over queries with normalised rows."""

    sink_share_H: Tensor
    """Share on the segment's first tokens (attention sink, arXiv 2309.17453)."""
    entropy_H: Tensor
    distance_H: Tensor
    """Mean distance in tokens."""


def pool_map(
    tokens: TokenMap,
    labels_T: Tensor,
    num_labels: int,
    *,
    normalise: bool = False,
    queries: Tensor | None = None,
    max_elements: int = ROW_ELEMENTS,
) -> PooledMap:
    """Sums a map between groups of tokens.

    Args:
        labels_T: each token's group, from 0.
        normalise: take absolute weights over their sum, as Figure 6 does for Mamba-2, whose weights have both signs:
            sums over tokens or heads would cancel.
    """
    labels = labels_T.long()
    member_TB = F.one_hot(labels, num_labels).double()
    sums = torch.zeros(tokens.num_heads, num_labels, num_labels, dtype=torch.float64, device=labels.device)
    num_queries, pairs = (torch.zeros_like(sums[0, 0]), torch.zeros_like(sums[0]))
    for index, rows in row_blocks(tokens, queries, max_elements=max_elements):
        weights = _shares(rows) if normalise else rows
        sums.index_add_(1, labels[index], (weights @ member_TB.to(weights.dtype)).double())
        pairs.index_add_(0, labels[index], readable(tokens.segments, index).double() @ member_TB)
        num_queries += member_TB[index].sum(0)
    return PooledMap(sums, num_queries.long(), pairs.long())


def head_statistics(
    tokens: TokenMap,
    *,
    num_sink_tokens: int = 1,
    queries: Tensor | None = None,
    max_elements: int = ROW_ELEMENTS,
) -> HeadStatistics:
    positions = tokens.segments.positions_T
    is_sink_T = (positions < num_sink_tokens).double()
    totals = torch.zeros(3, tokens.num_heads, dtype=torch.float64, device=positions.device)
    num_queries = 0
    for index, rows in row_blocks(tokens, queries, max_elements=max_elements):
        weights = _shares(rows).double()
        totals[0] += (weights @ is_sink_T).sum(1)
        totals[1] -= torch.xlogy(weights, weights).sum((1, 2))
        totals[2] += (weights.sum(-1) * positions[index] - weights @ positions.double()).sum(1)
        num_queries += len(index)
    return HeadStatistics(*(totals / num_queries))


def equal_bins(segments: Segments, num_bins: int) -> Tensor:
    """(T,) labels of equal ranges of each segment."""
    lengths_T = segments.lengths_S[segments.ids]
    return segments.positions_T * num_bins // lengths_T


def _shares(rows_HQT: Tensor) -> Tensor:
    return F.normalize(rows_HQT.abs(), p=1.0, dim=-1)
