"""TransV for prompts in chunks, with the same result as in one pass. Inference only.

A uniform site's selection depends on counts alone; attention and importance wait for the instruction.

    chunk 1   SSvvv     uniform site    SSv.v     keys and values of dropped tokens stay in TransferSources
    chunk 2   vvvii  ->  keep half  ->  .v.ii     for the instruction of a later chunk
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from timeviper_model.batching.batch import TokenKind
from timeviper_model.batching.segments import Segments
from timeviper_model.config import Select, TimeViperConfig, TransVSite
from timeviper_model.layers.attention import grouped_scores
from timeviper_model.layers.backbone import DecoderBlock
from timeviper_model.layers.importance import importance_of, instruction_index, score_inputs
from timeviper_model.layers.mamba2 import Mamba2Mixer
from timeviper_model.layers.nemotron_h import Block
from timeviper_model.layers.transv import TransVLayer, evenly_spaced, num_kept


class SitePlan(NamedTuple):
    """A TransV site for a known number of vision tokens."""

    site: TransVSite
    num_present: int
    num_kept: int

    @property
    def waits(self) -> bool:
        """Whether selection needs the instruction."""
        return self.site.select in ("attention", "importance") and 0 < self.num_kept < self.num_present

    @property
    def num_sources(self) -> int:
        """Vision tokens that the instruction reads."""
        if self.site.transfer == "none":
            return 0
        return self.num_kept if self.site.transfer_from == "kept" else self.num_present - self.num_kept


def plan_sites(config: TimeViperConfig, num_vision_tokens: int) -> dict[int, SitePlan]:
    plans = {}
    present = num_vision_tokens
    for site in config.transv:
        kept = num_kept(num_vision_tokens, present, site.keep)
        plans[site.layer] = SitePlan(site, present, kept)
        present = kept
    return plans


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenChunk:
    """Tokens of one prompt between two blocks, in order."""

    hidden_TD: Tensor
    token_kind_T: Tensor
    position_T: Tensor

    def __len__(self) -> int:
        return len(self.position_T)

    @property
    def is_vision_T(self) -> Tensor:
        return self.token_kind_T == TokenKind.VISION

    def segments(self) -> Segments:
        return Segments(torch.zeros_like(self.position_T), 1, self.position_T)

    def with_hidden(self, hidden_TD: Tensor) -> TokenChunk:
        return TokenChunk(hidden_TD=hidden_TD, token_kind_T=self.token_kind_T, position_T=self.position_T)

    def last(self, hidden_1D: Tensor) -> TokenChunk:
        return TokenChunk(hidden_TD=hidden_1D, token_kind_T=self.token_kind_T[-1:], position_T=self.position_T[-1:])

    def keep(self, index: Tensor) -> TokenChunk:
        return TokenChunk(
            hidden_TD=self.hidden_TD[index], token_kind_T=self.token_kind_T[index], position_T=self.position_T[index]
        )


class TransferSources:
    """Keys and values (Hkv, K, E) of a site's K source tokens, filled chunk by chunk."""

    def __init__(self, num_sources: int, layer: TransVLayer) -> None:
        weight = layer.k_proj.weight
        self.keys = weight.new_empty(layer.num_kv_heads, num_sources, layer.head_dim)
        self.values = torch.empty_like(self.keys)
        self.count = 0

    def add(self, hidden_KD: Tensor, layer: TransVLayer) -> None:
        stop = self.count + len(hidden_KD)
        keys, values = layer.source_keys_values(hidden_KD)
        self.keys[:, self.count : stop] = keys.transpose(0, 1)
        self.values[:, self.count : stop] = values.transpose(0, 1)
        self.count = stop

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def to(self, device: torch.device | str) -> TransferSources:
        moved = copy.copy(self)
        moved.keys, moved.values = self.keys.to(device), self.values.to(device)
        return moved


