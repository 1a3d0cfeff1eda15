"""Information blocking (Figure 3): the model without the flow from vision to instruction or response.

Attention is a softmax over the other tokens. Mamba-2 zeroes a receiver's convolution taps on sources, and their dt * x
in the scan; their decay stays. Decoded tokens that may not read vision continue from caches without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from timeviper_model.batching.batch import PackedBatch, TokenKind
from timeviper_model.batching.segments import Segments
from timeviper_model.config import BlockType
from timeviper_model.layers.attention import Attention, KeyValueStore
from timeviper_model.layers.backbone import DecoderBlock
from timeviper_model.layers.cache import HybridCache
from timeviper_model.layers.mamba2 import Mamba2Mixer, Mamba2State, shift_window
from timeviper_model.layers.nemotron_h import Block, LayerState
from timeviper_model.layers.transv import TokenStream
from timeviper_model.timeviper import RunBlock, TimeViper


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocking:
    """Flow to cut: vision to instruction (`v2i`), or to response (`v2r`, which leaves an answer's first token
    unchanged).
    """

    flow: Literal["v2i", "v2r"]
    scope: Literal["layer", "window", "from_layer"]
    """`layer` cuts one block, `window` also its neighbours, `from_layer` also all later ones."""
    layer: int
    """0-based block index."""
    window: int = 1
    """Odd number of blocks for scope `window`."""
    kind: Literal["attention", "mamba", "both"] = "both"
    """Block types to cut."""

    def __post_init__(self) -> None:
        if self.window < 1 or self.window % 2 == 0:
            raise ValueError(f"{self.window = } must be odd, so that it has a middle")
        if self.window > 1 and self.scope != "window":
            raise ValueError(f"{self.window = } applies only to scope window, not {self.scope = }")

    def covers(self, layer: int, block_type: BlockType) -> bool:
        if block_type == "mlp" or self.kind not in ("both", block_type):
            return False
        if self.scope == "from_layer":
            return layer >= self.layer
        return abs(layer - self.layer) <= self.window // 2


def cut_flow(model: TimeViper, blocking: Blocking) -> RunBlock:
    """Returns a `run_block` for `TimeViper.run_blocks`."""
    types = model.config.text.block_types
    if not 0 <= blocking.layer < len(types):
        raise ValueError(f"{blocking.layer = } is not one of the model's {len(types)} blocks, 0 to {len(types) - 1}")

    def run(layer: int, block: DecoderBlock, stream: TokenStream) -> Tensor:
        if not blocking.covers(layer, types[layer]):
            hidden: Tensor = block(stream.hidden_TD, stream.segments)
            return hidden
        receiver = TokenKind.INSTRUCTION if blocking.flow == "v2i" else TokenKind.RESPONSE
        return blocked_block(block, stream, stream.token_kind_T == receiver, stream.token_kind_T == TokenKind.VISION)

    return run


@torch.no_grad()
def read_blocked(model: TimeViper, batch: PackedBatch, cache: HybridCache, slot: int, blocking: Blocking) -> Tensor:
    """Reads a prompt (one segment) into an emptied slot; returns the next token's (V,) logits.

    Tokens decoded from the slot are as blocked as those of the prompt.
    """
    cache.reset(slot)
    view, types = cache.view([slot]), model.config.text.block_types
    blocks_responses = blocking.flow == "v2r"

    def run(layer: int, block: DecoderBlock, stream: TokenStream) -> Tensor:
        state = view.layer(layer)
        if not blocking.covers(layer, types[layer]):
            hidden: Tensor = block(stream.hidden_TD, stream.segments, state)
            return hidden
        is_source_T = stream.token_kind_T == TokenKind.VISION
        receiver = TokenKind.RESPONSE if blocks_responses else TokenKind.INSTRUCTION
        return blocked_block(
            block, stream, stream.token_kind_T == receiver, is_source_T, state=state, hide_sources=blocks_responses
        )

    stream, _ = model.run_blocks(model.embed(batch), run_block=run)
    cache.num_tokens[slot] = int(stream.segments.original_positions_T[-1]) + 1
    return model.logits(stream.hidden_TD[-1:])[0]


def blocked_block(
    block: DecoderBlock,
    stream: TokenStream,
    receiver_T: Tensor,
    source_T: Tensor,
    *,
    state: LayerState = None,
    hide_sources: bool = False,
) -> Tensor:
    """(T, D) after a block in which no receiver reads from a source.

    Args:
        state: filled for later tokens, which read no source either if `hide_sources`.
    """
    where = stream.segments, receiver_T, source_T
    if isinstance(block, Block) and isinstance(block.mixer, Mamba2Mixer):
        assert state is None or isinstance(state, Mamba2State)
        normed = block.norm(stream.hidden_TD)
        return stream.hidden_TD + _blocked_mamba(block.mixer, normed, *where, state, hide_sources)
    assert not isinstance(state, Mamba2State)
    normed = block.attention_norm(stream.hidden_TD)
    h_TD = stream.hidden_TD + _blocked_attention(block.attention, normed, *where, state, hide_sources)
    return h_TD if isinstance(block, Block) else h_TD + block.mlp(block.post_attention_layernorm(h_TD))


def _blocked_attention(
    mixer: Attention,
    h_TD: Tensor,
    segments: Segments,
    receiver_T: Tensor,
    source_T: Tensor,
    store: KeyValueStore | None,
    hide_sources: bool,
) -> Tensor:
    positions_T = segments.original_positions_T
    q, k, v = mixer.queries(h_TD, positions_T), mixer.keys(h_TD, positions_T), mixer.values(h_TD)
    read = mixer.attend(q, k, v, segments)
    others = (~source_T).nonzero().squeeze(1)  # ordinary attention among these is the blocked one
    blocked = read.index_copy(0, others, mixer.attend(q[others], k[others], v[others], segments.keep(others)))
    if store is not None:
        store.extend(*((q[others], k[others], v[others]) if hide_sources else (q, k, v)))
    return mixer.o_proj(torch.where(receiver_T[:, None, None], blocked, read).flatten(1))


def _blocked_mamba(
    mixer: Mamba2Mixer,
    h_TD: Tensor,
    segments: Segments,
    receiver_T: Tensor,
    source_T: Tensor,
    state: Mamba2State | None,
    hide_sources: bool,
) -> Tensor:
    gate, channels, dt = mixer.project(h_TD)
    without_sources = channels.masked_fill(source_T[:, None], 0.0)
    taps = mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias
    convolved, without = (
        mixer.convolve(inputs, *taps, positions_T=segments.positions_T) for inputs in (channels, without_sources)
    )
    x, B, C = mixer.split(torch.where(receiver_T[:, None], without, convolved))
    (y, last), (blocked, blocked_last) = (
        mixer.scan(
            values,
            dt,
            mixer.decay_rates(),
            B,
            C,
            D_H=mixer.D,
            chunk_size=mixer.chunk_size,
            seq_idx_T=segments.seq_idx_T,
        )
        for values in (x, x.masked_fill(source_T[:, None, None], 0.0))
    )
    if state is not None:
        shift_window(state.window_BKD[0], without_sources if hide_sources else channels)
        state.ssm_BHPN[0] = blocked_last if hide_sources else last
    y = torch.where(receiver_T[:, None, None], blocked, y)
    return mixer.out_proj(mixer.norm(y.flatten(1), gate))
