"""Causal grouped-query attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timeviper_model.batching.segments import Segments
from timeviper_model.config import TextConfig, YarnScaling
from timeviper_model.ops.linear import Linear
from timeviper_model.ops.precision import wide_dtype, widen

NUM_CHUNKS, MIN_CHUNK_TOKENS = 8, 64
"""Limits for splitting long sums on a CPU."""


class KeyValueStore(Protocol):
    def extend(self, q_THE: Tensor, k_THE: Tensor, v_THE: Tensor) -> Tensor:
        """Appends keys and values to the only slot; returns (T, H, E) for the last T tokens."""
        ...

    def attend(self, q_BHE: Tensor, k_BHE: Tensor, v_BHE: Tensor) -> Tensor:
        """Appends one token to each slot; returns (B, H, E)."""
        ...


class Rotary:
    """RoPE (arXiv 2104.09864): dimensions j and j + E/2 rotate by position * theta ** (-2j / E)."""

    def __init__(self, head_dim: int, theta: float, scaling: YarnScaling | None = None) -> None:
        self.head_dim, self.theta, self.scaling = head_dim, theta, scaling

    def __call__(self, x_THE: Tensor, positions_T: Tensor) -> Tensor:
        dtype = wide_dtype(x_THE.dtype)
        exponents = torch.arange(0, self.head_dim, 2, device=x_THE.device, dtype=dtype) / self.head_dim
        frequencies_F = self.theta**-exponents
        if self.scaling is not None:
            frequencies_F = self._slowed(frequencies_F, self.scaling)
        angles_T1F = (positions_T[:, None] * frequencies_F)[:, None]
        cos, sin = angles_T1F.cos(), angles_T1F.sin()
        if self.scaling is not None:
            factor = self.scaling.attention_factor or 0.1 * math.log(self.scaling.factor) + 1.0
            cos, sin = cos * factor, sin * factor
        first, second = x_THE.to(dtype).chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_THE.dtype)

    def _slowed(self, frequencies_F: Tensor, scaling: YarnScaling) -> Tensor:
        """YaRN's equation 12: a ramp from whole to divided frequencies.

        It lies between the dimensions that turn `beta_fast` and `beta_slow` times within the original context.
        """

        def dimension(num_turns: float) -> float:
            turns = scaling.original_max_position_embeddings / (2.0 * math.pi * num_turns)
            return self.head_dim * math.log(turns) / (2.0 * math.log(self.theta))

        low = max(math.floor(dimension(scaling.beta_fast)), 0)
        high = min(math.ceil(dimension(scaling.beta_slow)), self.head_dim - 1)
        indices_F = torch.arange(len(frequencies_F), device=frequencies_F.device, dtype=frequencies_F.dtype)
        ramp_F = ((indices_F - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
        return frequencies_F * (1.0 - ramp_F + ramp_F / scaling.factor)


class Attention(nn.Module):
    """Grouped-query attention, scaled by 1 / sqrt(head_dim). Nemotron-H lacks biases and positions."""

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

    def forward(self, h_TD: Tensor, segments: Segments, store: KeyValueStore | None = None) -> Tensor:
        """(T, D), causal within each segment and after the tokens of `store`."""
        positions_T = segments.original_positions_T
        q, k, v = self.queries(h_TD, positions_T), self.keys(h_TD, positions_T), self.values(h_TD)
        mixed = self.attend(q, k, v, segments) if store is None else store.extend(q, k, v)
        return self.o_proj(mixed.flatten(1))

    def last(self, h_TD: Tensor, segments: Segments, store: KeyValueStore) -> Tensor:
        """(1, D): the last row of `forward`, without the queries of the others."""
        positions_T = segments.original_positions_T
        q, k, v = self.queries(h_TD[-1:], positions_T[-1:]), self.keys(h_TD, positions_T), self.values(h_TD)
        return self.o_proj(store.extend(q, k, v).flatten(1))

    def step(self, h_BD: Tensor, store: KeyValueStore, positions_B: Tensor) -> Tensor:
        """(B, D)"""
        q, k, v = self.queries(h_BD, positions_B), self.keys(h_BD, positions_B), self.values(h_BD)
        return self.o_proj(store.attend(q, k, v).flatten(1))

    def queries(self, h_TD: Tensor, positions_T: Tensor) -> Tensor:
        """(T, H, E)"""
        q = self.q_proj(h_TD).unflatten(-1, (self.num_heads, self.head_dim))
        return q if self.rotary is None else self.rotary(q, positions_T)

    def keys(self, h_TD: Tensor, positions_T: Tensor) -> Tensor:
        """(T, Hkv, E)"""
        k = self.k_proj(h_TD).unflatten(-1, (self.num_kv_heads, self.head_dim))
        return k if self.rotary is None else self.rotary(k, positions_T)

    def values(self, h_TD: Tensor) -> Tensor:
        """(T, Hkv, E)"""
        return self.v_proj(h_TD).unflatten(-1, (self.num_kv_heads, self.head_dim))


def segment_causal_attention(q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, segments: Segments) -> Tensor:
    """(T, H, E); the causal mask hides the padding."""
    if not segments.buckets:
        return q_THE + 0.0 * (k_THE.sum() + v_THE.sum())  # keeps every parameter in the graph
    outputs = []
    for bucket in segments.buckets:
        q, k, v = (bucket.pad(tensor).transpose(1, 2) for tensor in (q_THE, k_THE, v_THE))
        mixed = F.scaled_dot_product_attention(q, *repeat_kv(k, v, q.shape[1]), is_causal=True)
        outputs.append(bucket.unpad(mixed.transpose(1, 2)))
    return segments.join(outputs)


def continued_attention(q_THE: Tensor, k_GLE: Tensor, v_GLE: Tensor) -> Tensor:
    """(T, H, E): causal attention of the last T of L tokens.

    PyTorch's CPU kernel aligns its mask to the first query, and explicit masks double the time. So `before` and
    `chunk` are computed separately and weighted by their sums of exponentials (arXiv 2205.14135, 3.1).

        before  chunk
        xxxx    x..
        xxxx    xx.
        xxxx    xxx
    """
    num_queries, num_before = len(q_THE), k_GLE.shape[1] - len(q_THE)
    if not num_before:
        return _read(q_THE, k_GLE, v_GLE, is_causal=True)
    if q_THE.device.type != "cpu" or q_THE.requires_grad:
        from torch.nn.attention.bias import causal_lower_right  # slow import: loads torch.compile

        return _read(q_THE, k_GLE, v_GLE, mask_TL=causal_lower_right(num_queries, k_GLE.shape[1]))
    # the kernel ignores the last stride
    q_THE, k_GLE, v_GLE = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_THE, k_GLE, v_GLE))
    q, k, v = _by_group(q_THE, k_GLE, v_GLE)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # SDPA does not return the sums
    before, log_sum_before = kernel(q.flatten(1, 2)[:, None], k_GLE[:, None, :num_before], v_GLE[:, None, :num_before])
    before, log_sum_before = before.view_as(q), log_sum_before.view(q.shape[:3])
    chunk, log_sum_chunk = kernel(q, k[:, :, num_before:], v[:, :, num_before:], is_causal=True)
    share_before = torch.sigmoid(log_sum_before - log_sum_chunk).to(q.dtype)[..., None]
    return _from_groups(torch.lerp(chunk, before, share_before))


def full_attention(q_THE: Tensor, k_GLE: Tensor, v_GLE: Tensor) -> Tensor:
    """(T, H, E) over all keys. Heads of a group are merged for larger products."""
    q, _, _ = _by_group(q_THE, k_GLE, v_GLE)
    mixed = F.scaled_dot_product_attention(q.flatten(1, 2)[:, None], k_GLE[:, None], v_GLE[:, None])
    return _from_groups(mixed.view(q.shape))


def _read(
    q_THE: Tensor, k_GLE: Tensor, v_GLE: Tensor, *, mask_TL: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    q, k, v = _by_group(q_THE, k_GLE, v_GLE)
    return _from_groups(F.scaled_dot_product_attention(q, k, v, attn_mask=mask_TL, is_causal=is_causal))


def _by_group(q_THE: Tensor, k_GLE: Tensor, v_GLE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views (Hkv, H / Hkv, T or L, E)."""
    q = q_THE.view(len(q_THE), len(k_GLE), -1, q_THE.shape[-1]).permute(1, 2, 0, 3)
    k, v = (x[:, None].expand(-1, q.shape[1], -1, -1) for x in (k_GLE, v_GLE))
    return q, k, v


