"""Prefill of one prompt into a cache slot, in chunks of bounded size.

Spans of blocks end before each TransV site that selects by attention or importance. There tokens wait for the
instruction. EVS needs the whole video before the first block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from timeviper_model.batching.batch import PADDING_SEGMENT, PackedBatch, TokenKind
from timeviper_model.config import TimeViperConfig
from timeviper_model.inference.chunked_transv import (
    Crossing,
    TokenChunk,
    TransferSources,
    WaitingTokens,
    plan_sites,
    release_waiting,
)
from timeviper_model.inference.memory import tokens_by_layer
from timeviper_model.inference.requests import DEFAULT_CHUNK_TOKENS
from timeviper_model.layers.cache import MIN_CAPACITY, HybridCache, SavedSlot
from timeviper_model.layers.evs import keep_changes
from timeviper_model.timeviper import TimeViper


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixEntry:
    """Read-only state after a prompt's system and vision tokens, before the first site that needs the instruction."""

    num_tokens: int
    slot: SavedSlot
    sources: dict[int, TransferSources]
    """Keys and values for the instruction, by layer."""
    waiting: WaitingTokens | None

    @property
    def num_bytes(self) -> int:
        sources = sum(source.num_bytes for source in self.sources.values())
        return self.slot.num_bytes + sources + (0 if self.waiting is None else self.waiting.num_bytes)

    @property
    def working_bytes(self) -> int:
        """Bytes that a prompt shares with this entry while it is read."""
        return self.num_bytes - self.slot.num_bytes

    @property
    def is_finite(self) -> bool:
        tensors = [*self.slot.tensors, *(tensor for source in self.sources.values() for tensor in source.tensors)]
        tensors += [] if self.waiting is None else self.waiting.tensors
        return all(bool(tensor.isfinite().all()) for tensor in tensors)

    def to(self, device: torch.device | str) -> PrefixEntry:
        return PrefixEntry(
            num_tokens=self.num_tokens,
            slot=self.slot.to(device),
            sources={layer: source.to(device) for layer, source in self.sources.items()},
            waiting=self.waiting and self.waiting.to(device),
        )


def prefix_length(token_kind: Tensor) -> int:
    """Number of leading tokens that no question changes.

    ssvvvii  5      svivi  0 (the second medium read a question)      si  0
    """
    vision = (token_kind == TokenKind.VISION).nonzero().squeeze(1)
    if not len(vision):
        return 0
    first, stop = int(vision[0]), int(vision[-1]) + 1
    is_prefix = len(vision) == stop - first and bool((token_kind[:first] == TokenKind.SYSTEM).all())
    return stop if is_prefix and stop < len(token_kind) else 0


