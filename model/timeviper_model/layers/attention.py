"""Causal attention with grouped key/value heads: over a flat pack, over tokens that continue a slot, or one token a
slot; positions by RoPE or not at all.

Knows segments (no token sees another sample) and its own keys and values in a cache; not blocks, vision or text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timeviper_model.batching.segments import Segments
from timeviper_model.config import TextConfig
from timeviper_model.ops.linear import Linear

NUM_CHUNKS, MIN_CHUNK_TOKENS = 8, 64
"""of a long context whose values a CPU sums up, and the tokens from which a piece is worth its call"""


class KeyValueStore(Protocol):
    """Where one attention layer keeps the keys and values of its slots; each slot has a length of its own."""

    def extend(self, q_THE: Tensor, k_THE: Tensor, v_THE: Tensor) -> Tensor:
        """Append T tokens to the one slot of this store; (T, H, E), what each query reads up to itself."""
        ...

    def attend(self, q_BHE: Tensor, k_BHE: Tensor, v_BHE: Tensor) -> Tensor:
        """Append one token to each of B slots; (B, H, E), what its queries read from its slot."""
        ...


class Rotary:
    """Rotary position encoding (arXiv 2104.09864), in the half-split form of Hugging Face's Llama and Qwen2.

    Dimensions j and j + E/2 are one plane, turned by position * theta ** (-2j / E).
    """

    def __init__(self, head_dim: int, theta: float) -> None:
        self.head_dim, self.theta = head_dim, theta

    def __call__(self, x_THE: Tensor, positions_T: Tensor) -> Tensor:
        """(T, H, E) -> (T, H, E), turned in at least fp32."""
        dtype = torch.float64 if x_THE.dtype == torch.float64 else torch.float32
        exponents = torch.arange(0, self.head_dim, 2, device=x_THE.device, dtype=dtype) / self.head_dim
        angles_T1F = (positions_T[:, None] * self.theta**-exponents)[:, None]
        cos, sin = angles_T1F.cos(), angles_T1F.sin()
        first, second = x_THE.to(dtype).chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_THE.dtype)


class Attention(nn.Module):
    """Grouped-query attention, scale 1 / sqrt(head_dim); Nemotron-H has neither bias nor positions, Qwen2 has both."""

    def __init__(self, config: TextConfig, *, rotary: Rotary | None = None) -> None:
        super().__init__()
        self.rotary = rotary
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        query_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = Linear(query_size, config.hidden_size, bias=False)
        self.attend: Callable[[Tensor, Tensor, Tensor, Segments], Tensor] = segment_causal_attention
        """a function of this signature; backends.py puts a kernel in its place"""

    def forward(self, h_TD: Tensor, segments: Segments, store: KeyValueStore | None = None) -> Tensor:
        """(T, D) -> (T, D), every token over its segment up to itself; with `store`, over what is in it too."""
        positions_T = segments.original_positions_T
        q, k, v = self.queries(h_TD, positions_T), self.keys(h_TD, positions_T), self.values(h_TD)
        mixed = self.attend(q, k, v, segments) if store is None else store.extend(q, k, v)
        return self.o_proj(mixed.flatten(1))

    def step(self, h_BD: Tensor, store: KeyValueStore, positions_B: Tensor) -> Tensor:
        """The next token of B slots, each at its place in its whole sequence: (B, D) -> (B, D)."""
        q, k, v = self.queries(h_BD, positions_B), self.keys(h_BD, positions_B), self.values(h_BD)
        return self.o_proj(store.attend(q, k, v).flatten(1))

    def queries(self, h_TD: Tensor, positions_T: Tensor) -> Tensor:
        """(T, D) at their original positions -> (T, H, E)"""
        q = self.q_proj(h_TD).unflatten(-1, (self.num_heads, self.head_dim))
        return q if self.rotary is None else self.rotary(q, positions_T)

    def keys(self, h_TD: Tensor, positions_T: Tensor) -> Tensor:
        """(T, D) at their original positions -> (T, Hkv, E)"""
        k = self.k_proj(h_TD).unflatten(-1, (self.num_kv_heads, self.head_dim))
        return k if self.rotary is None else self.rotary(k, positions_T)

    def values(self, h_TD: Tensor) -> Tensor:
        """(T, D) -> (T, Hkv, E)"""
        return self.v_proj(h_TD).unflatten(-1, (self.num_kv_heads, self.head_dim))


def segment_causal_attention(q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, segments: Segments) -> Tensor:
    """(T, H, E): causal attention inside each segment.

    Segments of similar length are padded to rows; padding comes after the real tokens, where a causal mask already
    hides it. A long segment is a row of its own, and no T x T matrix is ever built.
    """
    if not segments.buckets:
        return q_THE + 0.0 * (k_THE.sum() + v_THE.sum())  # no token is left, yet every parameter takes part
    outputs = []
    for bucket in segments.buckets:
        q, k, v = (bucket.pad(tensor).transpose(1, 2) for tensor in (q_THE, k_THE, v_THE))
        mixed = F.scaled_dot_product_attention(q, *repeat_kv(k, v, q.shape[1]), is_causal=True)
        outputs.append(bucket.unpad(mixed.transpose(1, 2)))
    return segments.join(outputs)


def continued_attention(q_THE: Tensor, k_GLE: Tensor, v_GLE: Tensor) -> Tensor:
    """(T, H, E): causal attention of the last T of L tokens, with no T x L mask or matrix anywhere.

    CUDA kernels align the causal mask to the last query themselves. PyTorch's CPU kernel aligns it to the first, and
    takes twice as long with a mask written out; so each query reads the tokens before the piece and those of the piece
    apart, and the two are weighted by their sums of exponentials, as Flash Attention does (arXiv 2205.14135, 3.1).

        before     piece
        x x x x | x . .        every query sees all of `before`, and the causal half of the piece
        x x x x | x x .
        x x x x | x x x

    Args:
        q_THE: queries of the last T tokens.
        k_GLE: keys (Hkv, L, E) of all of them, never repeated in memory.
        v_GLE: values, likewise.
    """
    num_queries, num_before = len(q_THE), k_GLE.shape[1] - len(q_THE)
    if not num_before:
        return _read(q_THE, k_GLE, v_GLE, is_causal=True)
    if q_THE.device.type != "cpu" or q_THE.requires_grad:
        from torch.nn.attention.bias import causal_lower_right  # brings torch.compile: seconds of every start

        return _read(q_THE, k_GLE, v_GLE, mask_TL=causal_lower_right(num_queries, k_GLE.shape[1]))
    # the kernel does not look at the last stride
    q_THE, k_GLE, v_GLE = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_THE, k_GLE, v_GLE))
    q, k, v = _by_group(q_THE, k_GLE, v_GLE)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # SDPA keeps the sums to itself
    before, log_sum_before = kernel(q.flatten(1, 2)[:, None], k_GLE[:, None, :num_before], v_GLE[:, None, :num_before])
    before, log_sum_before = before.view_as(q), log_sum_before.view(q.shape[:3])
    chunk, log_sum_chunk = kernel(q, k[:, :, num_before:], v[:, :, num_before:], is_causal=True)
    share_before = torch.sigmoid(log_sum_before - log_sum_chunk).to(q.dtype)[..., None]
    return _from_groups(torch.lerp(chunk, before, share_before))


def full_attention(q_THE: Tensor, k_GLE: Tensor, v_GLE: Tensor) -> Tensor:
    """(T, H, E): every query over all L keys and values (Hkv, L, E), which are never repeated in memory.

    A group's heads are one head of more queries, since all of them see the same: larger products.
    """
    q, _, _ = _by_group(q_THE, k_GLE, v_GLE)
    mixed = F.scaled_dot_product_attention(q.flatten(1, 2)[:, None], k_GLE[:, None], v_GLE[:, None])
    return _from_groups(mixed.view(q.shape))


def _read(
    q_THE: Tensor, k_GLE: Tensor, v_GLE: Tensor, *, mask_TL: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """(T, H, E)"""
    q, k, v = _by_group(q_THE, k_GLE, v_GLE)
    return _from_groups(F.scaled_dot_product_attention(q, k, v, attn_mask=mask_TL, is_causal=is_causal))


def _by_group(q_THE: Tensor, k_GLE: Tensor, v_GLE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views (Hkv, H / Hkv, T or L, E): groups stand in for the batch, so that a group's heads share its keys."""
    q = q_THE.view(len(q_THE), len(k_GLE), -1, q_THE.shape[-1]).permute(1, 2, 0, 3)
    k, v = (x[:, None].expand(-1, q.shape[1], -1, -1) for x in (k_GLE, v_GLE))
    return q, k, v


