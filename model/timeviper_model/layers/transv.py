"""TransV: drop vision tokens and transfer their information to the instruction (paper section 3.3, equations 4-6).

before   SSvvvvvviiiRR    k = min(present, floor(keep * N + 1/2)) of originally N vision tokens stay;
after    SSv.v..viiiRR    instruction tokens attend to the dropped ones: x += tanh(alpha) * attention
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from timeviper_model.batching.batch import TokenKind
from timeviper_model.batching.segments import RowBucket, Segments, group_by_length
from timeviper_model.batching.shapes import put_rows, take_rows
from timeviper_model.config import TextConfig, TransVSite
from timeviper_model.layers.attention import Attention, full_attention, grouped_scores, repeat_kv
from timeviper_model.layers.backbone import DecoderBlock
from timeviper_model.layers.importance import importance, instruction_index, score_inputs
from timeviper_model.ops.linear import Linear


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenStream:
    hidden_TD: Tensor
    segments: Segments
    token_kind_T: Tensor
    labels_T: Tensor
    original_counts: tuple[int, ...]
    """Vision tokens per segment at the model's input."""

    def with_hidden(self, hidden_TD: Tensor) -> TokenStream:
        return replace(self, hidden_TD=hidden_TD)

    def keep(self, index: Tensor) -> TokenStream:
        return TokenStream(
            hidden_TD=take_rows(self.hidden_TD, index),
            segments=self.segments.keep(index),
            token_kind_T=self.token_kind_T[index],
            labels_T=self.labels_T[index],
            original_counts=self.original_counts,
        )


class TransVLayer(nn.Module):
    """Gated cross-attention without positions or norm (equation 6)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        query_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = Linear(query_size, config.hidden_size, bias=False)
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, receivers_QD: Tensor, sources_KD: Tensor, rows: list[TransferRows]) -> Tensor:
        """(Q, D)"""
        q = self.q_proj(receivers_QD).unflatten(-1, (self.num_heads, self.head_dim))
        k, v = self.source_keys_values(sources_KD)
        mixed = torch.cat([group.attend(q, k, v) for group in rows])
        order = torch.cat([group.receivers.token_index for group in rows])
        return self._gated(put_rows(mixed, order, len(receivers_QD)))

    def source_keys_values(self, sources_KD: Tensor) -> tuple[Tensor, Tensor]:
        """(K, Hkv, E)"""
        keys, values = (proj(sources_KD).unflatten(-1, (self.num_kv_heads, -1)) for proj in (self.k_proj, self.v_proj))
        return keys, values

    def read(self, receivers_QD: Tensor, k_GKE: Tensor, v_GKE: Tensor, num_visible: list[int]) -> Tensor:
        """(Q, D): receiver q sees the first `num_visible[q]` sources, ascending."""
        q = self.q_proj(receivers_QD).unflatten(-1, (self.num_heads, self.head_dim))
        mixed_QHE = torch.zeros_like(q)
        start = 0
        for count, alike in itertools.groupby(num_visible):
            stop = start + len(list(alike))
            if count:
                mixed_QHE[start:stop] = full_attention(q[start:stop], k_GKE[:, :count], v_GKE[:, :count])
            start = stop
        return self._gated(mixed_QHE)

    def _gated(self, mixed_QHE: Tensor) -> Tensor:
        gated: Tensor = torch.tanh(self.alpha) * self.o_proj(mixed_QHE.flatten(1))
        return gated

    def idle(self, hidden_TD: Tensor) -> Tensor:
        """Returns zeros (1, D) through every parameter: ZeRO needs them on every rank."""
        token = _one_token(hidden_TD)  # zero gradient, but it must pass for ZeRO-3
        one = Segments(torch.zeros(1, dtype=torch.long, device=token.device), 1).rows([0])
        visible = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=token.device)
        group = TransferRows(receivers=one, sources=one, visible_R1QK=visible)
        return 0.0 * self(token, token, [group])

    @torch.no_grad()
    def copy_from(self, attention: Attention) -> None:
        """Copies all but the gate."""
        own = dict(self.named_parameters())
        for name, parameter in attention.named_parameters():
            own[name].copy_(parameter)


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferRows:
    """Segments with receivers and sources padded to one shape."""

    receivers: RowBucket
    sources: RowBucket
    visible_R1QK: Tensor
    """True for real sources before the receiver."""

    def attend(self, q_QHE: Tensor, k_KHE: Tensor, v_KHE: Tensor) -> Tensor:
        """(M, H, E); zeros without visible sources."""
        q = self.receivers.pad(q_QHE).transpose(1, 2)
        k, v = (self.sources.pad(tensor).transpose(1, 2) for tensor in (k_KHE, v_KHE))
        sees_any = self.visible_R1QK.any(-1, keepdim=True)
        mixed = F.scaled_dot_product_attention(q, *repeat_kv(k, v, q.shape[1]), attn_mask=self.visible_R1QK | ~sees_any)
        return self.receivers.unpad((mixed * sees_any).transpose(1, 2))


def apply_site(
    stream: TokenStream,
    site: TransVSite,
    layer: TransVLayer | None,
    block: DecoderBlock | None,
    *,
    checkpointing: bool = False,
) -> TokenStream:
    """Drops vision tokens and updates instruction tokens.

    Args:
        layer: None for `transfer: none`.
        block: block `site.layer`, for `select: attention` and `importance`.
        checkpointing: recompute the cross-attention in the backward pass.
    """
    vision_T = stream.token_kind_T == TokenKind.VISION
    kept_T = ~vision_T | _select(stream, site, block, vision_T)
    if layer is not None:
        sources_T = kept_T & vision_T if site.transfer_from == "kept" else ~kept_T
        stream = _transfer(stream, layer, sources_T, checkpointing)
    if bool(kept_T.all()):
        return stream
    return stream.keep(kept_T.nonzero().squeeze(1))


def num_kept(original: int, present: int, keep: float) -> int:
    return min(present, math.floor(keep * original + 0.5))


def evenly_spaced(num_present: int, num_kept: int, device: torch.device) -> Tensor:
    """(N,) bool: vision tokens that stay."""
    every = torch.ones(num_present, dtype=torch.bool, device=device)
    return every if num_kept == num_present else _select_uniform(every, [num_present], [num_kept])


def _select(stream: TokenStream, site: TransVSite, block: DecoderBlock | None, vision_T: Tensor) -> Tensor:
    segments = stream.segments
    present = torch.bincount(segments.ids[vision_T], minlength=segments.num_segments).tolist()
    stay = [num_kept(n, here, site.keep) for n, here in zip(stream.original_counts, present, strict=True)]
    if site.select == "uniform":
        return vision_T if stay == present else _select_uniform(vision_T, present, stay)
    assert block is not None  # guaranteed by TimeViperConfig
    select = _select_by_importance if site.select == "importance" else _select_by_attention
    return select(stream, block, vision_T, present, stay)


def _select_uniform(vision_T: Tensor, present: list[int], stay: list[int]) -> Tensor:
    """Keeps indices j * (n - 1) // (k - 1), or the first for k = 1."""
    device = vision_T.device
    n_S1, k_S1 = (torch.tensor(counts, device=device)[:, None] for counts in (present, stay))
    j_1K = torch.arange(max(stay), device=device)[None]
    first_S1 = n_S1.cumsum(0) - n_S1
    index_SK = first_S1 + j_1K * (n_S1 - 1) // (k_S1 - 1).clamp(min=1)
    chosen = index_SK[j_1K < k_S1]
    index = vision_T.nonzero().squeeze(1)
    kept_T = torch.zeros_like(vision_T)
    kept_T[index[chosen]] = True
    return kept_T