class Prefill:
    """A prompt read into a slot by calls of `advance`. Chunk sizes affect rounding only."""

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
        max_new_tokens: int = MIN_CAPACITY,
        max_bytes: int | None = None,
        all_tokens: bool = False,
    ) -> None:
        """Empties the slot and reserves space for the prompt and its answer.

        Args:
            input_ids: (T,) int64 on the model's device; vision ids are ignored.
            features: returns vision rows in blocks (rows, dim); an empty block means 'not yet' and ends `advance`.
                Called once, at the first vision token, unless there is a `prefix`.
            boundary: prompt index where a chunk must end (`prefix_length`).
            prefix: entry with the same boundary, system and vision tokens.
            on_prefix: receives this prompt's entry at the boundary.
            max_new_tokens: reserved tokens of the answer; a longer answer is copied into a larger room.
            max_bytes: bytes that all slots' keys and values may take, as checked by `HybridCache.has_space`.
            all_tokens: run the last blocks on every token, not the last alone, for hooks that read their outputs.
        """
        if not len(input_ids) or max_chunk_tokens < 1:
            raise ValueError(f"a prompt of {len(input_ids)} tokens in chunks of {max_chunk_tokens}: both must be >= 1")
        self._model, self._cache, self._slot = model, cache, slot
        self._input_ids, self._token_kind = input_ids, token_kind
        self._max_tokens, self._boundary = max_chunk_tokens, boundary
        self._boundary_left = boundary
        """The boundary among the tokens that EVS left."""
        self.num_tokens = len(input_ids)
        """Tokens of the prompt, dropped ones included."""
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
            if not plan.waits and plan.site.select != "evs"
        }
        self._last_mixer = None if all_tokens else last_mixer(model.config)
        self._rows = _FeatureRows(features, num_vision)
        self._position_T = torch.arange(len(input_ids), device=input_ids.device)
        self._last_1D: Tensor | None = None
        self.num_read = 0
        """Tokens read, counted once per span."""
        self.is_waiting = False
        """True when the last `advance` lacked features."""
        self._view = cache.view([slot])
        cache.reset(slot)
        kept = tokens_by_layer(model.config, self._num_text, num_vision)
        cache.reserve(slot, {layer: count + max_new_tokens for layer, count in kept.items()}, max_bytes=max_bytes)
        self._waiting = self._waiting_at(stops[0], boundary) if stops else []
        self._start = 0
        self.num_resumed = 0
        """Tokens that came with the prefix."""
        if prefix is not None:
            self._resume(prefix)
        self._steps = self._run()
        self._next_size: int | None = 0

    def move(self, slot: int) -> None:
        """Continues in `slot`, to which the cache has moved the state."""
        self._slot, self._view = slot, self._cache.view([slot])

    def advance(self, max_tokens: int | None = None) -> Tensor | None:
        """Runs chunks; returns the next token's (V,) logits when done.

        `max_tokens` never splits a chunk. Raises ValueError when features do not match the vision tokens.
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
        self._cache.num_tokens[self._slot] = self.num_tokens
        return self._model.logits(self._last_1D)[0]

    def _run(self) -> Iterator[int]:
        """Yields each chunk's size before running it, and again while its features are missing."""
        if self._model.evs_site is not None and self._plans[0].num_kept < self._rows.num_rows:
            yield from self._drop_unchanged(self._plans[0].num_kept)
        for chunk in self._chunks():
            yield chunk.stop - chunk.start
            while not self._rows.has(int((self._token_kind[chunk] == TokenKind.VISION).sum())):
                self.is_waiting = True
                yield chunk.stop - chunk.start
            self.is_waiting = False
            self._run_span(self._embed(chunk), *self._spans[0])
            if self._on_prefix is not None and chunk.stop == self._boundary_left:
                self._on_prefix(self._entry())
        self._rows.finish()
        for number, (layer, stop) in enumerate(self._spans[1:], start=2):
            waiting = self._waiting
            self._waiting = self._waiting_at(stop, 0) if number < len(self._spans) else []
            chunks = release_waiting(
                waiting,
                self._plans[layer],
                self._model.backbone.block(layer),
                self._model.transv_layer(layer),
                first_response=self._first_response,
                max_tokens=self._max_tokens,
            )
            for tokens in chunks:
                yield len(tokens)
                self._run_span(tokens, layer, stop)

    def _drop_unchanged(self, num_kept: int) -> Iterator[int]:
        """Applies EVS to the prompt and its features; yields while features are missing."""
        is_vision_T = self._token_kind == TokenKind.VISION
        num_vision = self._rows.num_rows
        if self.num_resumed:  # which tokens the prefix kept is in its state; their number is enough here
            kept_V = torch.arange(num_vision, device=is_vision_T.device) < num_kept
        else:
            while not self._rows.has(num_vision):
                self.is_waiting = True
                yield 0
            self.is_waiting = False
            tokens_per_frame = self._model.config.vision.tokens_per_frame
            features = self._rows.all.to(is_vision_T.device)
            kept_V = keep_changes(features, self._token_kind, tokens_per_frame, num_kept)
            self._rows.keep(kept_V.cpu())
        stays_T = ~is_vision_T
        stays_T[is_vision_T] = kept_V
        self._input_ids, self._token_kind = self._input_ids[stays_T], self._token_kind[stays_T]
        self._position_T = self._position_T[stays_T]
        self._boundary_left = max(0, self._boundary - (num_vision - num_kept)) if self._boundary else 0
        self._start = self._boundary_left if self.num_resumed else 0

    def _chunks(self) -> Iterator[slice]:
        stop = self._start
        while stop < len(self._input_ids):
            start, limit = stop, self._boundary_left if stop < self._boundary_left else len(self._input_ids)
            stop = min(start + self._max_tokens, limit)
            yield slice(start, stop)

    def _embed(self, chunk: slice) -> TokenChunk:
        kinds = self._token_kind[chunk]
        is_vision = kinds == TokenKind.VISION
        hidden = self._model.backbone.embeddings(self._input_ids[chunk])
        if num_rows := int(is_vision.sum()):
            weight = next(self._model.projector.parameters())
            indices, features = self._rows.take(num_rows)
            projected = self._model.projector(features.to(weight.device, weight.dtype), indices.to(weight.device))
            hidden[is_vision] = projected.to(hidden.dtype)
        return TokenChunk(hidden_TD=hidden, token_kind_T=kinds, position_T=self._position_T[chunk])

    def _run_span(self, chunk: TokenChunk, first: int, stop: int) -> None:
        segments = chunk.segments()
        for layer in range(first, stop):
            if layer in self._crossings:
                chunk = self._crossings[layer].cross(chunk)
                segments = chunk.segments()
            if not len(chunk):
                continue
            block, state = self._model.backbone.block(layer), self._view.layer(layer)
            if layer == self._last_mixer:
                chunk = chunk.last(block(chunk.hidden_TD, segments, state, last_only=True))
                segments = chunk.segments()
            else:
                chunk = chunk.with_hidden(block(chunk.hidden_TD, segments, state))
        if self._waiting:
            waiting = next((tokens for tokens in self._waiting if not tokens.is_full), self._waiting[-1])
            waiting.add(chunk, self._model.backbone.block(stop), self._model.transv_layer(stop))
        elif len(chunk):
            self._last_1D = chunk.hidden_TD[-1:]

    def _waiting_at(self, layer: int, boundary: int) -> list[WaitingTokens]:
        num_vision = self._plans[layer].num_present
        total = self._num_text + num_vision
        before = boundary - self._rows.num_rows + num_vision if boundary else total
        block, module = self._model.backbone.block(layer), self._model.transv_layer(layer)
        sizes = [(before, num_vision), (total - before, 0)] if boundary else [(total, num_vision)]
        select = self._plans[layer].site.select
        return [WaitingTokens(tokens, vision, block, module, select=select) for tokens, vision in sizes]

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
        self.num_resumed = self._start = prefix.num_tokens


