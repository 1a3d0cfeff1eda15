"""The numbers of the paper's Figures 3 to 6 for any weights and questions: blocking, dropping, who reads from whom.

Turns a model and packs of answered questions into rows of plain values. Knows the model's analysis and how an answer is
scored; not files, pictures or where questions come from.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

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
    """Figure 3: which flows are cut, one after the other."""

    flows: tuple[Literal["v2i", "v2r"], ...] = ("v2i", "v2r")
    scopes: tuple[Literal["layer", "window", "from_layer"], ...] = ("from_layer",)
    window: int = 5
    """blocks of scope `window`"""
    kinds: tuple[Literal["attention", "mamba", "both"], ...] = ("both",)
    layers: tuple[int, ...] | None = None
    """None = every block that mixes tokens"""


@dataclass(frozen=True, kw_only=True, slots=True)
class DroppingSweep:
    """Figure 4: one site of plain dropping, at each layer with each choice."""

    selects: tuple[Literal["uniform", "attention"], ...] = ("uniform", "attention")
    keeps: tuple[float, ...] = (0.5, 0.1)
    layers: tuple[int, ...] | None = None
    """None = every block that mixes tokens; selection by attention leaves out those without"""


@dataclass(frozen=True, kw_only=True, slots=True)
class MapsConfig:
    """Figures 5 and 6: rows of attention and hidden attention, pooled."""

    num_samples: int = 8
    """the first questions, each with its right answer"""
    num_bins: int = 48
    """of a picture's side"""
    max_queries: int = 1024
    """of a sample, evenly spaced, its last token among them; bounds the time at long inputs"""
    layers: tuple[int, ...] | None = None
    """None = every block that mixes tokens"""

    def __post_init__(self) -> None:
        if min(self.num_samples, self.num_bins, self.max_queries) < 1:
            raise ValueError(f"{self.num_samples = }, {self.num_bins = }, {self.max_queries = } must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """Questions with all their options as packs, so that any run of the model can be scored."""

    batches: tuple[PackedBatch, ...]
    """one segment a (question, option), in order"""
    num_options: tuple[int, ...]
    """of each question; 1 where it has no choices"""
    right: tuple[int, ...]
    """the right option of each question"""

    def score(self, target_log_probs: Callable[[PackedBatch], tuple[Tensor, Tensor]]) -> dict[str, float | None]:
        """What a run of the model makes of the questions.

        Returns:
            `log_prob`: of the right answers, a token, averaged over questions. `accuracy`: share of the questions with
            choices whose likeliest option is the right one, by the option's whole log-probability; None without any.
        """
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
    """The blocks asked for, else all that mix tokens."""
    types = model.config.text.block_types
    return [layer for layer, kind in enumerate(types) if kind != "mlp"] if layers is None else list(layers)


def blocking_rows(model: TimeViper, answered: Answered, sweep: BlockingSweep) -> Iterator[dict[str, Any]]:
    """The score with nothing cut (`flow` "none"), then with each flow, scope, kind and layer."""
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
    """The score without any site (`select` "none"), then with one site of each choice, share and layer."""

    def score(sites: Sequence[TransVSite]) -> dict[str, float | None]:
        return answered.score(with_plan(model, sites).target_log_probs)

    types = model.config.text.block_types
    yield {"select": "none", "keep": 1.0, "layer": None, **score(())}
    for select in sweep.selects:
        for keep in sweep.keeps:
            for layer in mixing_layers(model, sweep.layers):
                if select == "uniform" or types[layer] == "attention":
                    site = TransVSite(layer=layer, select=select, keep=keep, transfer="none")
                    yield {"select": select, "keep": keep, "layer": layer, **score((site,))}


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerMap:
    """What is seen of one block over all samples."""

    layer: int
    block_type: str
    groups: PooledMap
    """between token kinds; Mamba's rows over their L1 norm first, as in Figure 6"""
    picture_BB: Tensor
    """averages between stretches of equal length, over samples and, their signs left out, over heads"""
    heads: HeadStatistics
    """averages over samples"""

    def rows(self) -> Iterator[dict[str, Any]]:
        """What a query of one kind gives to all tokens of another, averaged over heads."""
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


def layer_maps(model: TimeViper, batches: Sequence[PackedBatch], config: MapsConfig) -> list[LayerMap]:
    """The maps of every chosen block, over batches of one sample each."""
    types = model.config.text.block_types
    layers = mixing_layers(model, config.layers)
    seen: dict[int, list[tuple[PooledMap, PooledMap, HeadStatistics]]] = {layer: [] for layer in layers}

    def look(tokens: TokenMap, stream: TokenStream) -> tuple[PooledMap, PooledMap, HeadStatistics]:
        places = spread(len(tokens.segments.ids), config.max_queries, stream.hidden_TD.device)
        stretches = equal_bins(tokens.segments, config.num_bins)
        return (
            pool_map(tokens, stream.token_kind_T, len(KINDS), normalise=True, queries=places),
            pool_map(tokens, stretches, config.num_bins, normalise=True, queries=places),
            head_statistics(tokens, queries=places),
        )

    for number, batch in enumerate(batches):
        for layer, found in observe(model, batch, layers, look).items():
            seen[layer].append(found)
        logger.info("maps: %d of %d samples", number + 1, len(batches))
    return [
        LayerMap(
            layer=layer,
            block_type=types[layer],
            groups=_added([groups for groups, _, _ in found]),
            picture_BB=_added([picture for _, picture, _ in found]).mean_HAB.abs().mean(0),
            heads=HeadStatistics(
                *(torch.stack(of).mean(0) for of in zip(*(heads for _, _, heads in found), strict=True))
            ),
        )
        for layer, found in seen.items()
    ]


def spread(num_tokens: int, max_queries: int, device: torch.device) -> Tensor:
    """At most so many places, evenly spaced, the last one among them: spread(9, 3) -> 2, 5, 8."""
    count = min(num_tokens, max_queries)
    return (torch.arange(1, count + 1, device=device) * num_tokens) // count - 1


def _added(maps: Sequence[PooledMap]) -> PooledMap:
    """Sums of several samples' sums."""
    return PooledMap(*(torch.stack(of).sum(0) for of in zip(*maps, strict=True)))
