"""TransV for a prompt that comes in pieces: the same tokens dropped and handed over as in one pass.

Which tokens a site keeps is known from the counts alone where it selects evenly, so pieces cross it as they come; a
site that selects by attention makes all tokens wait until the instruction is there. Knows pieces, sites and the keys
and values that instruction tokens ask for; not blocks' states, features or requests. Inference alone, one prompt.

    piece 1   S S v v v        uniform site    S S v . v        the dropped ones' keys and values stay in the site's
    piece 2   v v v i i   ->   keep half   ->  . v . i i        TransferSources, for the instruction in a later piece
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from timeviper_model.batching.batch import TokenKind
from timeviper_model.batching.segments import Segments
from timeviper_model.config import TimeViperConfig, TransVSite
from timeviper_model.layers.attention import grouped_scores
from timeviper_model.layers.backbone import DecoderBlock
from timeviper_model.layers.transv import TransVLayer, evenly_spaced, num_kept


class SitePlan(NamedTuple):
    """A TransV site for a prompt whose vision tokens have been counted."""

    site: TransVSite
    num_present: int
    """vision tokens that reach the site"""
    num_kept: int

    @property
    def waits(self) -> bool:
        """True when the choice needs the instruction; keeping all or none needs no look at it."""
        return self.site.select == "attention" and 0 < self.num_kept < self.num_present

    @property
    def num_sources(self) -> int:
        """Vision tokens that the instruction is to read there, once the choice is made."""
        if self.site.transfer == "none":
            return 0
        return self.num_kept if self.site.transfer_from == "kept" else self.num_present - self.num_kept


def plan_sites(config: TimeViperConfig, num_vision_tokens: int) -> dict[int, SitePlan]:
    """What each site does to a prompt with that many vision tokens, by layer."""
    plans = {}
    present = num_vision_tokens
    for site in config.transv:
        kept = num_kept(num_vision_tokens, present, site.keep)
        plans[site.layer] = SitePlan(site, present, kept)
        present = kept
    return plans


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Neighbouring tokens of one prompt between two blocks."""

    hidden_TD: Tensor
    token_kind_T: Tensor
    position_T: Tensor
    """(T,) int64: places in the prompt"""

    def __len__(self) -> int:
        return len(self.position_T)

    @property
    def is_vision_T(self) -> Tensor:
        """(T,) bool"""
        return self.token_kind_T == TokenKind.VISION

    def segments(self) -> Segments:
        """What a block wants to know of where the tokens lie."""
        return Segments(torch.zeros_like(self.position_T), 1, self.position_T)

    def through(self, hidden_TD: Tensor) -> Piece:
        """The same tokens in another state."""
        return Piece(hidden_TD=hidden_TD, token_kind_T=self.token_kind_T, position_T=self.position_T)

    def keep(self, index: Tensor) -> Piece:
        """The tokens `index` (K,) int64, ascending, or bool (T,)."""
        return Piece(
            hidden_TD=self.hidden_TD[index], token_kind_T=self.token_kind_T[index], position_T=self.position_T[index]
        )