@torch.no_grad()
def _select_by_attention(
    stream: TokenStream, block: DecoderBlock, vision_T: Tensor, present: list[int], stay: list[int]
) -> Tensor:
    """Breaks ties by the lower index."""
    segments = stream.segments
    kept_T = vision_T.clone()
    queries_SHE, keys_TGE = _score_inputs(stream, block, any_drop=stay != present)
    lengths = [length if k < n else 0 for length, n, k in zip(segments.lengths, present, stay, strict=True)]
    for members in group_by_length(lengths):
        rows = segments.rows(members)
        score_RL = _score_row(stream, rows, queries_SHE[rows.segment_index], rows.pad(keys_TGE))
        vision_RL = rows.pad(vision_T)
        ranked = score_RL.masked_fill(~vision_RL, -1.0).sort(dim=1, descending=True, stable=True).indices
        k_R1 = torch.tensor([stay[member] for member in members], device=vision_T.device)[:, None]
        chosen_RL = torch.arange(rows.length, device=vision_T.device) < k_R1
        kept_RL = torch.zeros_like(vision_RL).scatter_(1, ranked, chosen_RL)
        kept_T[rows.token_index] = rows.unpad(kept_RL)
    return kept_T


@torch.no_grad()
def _select_by_importance(
    stream: TokenStream, block: DecoderBlock, vision_T: Tensor, present: list[int], stay: list[int]
) -> Tensor:
    """Breaks ties by the lower index."""
    kept_T, segments = vision_T.clone(), stream.segments
    if stay == present:
        one = _one_token(stream.hidden_TD)  # the projections are collectives under ZeRO-3
        score_inputs(block, one, Segments(torch.zeros(1, dtype=torch.long, device=one.device), 1))
        return kept_T
    inputs = score_inputs(block, stream.hidden_TD, segments)
    starts, lasts = segments.starts_S.tolist(), _score_tokens(stream).tolist()
    for start, length, last, n, k in zip(starts, segments.lengths, lasts, present, stay, strict=True):
        if k < n:
            own = slice(start, start + length)
            queries = instruction_index(stream.token_kind_T[own], last - start)
            vision = vision_T[own].nonzero().squeeze(1)
            scores = importance(inputs.take(own), queries)[vision]
            dropped = scores.sort(descending=True, stable=True).indices[k:]
            kept_T[start + vision[dropped]] = False
    return kept_T