def last_mixer(config: TimeViperConfig) -> int | None:
    """Returns the layer from which only the last token is computed, as only its logits are needed.

    It is the last layer that mixes tokens; None if a TransV site follows it.
    """
    mixers = (layer for layer, block_type in enumerate(config.text.block_types) if block_type != "mlp")
    layer = max(mixers, default=-1)
    return None if any(site.layer > layer for site in config.transv) else layer


class _FeatureRows:
    """Vision rows regrouped to the sizes of chunks."""

    def __init__(self, blocks: Callable[[], Iterable[Tensor]], num_rows: int) -> None:
        self.num_rows = num_rows
        self._open = blocks
        self._blocks: Iterator[Tensor] | None = None
        self._held: list[Tensor] = []
        self._index = torch.arange(num_rows)
        """Rows of the prompt's features that are read."""
        self._num_taken = 0

    @property
    def all(self) -> Tensor:
        """Every row, once `has` has found all."""
        return torch.cat(self._held) if self._held else torch.zeros(0, 1)

    def keep(self, kept_V: Tensor) -> None:
        """Forgets the other rows; call before `take`."""
        self._held = [self.all[kept_V]] if bool(kept_V.any()) else []
        self._index = kept_V.nonzero().squeeze(1)

    def has(self, count: int) -> bool:
        """False when `count` rows have not arrived yet."""
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
        rows = torch.cat(self._held) if len(self._held) > 1 else self._held[0]
        self._held = [rows[count:]] if len(rows) > count else []
        indices = self._index[self._num_taken : self._num_taken + count]
        self._num_taken += count
        return indices, rows[:count]

    def finish(self) -> None:
        more = None if self._blocks is None else next(self._blocks, None)
        if self._held or (more is not None and len(more)):
            raise ValueError(f"vision features have more rows than the {self.num_rows} vision tokens")


@torch.no_grad()
def prefill(
    model: TimeViper,
    batch: PackedBatch,
    cache: HybridCache,
    slot: int,
    *,
    max_chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    max_new_tokens: int = MIN_CAPACITY,
) -> Tensor:
    """Reads one prompt (one segment) into an emptied slot; returns the next token's (V,) fp32 logits."""
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
        max_new_tokens=max_new_tokens,
    )
    while (logits_V := reading.advance()) is None:
        pass
    return logits_V
