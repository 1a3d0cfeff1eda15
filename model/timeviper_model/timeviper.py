"""TimeViper: token ids and vision features to logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from timeviper_model.batching.batch import IGNORE_INDEX, PADDING_SEGMENT, PackedBatch, TokenKind
from timeviper_model.batching.segments import Segments
from timeviper_model.batching.shapes import take_rows
from timeviper_model.config import TimeViperConfig, TransVSite
from timeviper_model.layers.backbone import Backbone, DecoderBlock, init_backbone
from timeviper_model.layers.cache import HybridCache
from timeviper_model.layers.evs import keep_changes
from timeviper_model.layers.projector import make_projector
from timeviper_model.layers.transv import TokenStream, TransVLayer, apply_site, num_kept
from timeviper_model.ops.output_layer import OutputLayer, chunks
from timeviper_model.ops.precision import widen

LOGITS_ELEMENTS = 2**26
"""Logits computed at once: 256 MiB in fp32."""

RunBlock = Callable[[int, DecoderBlock, TokenStream], Tensor]
"""(layer, block, stream before it) -> hidden states (T, D) after it."""


class TimeViperOutput(NamedTuple):
    """Sums over a pack."""

    loss_sum: Tensor
    """fp32 cross entropy over labelled positions."""
    num_targets: Tensor
    num_vision_tokens: Tensor
    """(num_sites + 1,): counts at the input and after each site."""


class TimeViper(nn.Module):
    def __init__(self, config: TimeViperConfig) -> None:
        super().__init__()
        self.config = config
        self.logits_elements = LOGITS_ELEMENTS
        self.gradient_checkpointing = False
        """Whether the backward pass recomputes blocks and sites."""
        self.backbone = Backbone(config.text)
        self.lm_head = OutputLayer(config.text.hidden_size, config.text.vocab_size, bias=False)
        self.projector = make_projector(config.vision, config.text.hidden_size)
        self.transv = nn.ModuleDict(
            {str(site.layer): TransVLayer(config.text) for site in config.transv if site.transfer == "cross_attention"}
        )
        self._sites = {site.layer: site for site in config.transv}
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.text.tie_word_embeddings:
            self.lm_head.weight = self.backbone.embeddings.weight

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Initialises every weight; TransV starts as a copy of attention."""
        text = self.config.text
        init_backbone(self.backbone, text, generator)
        if not text.tie_word_embeddings:
            self.lm_head.weight.normal_(0.0, text.initializer_range, generator=generator)
        for linear in self.projector.modules():
            if isinstance(linear, nn.Linear):
                linear.weight.normal_(0.0, text.initializer_range, generator=generator)
                linear.bias.zero_()
        for module in self.transv.values():
            assert isinstance(module, TransVLayer)
            module.alpha.zero_()
        self.init_transv_from_attention()

    def init_transv_from_attention(self) -> None:
        """Copies the nearest attention block at or after each site, else the last one."""
        layers = [layer for layer, kind in enumerate(self.config.text.block_types) if kind == "attention"]
        for name, module in self.transv.items():
            nearest = min((layer for layer in layers if layer >= int(name)), default=layers[-1])
            assert isinstance(module, TransVLayer)
            module.copy_from(self.backbone.block(nearest).attention)

    @torch.no_grad()
    def with_transv(self, sites: tuple[TransVSite, ...]) -> TimeViper:
        """Returns a model that shares these tensors but has other TransV sites, with closed gates."""
        with torch.device("meta"):
            other = TimeViper(replace(self.config, transv=sites))
        shared = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("transv.")}
        other.load_state_dict(shared, strict=False, assign=True)
        other.tie_weights()
        weight = self.lm_head.weight
        for module in other.transv.values():
            assert isinstance(module, TransVLayer)
            module.to(dtype=weight.dtype).to_empty(device=weight.device).alpha.zero_()
        other.init_transv_from_attention()
        return other.train(self.training)

    def forward(self, batch: PackedBatch, *, use_transv: bool = True) -> TimeViperOutput:
        """Sums the loss; with gradients, every trainable parameter takes part."""
        stream, num_vision_tokens = self.run_blocks(self.embed(batch, use_transv=use_transv), use_transv=use_transv)
        hidden, targets, _ = self.labelled(stream)
        return TimeViperOutput(
            loss_sum=self.lm_head.loss_sum(self.backbone.norm_f(hidden), targets, self._chunk_length),
            num_targets=torch.tensor(len(targets), device=hidden.device),
            num_vision_tokens=torch.tensor(num_vision_tokens, device=hidden.device),
        )

    @torch.no_grad()
    def target_log_probs(
        self, batch: PackedBatch, *, use_transv: bool = True, run_block: RunBlock | None = None
    ) -> tuple[Tensor, Tensor]:
        """fp32 log-probability (K,) and segment (K,) of each target."""
        stream, _ = self.run_blocks(
            self.embed(batch, use_transv=use_transv), use_transv=use_transv, run_block=run_block
        )
        hidden, targets, segment_ids = self.labelled(stream)
        losses = [
            F.cross_entropy(self.logits(hidden_KD), targets_K, reduction="none")
            for hidden_KD, targets_K in chunks(hidden, targets, self._chunk_length)
        ]
        return -torch.cat(losses), segment_ids

    def new_cache(self, num_slots: int, *, device: torch.device | str, dtype: torch.dtype) -> HybridCache:
        return HybridCache(self.config.text, num_slots, device=device, dtype=dtype)

    @torch.no_grad()
    def decode_step(self, input_ids: Tensor, cache: HybridCache, slots: Tensor) -> Tensor:
        """Reads one token in each of B slots; returns (B, V) fp32 logits.

        Neighbouring ascending slots save a copy of their states; `slots` on the CPU saves waiting for the device.
        """
        listed: list[int] = slots.tolist()
        order = sorted(range(len(listed)), key=listed.__getitem__)
        is_sorted = order == list(range(len(order)))
        view = cache.view(sorted(listed))
        empty = [slot for slot in view.slots if not cache.num_tokens[slot]]
        if empty:
            raise ValueError(f"slots {empty} have no prompt; prefill them before decode_step")
        device = input_ids.device
        hidden = self.backbone.embeddings(input_ids if is_sorted else input_ids[torch.tensor(order, device=device)])
        positions = torch.tensor([cache.num_tokens[slot] for slot in view.slots], device=device)
        for layer in range(self.config.text.num_hidden_layers):
            state = view.layer(layer)
            hidden = self.backbone.block(layer).step(hidden, state, positions)
            view.write_back(layer, state)
        for slot in view.slots:
            cache.num_tokens[slot] += 1
        return self.logits(hidden if is_sorted else hidden[torch.tensor(order, device=device).argsort()])

    def embed(self, batch: PackedBatch, *, use_transv: bool = True) -> TokenStream:
        """Returns the input of block 0, without the tokens that EVS drops."""
        real = (batch.segment_ids != PADDING_SEGMENT).nonzero().squeeze(1)
        num_segments = batch.num_segments
        segments = Segments(batch.segment_ids[real], num_segments)
        kinds, vision_index = batch.token_kind[real], batch.vision_index[real]
        counts = torch.bincount(segments.ids[vision_index >= 0], minlength=num_segments).tolist()
        if use_transv and self.evs_site is not None:
            stays = self._evs_stays(batch.vision_features, segments, kinds, vision_index, counts)
            real, segments, kinds, vision_index = real[stays], segments.keep(stays), kinds[stays], vision_index[stays]
        is_vision = vision_index >= 0
        text, vision = (~is_vision).nonzero().squeeze(1), is_vision.nonzero().squeeze(1)
        hidden = self.backbone.embeddings(batch.input_ids[real][text])
        if len(vision):
            rows = vision_index[vision]
            features = batch.vision_features[rows].to(next(self.projector.parameters()).dtype)
            joined = torch.cat([hidden, self.projector(features, rows).to(hidden.dtype)])
            hidden = take_rows(joined, torch.cat([text, vision]).argsort())
        elif self.training or torch.is_grad_enabled():
            # under ZeRO-3 a call is a collective, even with frozen parameters: every rank must make it
            zero_row = hidden.new_zeros(1, self.config.vision.row_size)
            hidden = hidden + 0.0 * self.projector(zero_row, vision)
        return TokenStream(
            hidden_TD=hidden,
            segments=segments,
            token_kind_T=kinds,
            labels_T=batch.labels[real],
            original_counts=tuple(counts),
        )

    @property
    def evs_site(self) -> TransVSite | None:
        site = self._sites.get(0)
        return site if site is not None and site.select == "evs" else None

    def _evs_stays(
        self, features_VD: Tensor, segments: Segments, kinds: Tensor, vision_index: Tensor, counts: list[int]
    ) -> Tensor:
        """Indices of tokens that stay."""
        assert self.evs_site is not None
        stays_T = torch.ones(len(kinds), dtype=torch.bool, device=kinds.device)
        for start, length, count in zip(segments.starts_S.tolist(), segments.lengths, counts, strict=True):
            own = slice(start, start + length)
            rows = vision_index[own][vision_index[own] >= 0]
            kept = num_kept(count, count, self.evs_site.keep)
            if kept < count:
                kept_V = keep_changes(features_VD[rows], kinds[own], self.config.vision.tokens_per_frame, kept)
                stays_T[own][kinds[own] == TokenKind.VISION] = kept_V
        return stays_T.nonzero().squeeze(1)

    def run_blocks(
        self, stream: TokenStream, *, use_transv: bool = True, run_block: RunBlock | None = None
    ) -> tuple[TokenStream, list[int]]:
        """Runs blocks and TransV sites; also counts vision tokens at the input and after each site.

        `run_block` replaces the call of a block.
        """
        run_block = run_block or self._run_block
        num_vision_tokens = [sum(stream.original_counts)]
        for layer in range(self.config.text.num_hidden_layers):
            if layer in self._sites:
                stream = self._site(stream, layer, use_transv)
                num_vision_tokens.append(int((stream.token_kind_T == TokenKind.VISION).sum()))
            stream = stream.with_hidden(run_block(layer, self.backbone.block(layer), stream))
        return stream, num_vision_tokens

    def _run_block(self, layer: int, block: DecoderBlock, stream: TokenStream) -> Tensor:
        operands = stream.hidden_TD, stream.segments
        hidden: Tensor = checkpoint(block, *operands, use_reentrant=False) if self._checkpoints else block(*operands)
        return hidden

    @property
    def _checkpoints(self) -> bool:
        return self.gradient_checkpointing and torch.is_grad_enabled()

    def _site(self, stream: TokenStream, layer: int, use_transv: bool) -> TokenStream:
        module = self.transv_layer(layer)
        if self._sites[layer] is self.evs_site:
            return stream  # `embed` has applied it
        if use_transv:
            block = self.backbone.block(layer)
            return apply_site(stream, self._sites[layer], module, block, checkpointing=self._checkpoints)
        if module is not None and torch.is_grad_enabled() and module.alpha.requires_grad:
            return stream.with_hidden(stream.hidden_TD + module.idle(stream.hidden_TD))
        return stream

    def transv_layer(self, layer: int) -> TransVLayer | None:
        if str(layer) not in self.transv:
            return None
        module = self.transv[str(layer)]
        assert isinstance(module, TransVLayer)
        return module

    def labelled(self, stream: TokenStream) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states (K, D), targets (K,) and segments (K,)."""
        index = (stream.labels_T != IGNORE_INDEX).nonzero().squeeze(1)
        return take_rows(stream.hidden_TD, index), stream.labels_T[index], stream.segments.ids[index]

    @property
    def _chunk_length(self) -> int:
        return max(1, self.logits_elements // self.config.text.vocab_size)

    def logits(self, hidden_KD: Tensor) -> Tensor:
        """(K, V), at least fp32."""
        return widen(self.lm_head(self.backbone.norm_f(hidden_KD)))
