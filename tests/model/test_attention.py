from __future__ import annotations

import resource

import pytest
import torch
from torch.nn import functional as F

import timeviper_model.attention as attention
from reference.small_models import SMALL
from timeviper_model.attention import Attention, continued_attention, grouped_attention, segment_causal_attention
from timeviper_model.segments import Segments


def test_segments_of_any_length_attend_to_themselves_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 1, 20, 2, 3]
    ids = torch.tensor([number for number, length in enumerate(lengths) for _ in range(length)])
    q, k, v = (torch.randn(29, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    mixed = segment_causal_attention(q, k, v, Segments(ids, 5))
    for number in range(5):
        own = ids == number
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
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.no_grad():
        h = torch.randn(tokens, 24)
        out = layer(h, Segments(torch.zeros(tokens, dtype=torch.long), 1))
        first = layer(h[:50], Segments(torch.zeros(50, dtype=torch.long), 1))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB
    torch.testing.assert_close(out[:50], first, rtol=1e-4, atol=1e-5)


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
@pytest.mark.parametrize("mask_elements", [1, 60, 2**20])
def test_last_queries_see_all_before_them_however_few_fit_a_mask(
    num_queries: int, mask_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "MASK_ELEMENTS", mask_elements)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(20, heads, 8, generator=generator, dtype=torch.float64) for heads in (6, 2, 2))
    whole = segment_causal_attention(q, k, v, Segments(torch.zeros(20, dtype=torch.long), 1))
    last = continued_attention(q[-num_queries:], k.transpose(0, 1), v.transpose(0, 1))
    torch.testing.assert_close(last, whole[-num_queries:])