def _from_groups(mixed_GrTE: Tensor) -> Tensor:
    return mixed_GrTE.permute(2, 0, 1, 3).flatten(1, 2)


def grouped_attention(q_BHE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, visible_BL: Tensor | None = None) -> Tensor:
    """(B, H, E); every row of `visible_BL` needs a key."""
    scores = grouped_scores(q_BHE, k_BHLE)
    if visible_BL is not None:
        scores = scores.masked_fill(~visible_BL[:, None, None], -torch.inf)
    return _weighted_sum(scores.softmax(-1).to(v_BHLE.dtype), v_BHLE).flatten(1, 2)


def _weighted_sum(weights_BHrL: Tensor, v_BHLE: Tensor) -> Tensor:
    """Splits a single group into chunks: CPU threads share only a batch."""
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
    """(B, Hkv, H / Hkv, L) before softmax, at least fp32."""
    q = q_BHE.view(len(q_BHE), k_BHLE.shape[1], -1, q_BHE.shape[-1])
    scores = (k_BHLE @ q.transpose(-1, -2)).transpose(-1, -2)  # q @ k^T is 2-4 times as slow on a CPU
    return widen(scores) * q.shape[-1] ** -0.5


def repeat_kv(k: Tensor, v: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    repeats = num_heads // k.shape[1]
    return (k, v) if repeats == 1 else (k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1))
