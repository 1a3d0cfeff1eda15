"""Importance of tokens for an instruction, by one score for attention and Mamba-2 blocks (after arXiv 2603.00198).

attention   a[i, j] = softmax over j <= i of q_i . k_j / sqrt(E)
Mamba-2     a[i, j] = |C_i . B_j| dt_j over its sum over j <= i: hidden attention without decay, which favours the last
importance  of j: mean of a[i, j] over heads and instruction tokens i
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from timeviper_model.batching.batch import TokenKind
from timeviper_model.batching.segments import Segments
from timeviper_model.layers.backbone import DecoderBlock
from timeviper_model.layers.mamba2 import Mamba2Mixer
from timeviper_model.layers.nemotron_h import Block
from timeviper_model.ops.precision import widen

MATRIX_ELEMENTS = 2**22
"""Products of queries and keys at once: 16 MiB in fp32."""


class ScoreInputs(NamedTuple):
    """Queries and keys of T tokens in one block."""

    queries: Tensor
    """(T, H, E), or C (T, G, N)."""
    keys: Tensor
    """(T, Hkv, E), or B (T, G, N)."""
    dt_TH: Tensor | None
    """Step sizes of Mamba-2, None for attention."""

    def take(self, index: slice | Tensor) -> ScoreInputs:
        return ScoreInputs(self.queries[index], self.keys[index], None if self.dt_TH is None else self.dt_TH[index])


def score_inputs(block: DecoderBlock, hidden_TD: Tensor, segments: Segments) -> ScoreInputs:
    """Runs each projection exactly once, by modules: it is a collective under ZeRO-3."""
    if isinstance(block, Block) and isinstance(block.mixer, Mamba2Mixer):
        mixer = block.mixer
        packed = mixer(block.norm(hidden_TD), segments, scan_inputs=True)
        size = mixer.num_groups * mixer.state_size
        B, C, dt = torch.split(packed, [size, size, mixer.num_heads], dim=-1)
        shape = len(hidden_TD), mixer.num_groups, mixer.state_size
        return ScoreInputs(C.reshape(shape), B.reshape(shape), dt)
    normed, positions = block.attention_norm(hidden_TD), segments.original_positions_T
    return ScoreInputs(block.attention.queries(normed, positions), block.attention.keys(normed, positions), None)


@torch.no_grad()
def importance(inputs: ScoreInputs, query_index: Tensor) -> Tensor:
    """(T,) importance of one segment's tokens for its tokens `query_index`, at least fp32; sums to 1."""
    return importance_of(inputs.queries[query_index], inputs.keys, inputs.dt_TH, query_index)


def instruction_index(token_kind_T: Tensor, last: int) -> Tensor:
    """Indices of one sample's instruction tokens up to `last`, or `last` alone without any."""
    index = (token_kind_T[: last + 1] == TokenKind.INSTRUCTION).nonzero().squeeze(1)
    return index if len(index) else torch.tensor([last], device=token_kind_T.device)


def importance_of(queries: Tensor, keys: Tensor, dt_TH: Tensor | None, query_index: Tensor) -> Tensor:
    """(T,) as `importance`, from the rows (Q, ...) of queries alone."""
    num_tokens, num_groups, size = keys.shape
    num_heads = queries.shape[1] if dt_TH is None else dt_TH.shape[1]
    keys_GET = keys.permute(1, 2, 0)
    flat_T = torch.arange(num_tokens, device=query_index.device)
    total_T = widen(keys.new_zeros(num_tokens))
    step = max(1, MATRIX_ELEMENTS // max(1, num_tokens * num_heads))
    for own, index in zip(torch.split(queries, step), torch.split(query_index, step), strict=True):
        hidden_QT = flat_T > index[:, None]
        if dt_TH is None:
            q_GrQE = own.reshape(len(index), num_groups, -1, size).permute(1, 2, 0, 3)
            scores = widen(q_GrQE @ keys_GET[:, None]) * size**-0.5
            total_T += scores.masked_fill(hidden_QT, -torch.inf).softmax(-1).sum((0, 1, 2))
        else:
            weights_GQT = widen(own.transpose(0, 1) @ keys_GET).abs().masked_fill(hidden_QT, 0.0)
            dt_GTr = dt_TH.reshape(num_tokens, num_groups, -1).transpose(0, 1).to(weights_GQT.dtype)
            sums_GQr = (weights_GQT @ dt_GTr).clamp(min=torch.finfo(weights_GQT.dtype).tiny)
            total_T += (weights_GQT * (sums_GQr.reciprocal() @ dt_GTr.transpose(1, 2))).sum((0, 1))
    return total_T / (num_heads * len(query_index))
