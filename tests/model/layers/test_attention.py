from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from reference.small_models import SMALL
from timeviper_model.batching.segments import Segments
from timeviper_model.layers.attention import (
    MIN_CHUNK_TOKENS,
    NUM_CHUNKS,
    Attention,
    continued_attention,
    grouped_attention,
    segment_causal_attention,
)
from timeviper_platform.benchmarks.measure import peak_resident_bytes, reset_peak, resident_bytes


def test_segments_of_any_length_attend_to_themselves_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 1, 20, 2, 3]
    ids = torch.tensor([index for index, length in enumerate(lengths) for _ in range(length)])
    q, k, v = (torch.randn(29, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    mixed = segment_causal_attention(q, k, v, Segments(ids, 5))
    for index in range(5):
        own = ids == index
        alone = F.scaled_dot_product_attention(
            q[own].transpose(0, 1),
            k[own].transpose(0, 1).repeat_interleave(2, 0),
            v[own].transpose(0, 1).repeat_interleave(2, 0),
            is_causal=True,
        )
        torch.testing.assert_close(mixed[own], alone.transpose(0, 1))


def test_long_segment_needs_no_square_matrix() -> None:
    tokens = 12_000  # a square of scores for the four heads would be 2.3 GB
    layer = Attention(SMALL.text)
    h = torch.randn(tokens, 24)
    with torch.no_grad():
        reset_peak()
        before = resident_bytes()
        out = layer(h, Segments(torch.zeros(tokens, dtype=torch.long), 1))
        assert peak_resident_bytes() - before < 500_000_000
        first = layer(h[:50], Segments(torch.zeros(50, dtype=torch.long), 1))
    torch.testing.assert_close(out[:50], first, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "num_keys", [NUM_CHUNKS * MIN_CHUNK_TOKENS - 1, NUM_CHUNKS * MIN_CHUNK_TOKENS, NUM_CHUNKS * MIN_CHUNK_TOKENS + 3]
)
def test_a_lone_group_over_a_long_context_equals_plain_attention(num_keys: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, *shape, 8, generator=generator, dtype=torch.float64)
        for shape in ((4,), (1, num_keys), (1, num_keys))
    )
    for visible in (None, torch.arange(num_keys)[None] < num_keys - 5):
        count = num_keys if visible is None else num_keys - 5
        keys, values = (x[0, :, :count].expand(4, -1, -1) for x in (k, v))
        expected = F.scaled_dot_product_attention(q[0, :, None], keys, values)[:, 0]
        torch.testing.assert_close(grouped_attention(q, k, v, visible)[0], expected)


def test_grouped_attention_reads_only_what_is_visible() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8), (2, 2, 6, 8), (2, 2, 6, 8)))
    visible = torch.arange(6) < torch.tensor([[6], [2]])
    mixed = grouped_attention(q, k, v, visible)
    for row, length in enumerate((6, 2)):
        keys, values = (tensor[row, :, :length].repeat_interleave(2, 0) for tensor in (k, v))
        alone = F.scaled_dot_product_attention(q[row, :, None], keys, values)
        torch.testing.assert_close(mixed[row], alone[:, 0])


@pytest.mark.parametrize("num_queries", [1, 5, 16, 20])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_last_queries_see_all_before_them(num_queries: int, requires_grad: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(20, heads, 8, generator=generator, dtype=torch.float64) for heads in (6, 2, 2))
    whole = segment_causal_attention(q, k, v, Segments(torch.zeros(20, dtype=torch.long), 1))
    queries = q[-num_queries:].requires_grad_(requires_grad)
    last = continued_attention(queries, k.transpose(0, 1), v.transpose(0, 1))
    torch.testing.assert_close(last, whole[-num_queries:])


def test_scores_far_apart_before_and_within_a_chunk_stay_finite() -> None:
    q, v = torch.full((4, 1, 8), 30.0), torch.arange(24.0).view(24, 1, 1).expand(24, 1, 8)
    k = torch.full((24, 1, 8), -30.0)
    k[5] = 30.0  # one key before the chunk dominates: scores of 2546 against -2546
    mixed = continued_attention(q, k.transpose(0, 1), v.transpose(0, 1))
    torch.testing.assert_close(mixed, torch.full_like(mixed, 5.0))