class Crossing:
    """A site with selection known in advance."""

    def __init__(self, plan: SitePlan, layer: TransVLayer | None, device: torch.device) -> None:
        self._layer = layer
        self._from_kept = plan.site.transfer_from == "kept"
        self._kept_N = evenly_spaced(plan.num_present, plan.num_kept, device)
        self._num_passed = 0
        self.sources = None if layer is None else TransferSources(plan.num_sources, layer)

    def resume(self, sources: TransferSources | None) -> None:
        """Continues after a cached prefix."""
        self._num_passed = len(self._kept_N)
        self.sources = sources

    def cross(self, chunk: TokenChunk) -> TokenChunk:
        is_vision_T = chunk.is_vision_T
        stays_T = torch.ones_like(is_vision_T)
        stop = self._num_passed + int(is_vision_T.sum())
        stays_T[is_vision_T] = self._kept_N[self._num_passed : stop]
        self._num_passed = stop
        if self._layer is not None and self.sources is not None:
            is_source_T = is_vision_T & stays_T if self._from_kept else ~stays_T
            num_visible_T = self.sources.count + is_source_T.cumsum(0)
            self.sources.add(chunk.hidden_TD[is_source_T], self._layer)
            chunk = _receive(chunk, self._layer, self.sources.keys, self.sources.values, num_visible_T)
        return chunk.keep(stays_T)


class WaitingTokens:
    """Tokens before a site that waits for the instruction."""

    def __init__(
        self, num_tokens: int, num_vision: int, block: DecoderBlock, layer: TransVLayer | None, *, select: Select
    ) -> None:
        weight = block.attention_norm.weight
        self.hidden_TD = weight.new_empty(num_tokens, len(weight))
        self.token_kind_T = torch.empty(num_tokens, dtype=torch.int8, device=weight.device)
        self.position_T = torch.empty(num_tokens, dtype=torch.int64, device=weight.device)
        self.score_keys: Tensor | None = None
        """(Hkv, T, E) for `select: attention`; importance is computed at the end."""
        if select == "attention":
            attention = block.attention
            self.score_keys = weight.new_empty(attention.num_kv_heads, num_tokens, attention.head_dim)
        self.sources = None if layer is None else TransferSources(num_vision, layer)
        """Every vision token may be a source."""
        self.count = 0

    def __len__(self) -> int:
        return len(self.position_T)

    @property
    def is_full(self) -> bool:
        return self.count == len(self)

    @property
    def tensors(self) -> list[Tensor]:
        own = [self.hidden_TD, self.token_kind_T, self.position_T]
        own += [] if self.score_keys is None else [self.score_keys]
        return own + ([] if self.sources is None else list(self.sources.tensors))

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def to(self, device: torch.device | str) -> WaitingTokens:
        moved = copy.copy(self)
        for name in ("hidden_TD", "token_kind_T", "position_T"):
            setattr(moved, name, getattr(self, name).to(device))
        moved.score_keys = None if self.score_keys is None else self.score_keys.to(device)
        moved.sources = self.sources and self.sources.to(device)
        return moved

    def add(self, chunk: TokenChunk, block: DecoderBlock, layer: TransVLayer | None) -> None:
        rows = slice(self.count, self.count + len(chunk))
        self.hidden_TD[rows] = chunk.hidden_TD
        self.token_kind_T[rows] = chunk.token_kind_T
        self.position_T[rows] = chunk.position_T
        if self.score_keys is not None:
            keys = block.attention.keys(block.attention_norm(chunk.hidden_TD), chunk.position_T)
            self.score_keys[:, rows] = keys.transpose(0, 1)
        if self.sources is not None and layer is not None:
            self.sources.add(chunk.hidden_TD[chunk.is_vision_T], layer)
        self.count = rows.stop


def release_waiting(
    waiting: Sequence[WaitingTokens],
    plan: SitePlan,
    block: DecoderBlock,
    layer: TransVLayer | None,
    *,
    first_response: int,
    max_tokens: int,
) -> Iterator[TokenChunk]:
    """Yields the tokens kept by a site that selects by attention or importance.

    Args:
        block: block after the site, whose queries and keys select.
        first_response: index of the first response token, or the prompt's length.
    """
    is_vision_T = torch.cat([tokens.token_kind_T for tokens in waiting]) == TokenKind.VISION
    position_T = torch.cat([tokens.position_T for tokens in waiting])
    last = max(0, int((position_T < first_response).sum()) - 1)
    if plan.site.select == "importance":
        score_T = _importance(waiting, block, last, max_tokens)
    else:
        score_T = _attention_row(waiting, block, last)
    best = score_T[is_vision_T].sort(descending=True, stable=True).indices[: plan.num_kept]
    kept_N = torch.zeros(plan.num_present, dtype=torch.bool, device=best.device)
    kept_N[best] = True
    stays_T = torch.ones_like(is_vision_T)
    stays_T[is_vision_T] = kept_N
    source_N = kept_N if plan.site.transfer_from == "kept" else ~kept_N
    num_visible_T = torch.zeros(len(stays_T), dtype=torch.long, device=stays_T.device)
    num_visible_T[is_vision_T] = source_N.long()
    num_visible_T = num_visible_T.cumsum(0)
    sources = [tokens.sources for tokens in waiting if tokens.sources is not None]
    keys, values = (_take([getattr(source, name) for source in sources], source_N) for name in ("keys", "values"))
    for index in torch.split(stays_T.nonzero().squeeze(1), max_tokens):
        chunk = _gather(waiting, index)
        if layer is not None and keys is not None and values is not None:
            chunk = _receive(chunk, layer, keys, values, num_visible_T[index])
        yield chunk


