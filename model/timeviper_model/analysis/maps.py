"""Rows of attention, and of the matrix M equivalent to a Mamba-2 scan (Figures 5 and 6).

attention   softmax(q_i . k_j / sqrt(E)) over j <= i
Mamba-2     M[i, j] = (C_i . B_j) exp(sum over k = j+1..i of dt_k A) dt_j for j <= i, so that y = M x + D x
            (arXiv 2405.21060, section 3; x, B and C after the convolution)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from timeviper_model.batching.batch import PackedBatch
from timeviper_model.batching.segments import Segments
from timeviper_model.layers.attention import Attention
from timeviper_model.layers.backbone import DecoderBlock
from timeviper_model.layers.mamba2 import Mamba2Mixer
from timeviper_model.layers.nemotron_h import Block
from timeviper_model.layers.transv import TokenStream
from timeviper_model.ops.precision import widen
from timeviper_model.timeviper import TimeViper

ROW_ELEMENTS = 2**22
"""Weights computed at once: 16 MiB in fp32."""

Measured = TypeVar("Measured")


class TokenMap(Protocol):
    """Token mixing of one block."""

    segments: Segments
    num_heads: int

    def rows(self, index_Q: Tensor) -> Tensor:
        """(H, Q, T) weights of queries at flat indices, at least fp32."""
        ...


class AttentionMap:
    def __init__(self, mixer: Attention, normed_TD: Tensor, segments: Segments) -> None:
        self.segments, self.num_heads = segments, mixer.num_heads
        positions_T = segments.original_positions_T
        self._q_THE, self._k_TGE = mixer.queries(normed_TD, positions_T), mixer.keys(normed_TD, positions_T)

    def rows(self, index_Q: Tensor) -> Tensor:
        num_groups = self._k_TGE.shape[1]
        q_GrQE = self._q_THE[index_Q].view(len(index_Q), num_groups, -1, self._q_THE.shape[-1]).permute(1, 2, 0, 3)
        scores = widen(q_GrQE @ self._k_TGE.permute(1, 2, 0)[:, None]) * q_GrQE.shape[-1] ** -0.5
        return scores.masked_fill(~readable(self.segments, index_Q), -torch.inf).softmax(-1).flatten(0, 1)


class HiddenAttentionMap:
    def __init__(self, mixer: Mamba2Mixer, normed_TD: Tensor, segments: Segments) -> None:
        self.segments, self.num_heads = segments, mixer.num_heads
        _, channels, dt = mixer.project(normed_TD)
        convolved = mixer.convolve(
            channels, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, positions_T=segments.positions_T
        )
        _, B_TGN, C_TGN = mixer.split(convolved)
        self._dt_TH, self._B_TGN, self._C_TGN = dt, B_TGN, C_TGN
        self._log_TH = (dt.double() * mixer.decay_rates()).cumsum(0)  # fp32 would lose the differences of a long input

    def rows(self, index_Q: Tensor) -> Tensor:
        may_read = readable(self.segments, index_Q)
        exponent = (self._log_TH[index_Q].t()[..., None] - self._log_TH.t()[:, None]).masked_fill(~may_read, -torch.inf)
        weight = exponent.to(self._dt_TH.dtype).exp_().mul_(self._dt_TH.t()[:, None])
        products = widen(self._C_TGN[index_Q].transpose(0, 1) @ self._B_TGN.permute(1, 2, 0))
        return weight * products.repeat_interleave(self.num_heads // len(products), 0)


def token_map(block: DecoderBlock, stream: TokenStream) -> TokenMap:
    """Raises ValueError for an MLP block."""
    if isinstance(block, Block) and isinstance(block.mixer, Mamba2Mixer):
        return HiddenAttentionMap(block.mixer, block.norm(stream.hidden_TD), stream.segments)
    if not isinstance(block, Block) or isinstance(block.mixer, Attention):
        return AttentionMap(block.attention, block.attention_norm(stream.hidden_TD), stream.segments)
    raise ValueError("an MLP block does not mix tokens; choose attention or Mamba-2 blocks")


@torch.no_grad()
def observe(
    model: TimeViper, batch: PackedBatch, layers: Collection[int], measure: Callable[[TokenMap, TokenStream], Measured]
) -> dict[int, Measured]:
    """Runs `measure` on the maps of `layers`, one at a time."""
    types = model.config.text.block_types
    wrong = [layer for layer in layers if not 0 <= layer < len(types) or types[layer] == "mlp"]
    if wrong:
        mixing = [layer for layer, kind in enumerate(types) if kind != "mlp"]
        raise ValueError(f"layers {wrong} do not mix tokens; attention and Mamba-2 blocks are at {mixing}")
    measured: dict[int, Measured] = {}

    def run(layer: int, block: DecoderBlock, stream: TokenStream) -> Tensor:
        if layer in layers:
            measured[layer] = measure(token_map(block, stream), stream)
        hidden: Tensor = block(stream.hidden_TD, stream.segments)
        return hidden

    model.run_blocks(model.embed(batch), run_block=run)
    return measured


@torch.no_grad()
def row_blocks(
    tokens: TokenMap, queries: Tensor | None = None, *, max_elements: int = ROW_ELEMENTS
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (index (Q,), rows (H, Q, T)) for `queries`, default all."""
    num_tokens = len(tokens.segments.ids)
    every = torch.arange(num_tokens, device=tokens.segments.ids.device) if queries is None else queries
    for index in torch.split(every, max(1, max_elements // max(1, tokens.num_heads * num_tokens))):
        yield index, tokens.rows(index)


def readable(segments: Segments, index_Q: Tensor) -> Tensor:
    """(Q, T) bool: tokens that each query reads."""
    flat_T = torch.arange(len(segments.ids), device=segments.ids.device)
    return (flat_T <= index_Q[:, None]) & (segments.ids == segments.ids[index_Q][:, None])
