"""Prefill: one prompt into one slot, a bounded piece a call, whatever the prompt's length.

Turns ids and blocks of vision features into the slot's states, keys and values and the next token's logits. Knows the
block loop and where it must wait; not queues, requests or which prefixes are worth keeping.

Blocks fall into spans, cut before each site that selects by attention. Pieces go through the first span as they are
read. At its end they wait, the survivors of earlier sites only, until the instruction is there; what the site keeps
then goes through the next span, again in pieces. Peak memory: a piece's activations, the waiting hidden states with
their score and transfer keys, and what the cache holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from timeviper_model.batching.batch import PADDING_SEGMENT, PackedBatch, TokenKind
from timeviper_model.inference.chunked_transv import (
    Crossing,
    Piece,
    TransferSources,
    WaitingTokens,
    plan_sites,
    release_waiting,
)
from timeviper_model.layers.cache import MIN_CAPACITY, HybridCache, SavedSlot

if TYPE_CHECKING:
    from timeviper_model.timeviper import TimeViper
from timeviper_model.inference.requests import DEFAULT_CHUNK_TOKENS


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixEntry:
    """Everything of a prompt's system and vision tokens that no question changes; shared, so never written to.

    The states, keys and values of the blocks before the first site that waits, what the instruction will read at the
    sites among them, and the tokens that wait there. Without such a site, of all blocks.
    """

    num_tokens: int
    """system and vision"""
    slot: SavedSlot
    sources: dict[int, TransferSources]
    """by layer"""
    waiting: WaitingTokens | None

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        sources = sum(part.num_bytes for part in self.sources.values())
        return self.slot.num_bytes + sources + (0 if self.waiting is None else self.waiting.num_bytes)

    @property
    def is_finite(self) -> bool:
        """False when some feature or state has overflowed or was no number, which every question would read."""
        tensors = [*self.slot.tensors, *(part for source in self.sources.values() for part in source.tensors)]
        tensors += [] if self.waiting is None else self.waiting.tensors
        return all(bool(tensor.isfinite().all()) for tensor in tensors)


def prefix_length(token_kind: Tensor) -> int:
    """How many first tokens no question can change: system and then all vision; 0 where text stands in between.

    `s s v v v i i` -> 5, `s v i v i` -> 0 (the second medium's tokens have read the first question), `s i` -> 0.
    """
    vision = (token_kind == TokenKind.VISION).nonzero().squeeze(1)
    if not len(vision):
        return 0
    first, stop = int(vision[0]), int(vision[-1]) + 1
    is_prefix = len(vision) == stop - first and bool((token_kind[:first] == TokenKind.SYSTEM).all())
    return stop if is_prefix and stop < len(token_kind) else 0


class Prefill:
    """A prompt on its way into a slot; `advance` until it gives logits.

    Memory of a piece is bounded by `max_chunk_tokens`; the result differs from another cut's by rounding alone.
    """

    def __init__(
        self,
        model: TimeViper,
        input_ids: Tensor,
        token_kind: Tensor,
        features: Callable[[], Iterable[Tensor]],
        cache: HybridCache,
        slot: int,
        *,
        max_chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
        boundary: int = 0,
        prefix: PrefixEntry | None = None,
        on_prefix: Callable[[PrefixEntry], None] | None = None,
    ) -> None:
        """Empties the slot; reads nothing yet.

        Args:
            model: in eval mode.
            input_ids: (T,) int64 on the model's device, any id at vision positions.
            token_kind: (T,) int8 of TokenKind.
            features: called once, when the first vision token's turn has come (not at all with `prefix`), for the
                vision rows in their order, in blocks (rows, dim) of any size. Blocks are asked for as pieces need
                them. A block of no rows says 'not yet': the call of `advance` ends without work.
            cache: of the model.
            slot: of the cache.
            max_chunk_tokens: tokens that go through the blocks together.
            boundary: a place of the prompt at which pieces are cut; 0 = none. `prefix_length` gives the one at which
                a prefix can be kept.
            prefix: an entry made at this boundary of a prompt with the same system and vision tokens.
            on_prefix: is given the entry of this prompt when the boundary has been read.

        Raises:
            ValueError: for a prompt without tokens, or a chunk of none.
        """
        if not len(input_ids) or max_chunk_tokens < 1:
            raise ValueError(f"a prompt of {len(input_ids)} tokens in pieces of {max_chunk_tokens}: both must be >= 1")
        self._model, self._cache, self._slot = model, cache, slot
        self._input_ids, self._token_kind = input_ids, token_kind
        self._max_tokens, self._boundary = max_chunk_tokens, boundary
        self._on_prefix = on_prefix
        num_vision = int((token_kind == TokenKind.VISION).sum())
        self._num_text = len(input_ids) - num_vision
        response = (token_kind == TokenKind.RESPONSE).nonzero().squeeze(1)
        self._first_response = int(response[0]) if len(response) else len(input_ids)
        self._plans = plan_sites(model.config, num_vision)
        stops = [layer for layer, plan in self._plans.items() if plan.waits]
        self._spans = list(zip([0, *stops], [*stops, model.config.text.num_hidden_layers], strict=True))
        self._crossings = {
            layer: Crossing(plan, model.transv_layer(layer), input_ids.device)
            for layer, plan in self._plans.items()
            if not plan.waits
        }
        self._rows = _FeatureRows(features, num_vision)
        self._last_1D: Tensor | None = None
        self.num_read = 0
        """tokens taken through their spans so far"""
        self.is_waiting = False
        """True when the last `advance` found no features to go on with"""
        self._view = cache.view([slot])
        cache.reset(slot)
        self._reserve()
        self._waiting = self._waiting_at(stops[0], boundary) if stops else []
        self._num_resumed = 0
        if prefix is not None:
            self._resume(prefix)
        self._steps = self._run()
        self._next_size: int | None = 0

    def _reserve(self) -> None:
        """Makes room for what the prompt leaves in the cache, which is not copied from size to size as it grows."""
        present = self._rows.num_rows
        for layer in range(self._model.config.text.num_hidden_layers):
            present = self._plans[layer].num_kept if layer in self._plans else present
            if layer in self._cache.attention:
                self._cache.attention[layer].reserve(self._num_text + present + MIN_CAPACITY)  # and for a first answer

    def advance(self, max_tokens: int | None = None) -> Tensor | None:
        """Takes pieces through their span; the next token's (V,) logits when done.

        Args:
            max_tokens: of the pieces in all, `max_chunk_tokens` when None; where to cut them is not changed by it, so
                with less than that there may be no piece that fits.

        Raises:
            ValueError: when the features do not fit the prompt's vision tokens.
        """
        left = self._max_tokens if max_tokens is None else max_tokens
        while self._next_size is not None and self._next_size <= left:
            size = self._next_size
            self._next_size = next(self._steps, None)
            if self.is_waiting:
                return None
            left -= size
            self.num_read += size
        if self._next_size is not None:
            return None
        if self._last_1D is None:
            raise ValueError("TransV has dropped every token of the prompt; end it with text")
        self._cache.num_tokens[self._slot] = len(self._input_ids)
        return self._model.logits(self._last_1D)[0]

    def _run(self) -> Iterator[int]:
        """Yields each piece's size before taking it through its span, again while its features are not there."""
        for part in self._cuts():
            yield part.stop - part.start
            while not self._rows.has(int((self._token_kind[part] == TokenKind.VISION).sum())):
                self.is_waiting = True
                yield part.stop - part.start
            self.is_waiting = False
            self._flow(self._embed(part), *self._spans[0])
            if self._on_prefix is not None and part.stop == self._boundary:
                self._on_prefix(self._entry())
        self._rows.finish()
        for number, (layer, stop) in enumerate(self._spans[1:], start=2):
            parts = self._waiting
            self._waiting = self._waiting_at(stop, 0) if number < len(self._spans) else []
            pieces = release_waiting(
                parts,
                self._plans[layer],
                self._model.backbone.block(layer),
                self._model.transv_layer(layer),
                first_response=self._first_response,
                max_tokens=self._max_tokens,
            )
            for piece in pieces:
                yield len(piece)
                self._flow(piece, layer, stop)

    def _cuts(self) -> Iterator[slice]:
        """The parts of the prompt that are still to be read, cut at the boundary."""
        stop = self._num_resumed
        while stop < len(self._input_ids):
            start, limit = stop, self._boundary if stop < self._boundary else len(self._input_ids)
            stop = min(start + self._max_tokens, limit)
            yield slice(start, stop)

    def _embed(self, part: slice) -> Piece:
        """That part before the first block."""
        kinds = self._token_kind[part]
        is_vision = kinds == TokenKind.VISION
        hidden = self._model.backbone.embeddings(self._input_ids[part])
        if num_rows := int(is_vision.sum()):
            weight = next(self._model.projector.parameters())
            places, features = self._rows.take(num_rows)
            projected = self._model.projector(features.to(weight.device, weight.dtype), places.to(weight.device))
            hidden[is_vision] = projected.to(hidden.dtype)
        positions = torch.arange(part.start, part.stop, device=hidden.device)
        return Piece(hidden_TD=hidden, token_kind_T=kinds, position_T=positions)

    def _flow(self, piece: Piece, first: int, stop: int) -> None:
        """Takes a piece through a span's blocks, to where it waits or to the end."""
        segments = piece.segments()
        for layer in range(first, stop):
            if layer in self._crossings:
                piece = self._crossings[layer].cross(piece)
                segments = piece.segments()
            if len(piece):
                block = self._model.backbone.block(layer)
                piece = piece.through(block(piece.hidden_TD, segments, self._view.layer(layer)))
        if self._waiting:
            part = next((part for part in self._waiting if not part.is_full), self._waiting[-1])
            part.add(piece, self._model.backbone.block(stop), self._model.transv_layer(stop))
        elif len(piece):
            self._last_1D = piece.hidden_TD[-1:]

    def _waiting_at(self, layer: int, boundary: int) -> list[WaitingTokens]:
        """Room for every token that will wait before block `layer`, apart up to the boundary and behind it."""
        num_vision = self._plans[layer].num_present
        total = self._num_text + num_vision
        before = boundary - self._rows.num_rows + num_vision if boundary else total
        block, module = self._model.backbone.block(layer), self._model.transv_layer(layer)
        rooms = [(before, num_vision), (total - before, 0)] if boundary else [(total, num_vision)]
        return [WaitingTokens(tokens, vision, block, module) for tokens, vision in rooms]

    def _entry(self) -> PrefixEntry:
        stop = self._spans[0][1]
        return PrefixEntry(
            num_tokens=self._boundary,
            slot=self._cache.save(self._slot, stop),
            sources={
                layer: crossing.sources
                for layer, crossing in self._crossings.items()
                if layer < stop and crossing.sources is not None
            },
            waiting=self._waiting[0] if self._waiting else None,
        )

    def _resume(self, prefix: PrefixEntry) -> None:
        assert prefix.num_tokens == self._boundary
        self._cache.load(self._slot, prefix.slot)
        for layer, crossing in self._crossings.items():
            if layer < self._spans[0][1]:
                crossing.resume(prefix.sources.get(layer))
        if prefix.waiting is not None:
            self._waiting[0] = prefix.waiting
        self._num_resumed = prefix.num_tokens


class _FeatureRows:
    """Vision rows from blocks of any size, handed out in the sizes asked for; holds no block it does not need."""

    def __init__(self, blocks: Callable[[], Iterable[Tensor]], num_rows: int) -> None:
        self.num_rows = num_rows
        self._open = blocks
        self._blocks: Iterator[Tensor] | None = None
        self._held: list[Tensor] = []
        self._num_taken = 0

    def has(self, count: int) -> bool:
        """True when `count` more rows are here; False when the next block is not there yet."""
        while sum(len(block) for block in self._held) < count:
            if self._blocks is None:
                self._blocks = iter(self._open())
            block = next(self._blocks, None)
            if block is None:
                found = self._num_taken + sum(len(held) for held in self._held)
                raise ValueError(f"vision features have {found} rows for {self.num_rows} vision tokens")
            if not len(block):
                return False
            self._held.append(block)
        return True

    def take(self, count: int) -> tuple[Tensor, Tensor]:
        """The places (count,) among all rows, and the rows (count, dim), that come next; `has` has found them."""
        rows = torch.cat(self._held) if len(self._held) > 1 else self._held[0]
        self._held = [rows[count:]] if len(rows) > count else []
        places = torch.arange(self._num_taken, self._num_taken + count)
        self._num_taken += count
        return places, rows[:count]

    def finish(self) -> None:
        """Raises ValueError when rows are left over."""
        more = None if self._blocks is None else next(self._blocks, None)
        if self._held or (more is not None and len(more)):
            raise ValueError(f"vision features have more rows than the {self.num_rows} vision tokens")


@torch.no_grad()
def prefill(
    model: TimeViper, batch: PackedBatch, cache: HybridCache, slot: int, *, max_chunk_tokens: int = DEFAULT_CHUNK_TOKENS
) -> Tensor:
    """Reads one prompt into a slot, which is emptied first; (V,) fp32 logits of the token after it.

    Args:
        batch: one segment.
        cache: of this model.
        slot: of the cache.
        max_chunk_tokens: tokens that go through the blocks together; bounds memory, changes no result.
            `Prefill` has the same work a piece a call, and vision features that come in blocks.

    Raises:
        ValueError: when the batch does not hold exactly one segment.
    """
    if batch.num_segments != 1:
        raise ValueError(f"prefill takes one prompt, not {batch.num_segments}; call it once for each slot")
    real = (batch.segment_ids != PADDING_SEGMENT).nonzero().squeeze(1)
    rows = batch.vision_index[real]
    features = batch.vision_features[rows[rows >= 0]]
    reading = Prefill(
        model,
        batch.input_ids[real],
        batch.token_kind[real],
        lambda: [features],
        cache,
        slot,
        max_chunk_tokens=max_chunk_tokens,
    )
    while (logits_V := reading.advance()) is None:
        pass
    return logits_V