def _from_groups(mixed_GrTE: Tensor) -> Tensor:
    """(T, H, E)"""
    return mixed_GrTE.permute(2, 0, 1, 3).flatten(1, 2)


def grouped_attention(q_BHE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, visible_BL: Tensor | None = None) -> Tensor:
    """(B, H, E): one query a head; the queries of a group share one pass over its keys and values.

    Args:
        q_BHE: queries.
        k_BHLE: keys (B, Hkv, L, E), never repeated in memory.
        v_BHLE: values, likewise.
        visible_BL: bool; None = all. Every query must see something.
    """
    scores = grouped_scores(q_BHE, k_BHLE)
    if visible_BL is not None:
        scores = scores.masked_fill(~visible_BL[:, None, None], -torch.inf)
    return _weighted_sum(scores.softmax(-1).to(v_BHLE.dtype), v_BHLE).flatten(1, 2)


def _weighted_sum(weights_BHrL: Tensor, v_BHLE: Tensor) -> Tensor:
    """(B, Hkv, H / Hkv, E). A CPU's threads share products of a batch, not one: a lone group is a batch of pieces."""
    num_groups, length = weights_BHrL.shape[0] * weights_BHrL.shape[1], weights_BHrL.shape[-1]
    if v_BHLE.device.type != "cpu" or num_groups > 1 or length < NUM_CHUNKS * MIN_CHUNK_TOKENS:
        return weights_BHrL @ v_BHLE
    (weights_rL,), (v_LE,) = (x.flatten(0, 1) for x in (weights_BHrL, v_BHLE))
    stop = length - length % NUM_CHUNKS
    chunks_ZrE = torch.bmm(
        weights_rL[:, :stop].unflatten(1, (NUM_CHUNKS, -1)).transpose(0, 1), v_LE[:stop].unflatten(0, (NUM_CHUNKS, -1))
    )
    return (chunks_ZrE.sum(0) + weights_rL[:, stop:] @ v_LE[stop:])[None, None]


def grouped_scores(q_BHE: Tensor, k_BHLE: Tensor) -> Tensor:
    """(B, Hkv, H / Hkv, L): scaled scores before softmax, at least fp32."""
    q = q_BHE.view(len(q_BHE), k_BHLE.shape[1], -1, q_BHE.shape[-1])
    scores = (k_BHLE @ q.transpose(-1, -2)).transpose(-1, -2)  # as q @ k^T a CPU reads long keys 2-4 times as slowly
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    return scores.to(dtype) * q.shape[-1] ** -0.5


def repeat_kv(k: Tensor, v: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values (B, Hkv, L, E) with a head for each query head."""
    repeats = num_heads // k.shape[1]
    return (k, v) if repeats == 1 else (k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1))