class TransferSources:
    """Keys and values (Hkv, K, E) of a site's K source tokens, in their order, filled as their pieces pass."""

    def __init__(self, num_sources: int, layer: TransVLayer) -> None:
        weight = layer.k_proj.weight
        self.keys = weight.new_empty(layer.num_kv_heads, num_sources, layer.head_dim)
        self.values = torch.empty_like(self.keys)
        self.count = 0

    def add(self, hidden_KD: Tensor, layer: TransVLayer) -> None:
        """The next sources, in their state at the site."""
        stop = self.count + len(hidden_KD)
        keys, values = layer.source_keys_values(hidden_KD)
        self.keys[:, self.count : stop] = keys.transpose(0, 1)
        self.values[:, self.count : stop] = values.transpose(0, 1)
        self.count = stop

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Keys and values."""
        return self.keys, self.values

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return self.keys.nbytes + self.values.nbytes


class Crossing:
    """A site whose kept tokens are known beforehand, crossed piece by piece."""

    def __init__(self, plan: SitePlan, layer: TransVLayer | None, device: torch.device) -> None:
        self._layer = layer
        self._from_kept = plan.site.transfer_from == "kept"
        self._kept_N = evenly_spaced(plan.num_present, plan.num_kept, device)
        self._num_passed = 0
        self.sources = None if layer is None else TransferSources(plan.num_sources, layer)

    def resume(self, sources: TransferSources | None) -> None:
        """Goes on behind the last vision token, with the sources that an earlier prompt has left."""
        self._num_passed = len(self._kept_N)
        self.sources = sources

    def cross(self, piece: Piece) -> Piece:
        """The piece behind the site."""
        is_vision_T = piece.is_vision_T
        stays_T = torch.ones_like(is_vision_T)
        stop = self._num_passed + int(is_vision_T.sum())
        stays_T[is_vision_T] = self._kept_N[self._num_passed : stop]
        self._num_passed = stop
        if self._layer is not None and self.sources is not None:
            is_source_T = is_vision_T & stays_T if self._from_kept else ~stays_T
            num_visible_T = self.sources.count + is_source_T.cumsum(0)
            self.sources.add(piece.hidden_TD[is_source_T], self._layer)
            piece = _receive(piece, self._layer, self.sources.keys, self.sources.values, num_visible_T)
        return piece.keep(stays_T)


class WaitingTokens:
    """Tokens before a site that selects by attention, with all that it will ask of them but the instruction."""

    def __init__(self, num_tokens: int, num_vision: int, block: DecoderBlock, layer: TransVLayer | None) -> None:
        weight, attention = block.attention_norm.weight, block.attention
        self.hidden_TD = weight.new_empty(num_tokens, len(weight))
        self.token_kind_T = torch.empty(num_tokens, dtype=torch.int8, device=weight.device)
        self.position_T = torch.empty(num_tokens, dtype=torch.int64, device=weight.device)
        self.score_keys = weight.new_empty(attention.num_kv_heads, num_tokens, attention.head_dim)
        self.sources = None if layer is None else TransferSources(num_vision, layer)
        """of every vision token: which of them will be sources is not known yet"""
        self.count = 0

    def __len__(self) -> int:
        return len(self.position_T)

    @property
    def is_full(self) -> bool:
        """True when every token it has room for has come."""
        return self.count == len(self)

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        own = [self.hidden_TD, self.token_kind_T, self.position_T, self.score_keys]
        return own + ([] if self.sources is None else list(self.sources.tensors))

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def add(self, piece: Piece, block: DecoderBlock, layer: TransVLayer | None) -> None:
        """The next tokens."""
        part = slice(self.count, self.count + len(piece))
        self.hidden_TD[part] = piece.hidden_TD
        self.token_kind_T[part] = piece.token_kind_T
        self.position_T[part] = piece.position_T
        keys = block.attention.keys(block.attention_norm(piece.hidden_TD), piece.position_T)
        self.score_keys[:, part] = keys.transpose(0, 1)
        if self.sources is not None and layer is not None:
            self.sources.add(piece.hidden_TD[piece.is_vision_T], layer)
        self.count = part.stop


def release_waiting(
    parts: Sequence[WaitingTokens],
    plan: SitePlan,
    block: DecoderBlock,
    layer: TransVLayer | None,
    *,
    first_response: int,
    max_tokens: int,
) -> Iterator[Piece]:
    """The kept tokens behind a site that selects by attention, in pieces of at most `max_tokens`.

    Args:
        parts: all tokens before the site, in order; they are left as they are.
        plan: what the site does.
        block: the block at the site, whose queries and keys select.
        layer: the cross-attention; None for `transfer: none`.
        first_response: place in the prompt of its first response token, or its length.
        max_tokens: of one piece.
    """
    is_vision_T = torch.cat([part.token_kind_T for part in parts]) == TokenKind.VISION
    kept_N = _select(parts, is_vision_T, plan.num_kept, block, first_response)
    stays_T = torch.ones_like(is_vision_T)
    stays_T[is_vision_T] = kept_N
    source_N = kept_N if plan.site.transfer_from == "kept" else ~kept_N
    num_visible_T = torch.zeros(len(stays_T), dtype=torch.long, device=stays_T.device)
    num_visible_T[is_vision_T] = source_N.long()
    num_visible_T = num_visible_T.cumsum(0)
    every = [part.sources for part in parts if part.sources is not None]
    keys, values = (_take([getattr(part, name) for part in every], source_N) for name in ("keys", "values"))
    for index in torch.split(stays_T.nonzero().squeeze(1), max_tokens):
        piece = _gather(parts, index)
        if layer is not None and keys is not None and values is not None:
            piece = _receive(piece, layer, keys, values, num_visible_T[index])
        yield piece


def _select(
    parts: Sequence[WaitingTokens], is_vision_T: Tensor, num_kept: int, block: DecoderBlock, first_response: int
) -> Tensor:
    """(N,) bool: the vision tokens that the last token before the first response looks at most; ties to the lower."""
    position_T = torch.cat([part.position_T for part in parts])
    place = max(0, int((position_T < first_response).sum()) - 1)
    row = _gather(parts, torch.tensor([place], device=position_T.device))
    query_1HE = block.attention.queries(block.attention_norm(row.hidden_TD), row.position_T)
    scores = torch.cat([grouped_scores(query_1HE, part.score_keys[None]) for part in parts], -1)[..., : place + 1]
    score_T = scores.new_zeros(len(position_T))
    score_T[: place + 1] = scores.softmax(-1).mean((0, 1, 2))
    best = score_T[is_vision_T].sort(descending=True, stable=True).indices[:num_kept]
    kept_N = torch.zeros(int(is_vision_T.sum()), dtype=torch.bool, device=best.device)
    kept_N[best] = True
    return kept_N


def _gather(parts: Sequence[WaitingTokens], index: Tensor) -> Piece:
    """The tokens `index` (K,), ascending, counted through all parts."""
    first, pieces = 0, []
    for part in parts:
        own = index[(index >= first) & (index < first + len(part))] - first
        first += len(part)
        pieces.append(
            Piece(hidden_TD=part.hidden_TD[own], token_kind_T=part.token_kind_T[own], position_T=part.position_T[own])
        )
    return Piece(
        hidden_TD=torch.cat([piece.hidden_TD for piece in pieces]),
        token_kind_T=torch.cat([piece.token_kind_T for piece in pieces]),
        position_T=torch.cat([piece.position_T for piece in pieces]),
    )


def _take(sources: list[Tensor], chosen_N: Tensor) -> Tensor | None:
    """(Hkv, K, E): the chosen of all sources (Hkv, N, E); None without any part."""
    index, first, taken = chosen_N.nonzero().squeeze(1), 0, []
    for part in sources:
        stop = first + part.shape[1]
        taken.append(part.index_select(1, index[(index >= first) & (index < stop)] - first))
        first = stop
    return torch.cat(taken, dim=1) if taken else None


def _receive(piece: Piece, layer: TransVLayer, keys: Tensor, values: Tensor, num_visible_T: Tensor) -> Piece:
    """Adds to each instruction token what it reads from the sources before it."""
    index = (piece.token_kind_T == TokenKind.INSTRUCTION).nonzero().squeeze(1)
    num_visible: list[int] = num_visible_T[index].tolist()
    if not any(num_visible):
        return piece
    given = layer.read(piece.hidden_TD[index], keys, values, num_visible)
    return piece.through(piece.hidden_TD.index_add(0, index, given))