def _score_inputs(stream: TokenStream, block: DecoderBlock, *, any_drop: bool) -> tuple[Tensor, Tensor]:
    """Queries (S, H, E) of the score tokens and keys (T, G, E) of all tokens.

    Each projection runs exactly once, even without drops: it is a collective under ZeRO-3.
    """
    positions = stream.segments.original_positions_T
    hidden = stream.hidden_TD
    if not any_drop:
        hidden, positions = _one_token(hidden), positions.new_zeros(1)
    index = _score_tokens(stream).clamp(max=len(hidden) - 1)  # a segment without tokens has no index
    attention, norm = block.attention, block.attention_norm
    return attention.queries(norm(hidden[index]), positions[index]), attention.keys(norm(hidden), positions)


def _one_token(hidden_TD: Tensor) -> Tensor:
    return hidden_TD[:1] if len(hidden_TD) else hidden_TD.new_zeros(1, hidden_TD.shape[1])


def _score_row(stream: TokenStream, rows: RowBucket, queries_RHE: Tensor, keys_RLGE: Tensor) -> Tensor:
    scores = grouped_scores(queries_RHE, keys_RLGE.transpose(1, 2))
    last_R = _score_tokens(stream)[rows.segment_index] - stream.segments.starts_S[rows.segment_index]
    visible_RL = torch.arange(rows.length, device=scores.device) <= last_R[:, None]
    return scores.masked_fill(~visible_RL[:, None, None], -torch.inf).softmax(-1).mean((1, 2))


def _score_tokens(stream: TokenStream) -> Tensor:
    """(S,) flat index of the last token before the first response, or in the segment."""
    segments = stream.segments
    ends_S = segments.starts_S + segments.lengths_S
    response = (stream.token_kind_T == TokenKind.RESPONSE).nonzero().squeeze(1)
    first_S = ends_S.scatter_reduce(0, segments.ids[response], response, reduce="amin")
    return (first_S - 1).clamp(min=0).maximum(segments.starts_S)


def _transfer(stream: TokenStream, layer: TransVLayer, source_T: Tensor, checkpointing: bool) -> TokenStream:
    receiver_index = (stream.token_kind_T == TokenKind.INSTRUCTION).nonzero().squeeze(1)
    source_index = source_T.nonzero().squeeze(1)
    rows = _transfer_rows(stream.segments, receiver_index, source_index)
    hidden = stream.hidden_TD
    if not rows and not layer.training and not torch.is_grad_enabled():
        return stream  # training ranks, even in validation, call the layer alike: under ZeRO-3 it is a collective
    operands = hidden, layer, receiver_index, source_index, rows
    update = checkpoint(_update, *operands, use_reentrant=False) if checkpointing else _update(*operands)
    return stream.with_hidden(hidden + (put_rows(update, receiver_index, len(hidden)) if rows else update))


def _update(
    hidden_TD: Tensor, layer: TransVLayer, receiver_index: Tensor, source_index: Tensor, rows: list[TransferRows]
) -> Tensor:
    """(Q, D) of the receivers; zeros (1, D) without any.

    Ends with a call of `layer`: under ZeRO-3 it is a collective, which backward recomputes first on every rank.
    """
    if not rows:
        return layer.idle(hidden_TD)
    return layer(take_rows(hidden_TD, receiver_index), take_rows(hidden_TD, source_index), rows)


def _transfer_rows(segments: Segments, receiver_index: Tensor, source_index: Tensor) -> list[TransferRows]:
    receivers, sources = segments.keep(receiver_index), segments.keep(source_index)
    num_sources = [k if q else 0 for q, k in zip(receivers.lengths, sources.lengths, strict=True)]
    rows = []
    for alike in group_by_length(num_sources):
        for group in group_by_length([receivers.lengths[member] for member in alike]):
            members = [alike[index] for index in group]
            receiver_rows, source_rows = receivers.rows(members), sources.rows(members)
            index_RQ = receiver_rows.pad(receiver_index)
            index_RK = source_rows.pad(source_index)
            real_RK = torch.arange(source_rows.length, device=index_RK.device) < source_rows.row_lengths[:, None]
            visible = (index_RK[:, None, :] < index_RQ[:, :, None]) & real_RK[:, None]
            rows.append(TransferRows(receivers=receiver_rows, sources=source_rows, visible_R1QK=visible[:, None]))
    return rows