def _attention_row(waiting: Sequence[WaitingTokens], block: DecoderBlock, last: int) -> Tensor:
    """(T,) attention of token `last`, averaged over heads."""
    row = _gather(waiting, torch.tensor([last], device=waiting[0].position_T.device))
    query_1HE = block.attention.queries(block.attention_norm(row.hidden_TD), row.position_T)
    keys = [tokens.score_keys for tokens in waiting if tokens.score_keys is not None]
    scores = torch.cat([grouped_scores(query_1HE, keys_GLE[None]) for keys_GLE in keys], -1)
    score_T = scores.new_zeros(scores.shape[-1])
    score_T[: last + 1] = scores[..., : last + 1].softmax(-1).mean((0, 1, 2))
    return score_T


def _importance(waiting: Sequence[WaitingTokens], block: DecoderBlock, last: int, max_tokens: int) -> Tensor:
    """(T,) importance for the instruction up to `last`."""
    kind_T = torch.cat([tokens.token_kind_T for tokens in waiting])
    query_index = instruction_index(kind_T, last)
    is_query_T = torch.zeros_like(kind_T, dtype=torch.bool)
    is_query_T[query_index] = True
    num_before = 0  # tokens that a convolution at a chunk's start reads
    if isinstance(block, Block) and isinstance(block.mixer, Mamba2Mixer):
        num_before = block.mixer.conv1d.kernel_size[0] - 1
    parts, queries = [], []
    for start in range(0, len(kind_T), max_tokens):
        first, stop = max(0, start - num_before), min(start + max_tokens, len(kind_T))
        chunk = _gather(waiting, torch.arange(first, stop, device=kind_T.device))
        part = score_inputs(block, chunk.hidden_TD, chunk.segments()).take(slice(start - first, None))
        queries.append(part.queries[is_query_T[start:stop]])
        parts.append(part)
    dt = [part.dt_TH for part in parts if part.dt_TH is not None]
    keys = torch.cat([part.keys for part in parts])
    return importance_of(torch.cat(queries), keys, torch.cat(dt) if dt else None, query_index)


def _gather(waiting: Sequence[WaitingTokens], index: Tensor) -> TokenChunk:
    first, chunks = 0, []
    for tokens in waiting:
        own = index[(index >= first) & (index < first + len(tokens))] - first
        first += len(tokens)
        chunks.append(
            TokenChunk(
                hidden_TD=tokens.hidden_TD[own],
                token_kind_T=tokens.token_kind_T[own],
                position_T=tokens.position_T[own],
            )
        )
    return TokenChunk(
        hidden_TD=torch.cat([chunk.hidden_TD for chunk in chunks]),
        token_kind_T=torch.cat([chunk.token_kind_T for chunk in chunks]),
        position_T=torch.cat([chunk.position_T for chunk in chunks]),
    )


def _take(sources: list[Tensor], chosen_N: Tensor) -> Tensor | None:
    index, first, taken = chosen_N.nonzero().squeeze(1), 0, []
    for source in sources:
        stop = first + source.shape[1]
        taken.append(source.index_select(1, index[(index >= first) & (index < stop)] - first))
        first = stop
    return torch.cat(taken, dim=1) if taken else None


def _receive(chunk: TokenChunk, layer: TransVLayer, keys: Tensor, values: Tensor, num_visible_T: Tensor) -> TokenChunk:
    index = (chunk.token_kind_T == TokenKind.INSTRUCTION).nonzero().squeeze(1)
    num_visible: list[int] = num_visible_T[index].tolist()
    if not any(num_visible):
        return chunk
    update = layer.read(chunk.hidden_TD[index], keys, values, num_visible)
    return chunk.with_hidden(chunk.hidden_TD.index_add(0, index, update))
