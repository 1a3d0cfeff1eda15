"""Averages of a block's map: between groups of tokens, and over each head's rows (the paper's Figures 5 and 6).

Turns a map's rows, block by block, into sums whose size does not depend on the length. Groups are any labels: token
kinds for the paper's group averages, `equal_bins` for a picture of a long map. Knows weights and labels; not blocks.
"""

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
    """float64, of weights"""
    num_queries_A: Tensor
    """int64"""
    num_pairs_AB: Tensor
    """int64: (query, token it may read)"""

    @property
    def share_HAB(self) -> Tensor:
        """What a query of A gives to all of B, on average; a row of attention's shares sums to one. NaN without any."""
        return self.sum_HAB / self.num_queries_A[:, None]

    @property
    def mean_HAB(self) -> Tensor:
        """The average weight of a pair; NaN where there is none."""
        return self.sum_HAB / self.num_pairs_AB


class HeadStatistics(NamedTuple):
    """Averages over queries of each head's rows, taken as distributions: absolute values over their sum."""

    sink_share_H: Tensor
    """on the first tokens of the query's segment (the attention sink of arXiv 2309.17453)"""
    entropy_H: Tensor
    """nats"""
    distance_H: Tensor
    """tokens from the query back to what it reads, counting those present"""


def pool_map(
    tokens: TokenMap,
    labels_T: Tensor,
    num_labels: int,
    *,
    normalise: bool = False,
    queries: Tensor | None = None,
    max_elements: int = ROW_ELEMENTS,
) -> PooledMap:
    """Sums of a map between groups of tokens.

    Args:
        tokens: the map.
        labels_T: (T,) integers from 0, each token's group, as query and as what is read.
        num_labels: A = B.
        normalise: divide each row by its L1 norm first, as Figure 6 does with Mamba-2's.
        queries: flat indices of the queries; default all. A long input may take a sample of them.
    """
    labels = labels_T.long()
    member_TB = F.one_hot(labels, num_labels).double()
    sums = torch.zeros(tokens.num_heads, num_labels, num_labels, dtype=torch.float64, device=labels.device)
    num_queries, pairs = (torch.zeros_like(sums[0, 0]), torch.zeros_like(sums[0]))
    for index, rows in row_blocks(tokens, queries, max_elements=max_elements):
        weights = _over_l1(rows) if normalise else rows
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
    """Sink share, entropy and distance of every head, over the queries `queries` (default all)."""
    positions = tokens.segments.positions_T
    is_sink_T = (positions < num_sink_tokens).double()
    totals = torch.zeros(3, tokens.num_heads, dtype=torch.float64, device=positions.device)
    num_queries = 0
    for index, rows in row_blocks(tokens, queries, max_elements=max_elements):
        weights = _over_l1(rows.abs()).double()
        totals[0] += (weights @ is_sink_T).sum(1)
        totals[1] -= torch.xlogy(weights, weights).sum((1, 2))
        totals[2] += (weights.sum(-1) * positions[index] - weights @ positions.double()).sum(1)
        num_queries += len(index)
    return HeadStatistics(*(totals / num_queries))


def equal_bins(segments: Segments, num_bins: int) -> Tensor:
    """(T,) labels for `pool_map`: each segment cut into `num_bins` stretches of equal length, for a picture of it."""
    lengths_T = segments.lengths_S[segments.ids]
    return segments.positions_T * num_bins // lengths_T


def _over_l1(rows_HQT: Tensor) -> Tensor:
    """Each row over the sum of its absolute values; a row of zeros stays one."""
    return F.normalize(rows_HQT, p=1.0, dim=-1)
