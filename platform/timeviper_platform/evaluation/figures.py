"""Computes the numbers of the paper's Figures 3 to 6."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from timeviper_model.analysis.blocking import Blocking, cut_flow
from timeviper_model.analysis.dropping import with_plan
from timeviper_model.analysis.maps import TokenMap, observe
from timeviper_model.analysis.pooling import HeadStatistics, PooledMap, equal_bins, head_statistics, pool_map
from timeviper_model.batching.batch import PackedBatch, TokenKind
from timeviper_model.config import TransVSite
from timeviper_model.layers.transv import TokenStream
from timeviper_model.timeviper import TimeViper

logger = logging.getLogger(__name__)

KINDS = [kind.name.lower() for kind in TokenKind]


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockingSweep:
    """Blocks one flow of information per measurement (Figure 3)."""

    flows: tuple[Literal["v2i", "v2r"], ...] = ("v2i", "v2r")
    """Vision to instruction (v2i), vision to response (v2r)."""
    scopes: tuple[Literal["layer", "window", "from_layer"], ...] = ("from_layer",)
    """Extent of blocking: one block, `window` blocks, or all from one on."""
    window: int = 5
    """Number of blocks in scope `window`."""
    kinds: tuple[Literal["attention", "mamba", "both"], ...] = ("both",)
    """Kinds of affected blocks."""
    layers: tuple[int, ...] | None = None
    """Measured blocks; null = all that mix tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DroppingSweep:
    """Drops vision tokens before one block per measurement (Figure 4)."""

    selections: tuple[Literal["uniform", "attention"], ...] = ("uniform", "attention")
    """Criteria for keeping tokens."""
    keep_ratios: tuple[float, ...] = (0.5, 0.1)
    """Shares of kept vision tokens."""
    layers: tuple[int, ...] | None = None
    """Measured blocks; null = all that mix tokens. `attention` needs an attention block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MapsConfig:
    """Pooled maps of attention and Mamba's hidden attention (Figures 5 and 6)."""

    num_questions: int = 8
    """Number of questions to map."""
    num_bins: int = 48
    """Rows and columns of a map."""
    max_queries: int = 1024
    """Maximum queries per question, evenly spaced."""
    layers: tuple[int, ...] | None = None
    """Mapped blocks; null = all that mix tokens."""

    def __post_init__(self) -> None:
        if min(self.num_questions, self.num_bins, self.max_queries) < 1:
            raise ValueError(f"{self.num_questions = }, {self.num_bins = }, {self.max_queries = } must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """Packed questions with all options."""

    batches: tuple[PackedBatch, ...]
    """One segment per (question, option), in order."""
    num_options: tuple[int, ...]
    """Number of options per question; 1 without choices."""
    right: tuple[int, ...]
    """Index of each right option."""

    def score(self, target_log_probs: Callable[[PackedBatch], tuple[Tensor, Tensor]]) -> dict[str, float | None]:
        """Returns the right answers' `log_prob` per token and the `accuracy` of choices."""
        sums, counts = [], []
        for batch in self.batches:
            log_probs_K, segment_ids_K = target_log_probs(batch)
            zeros = torch.zeros(batch.num_segments, dtype=torch.float64, device=log_probs_K.device)
            segments = segment_ids_K.long()
            sums += zeros.index_add(0, segments, log_probs_K.double()).tolist()
            counts += torch.bincount(segments, minlength=batch.num_segments).tolist()
        log_probs, hits, first = [], [], 0
        for number, right in zip(self.num_options, self.right, strict=True):
            own = sums[first : first + number]
            log_probs.append(own[right] / counts[first + right])
            if number > 1:
                hits.append(float(own.index(max(own)) == right))
            first += number
        return {
            "log_prob": sum(log_probs) / len(log_probs),
            "accuracy": sum(hits) / len(hits) if hits else None,
        }


def mixing_layers(model: TimeViper, layers: tuple[int, ...] | None) -> list[int]:
    types = model.config.text.block_types
    return [layer for layer, kind in enumerate(types) if kind != "mlp"] if layers is None else list(layers)


def blocking_rows(model: TimeViper, answered: Answered, sweep: BlockingSweep) -> Iterator[dict[str, Any]]:
    """Yields a baseline (`flow` "none"), then one score per flow, scope, kind and layer."""
    start = answered.score(model.target_log_probs)
    yield {"flow": "none", "scope": "", "kind": "", "layer": None, **start}
    for flow in sweep.flows:
        for scope in sweep.scopes:
            for kind in sweep.kinds:
                for layer in mixing_layers(model, sweep.layers):
                    window = sweep.window if scope == "window" else 1
                    cut = Blocking(flow=flow, scope=scope, layer=layer, window=window, kind=kind)
                    score = answered.score(partial(model.target_log_probs, run_block=cut_flow(model, cut)))
                    yield {"flow": flow, "scope": scope, "kind": kind, "layer": layer, **score}


def dropping_rows(model: TimeViper, answered: Answered, sweep: DroppingSweep) -> Iterator[dict[str, Any]]:
    """Yields a baseline (`select` "none"), then one score per selection, ratio and layer."""

    def score(sites: Sequence[TransVSite]) -> dict[str, float | None]:
        return answered.score(with_plan(model, sites).target_log_probs)

    types = model.config.text.block_types
    yield {"select": "none", "keep": 1.0, "layer": None, **score(())}
    for select in sweep.selections:
        for keep in sweep.keep_ratios:
            for layer in mixing_layers(model, sweep.layers):
                if select == "uniform" or types[layer] == "attention":
                    site = TransVSite(layer=layer, select=select, keep=keep, transfer="none")
                    yield {"select": select, "keep": keep, "layer": layer, **score((site,))}


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerMap:
    layer: int
    block_type: str
    groups: PooledMap
    """Absolute weights between token kinds, as shares of a query's row (Figure 6)."""
    picture_BB: Tensor
    """The same between bins, averaged over heads (Figure 5); a row sums to 1, or is NaN without queries."""
    heads: HeadStatistics
    """Averages over questions."""
    kind_ends: tuple[float, ...]
    """Where each kind of token ends in this block's input, as a share of it, averaged over questions."""

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
    """Each batch holds one question."""
    types = model.config.text.block_types
    layers = mixing_layers(model, config.layers)
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
            picture_BB=_sum([own.picture for own in pooled]).share_HAB.mean(0),
            heads=HeadStatistics(
                *(torch.stack(values).mean(0) for values in zip(*(own.heads for own in pooled), strict=True))
            ),
            kind_ends=tuple(torch.stack([own.kind_ends_K for own in pooled]).mean(0).tolist()),
        )
        for layer, pooled in maps.items()
    ]


def spread(num_tokens: int, max_queries: int, device: torch.device) -> Tensor:
    """Returns evenly spaced indices: spread(9, 3) -> 2, 5, 8."""
    count = min(num_tokens, max_queries)
    return (torch.arange(1, count + 1, device=device) * num_tokens) // count - 1


def _sum(maps: Sequence[PooledMap]) -> PooledMap:
    return PooledMap(*(torch.stack(values).sum(0) for values in zip(*maps, strict=True)))
