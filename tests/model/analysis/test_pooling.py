from __future__ import annotations

import math

import pytest
import torch

from reference.small_models import make_model, make_sample, pack
from timeviper_model.analysis.maps import TokenMap, observe, token_map
from timeviper_model.analysis.pooling import equal_bins, head_statistics, pool_map
from timeviper_model.batching.segments import Segments
from timeviper_model.layers.transv import TokenStream
from timeviper_platform.benchmarks.measure import cost_elsewhere

MODEL = make_model()
ONE_OR_TWO_QUERIES = 200
"""elements of the map computed at a time"""
SAMPLES = [make_sample("sss" + "v" * 9 + "iiirr", seed=1), make_sample("svvvvirr", seed=2)]


@pytest.fixture(params=[2, 3], ids=["attention", "mamba"])
def seen(request: pytest.FixtureRequest) -> tuple[TokenMap, TokenStream]:
    return observe(MODEL, pack(SAMPLES), [request.param], lambda tokens, stream: (tokens, stream))[request.param]


@pytest.mark.parametrize("normalise", [False, True])
def test_group_averages_equal_loops_over_the_whole_matrix(seen: tuple[TokenMap, TokenStream], normalise: bool) -> None:
    tokens, stream = seen
    kinds, ids = stream.token_kind_T.tolist(), stream.segments.ids.tolist()
    sampled = [i for i in range(len(ids)) if i % 3]
    options = {"queries": torch.tensor(sampled), "max_elements": ONE_OR_TWO_QUERIES}
    pooled = pool_map(tokens, stream.token_kind_T, 4, normalise=normalise, **options)  # type: ignore[arg-type]
    matrix = tokens.rows(torch.arange(len(ids)))
    if normalise:
        matrix = matrix.abs() / matrix.abs().sum(-1, keepdim=True)
    for a in range(4):
        queries = [i for i in sampled if kinds[i] == a]
        for b in range(4):
            pairs = [(i, j) for i in queries for j in range(i + 1) if kinds[j] == b and ids[j] == ids[i]]
            for head in range(4):
                total = sum(matrix[head, i, j].item() for i, j in pairs)
                assert pooled.share_HAB[head, a, b].item() == pytest.approx(total / len(queries))
                assert pooled.num_pairs_AB[a, b].item() == len(pairs)


def test_head_statistics_equal_loops_over_the_whole_matrix(seen: tuple[TokenMap, TokenStream]) -> None:
    tokens, stream = seen
    ids, positions = stream.segments.ids.tolist(), stream.segments.positions_T.tolist()
    matrix = tokens.rows(torch.arange(len(ids))).abs()
    matrix = (matrix / matrix.sum(-1, keepdim=True)).tolist()
    found = head_statistics(tokens, num_sink_tokens=2, max_elements=ONE_OR_TWO_QUERIES)
    for head in range(4):
        sink = entropy = distance = 0.0
        for i in range(len(ids)):
            for j in range(i + 1):
                p = matrix[head][i][j]
                sink += p * (positions[j] < 2 and ids[i] == ids[j])
                entropy -= p * math.log(p) if p else 0.0
                distance += p * (i - j)
        expected = [total / len(ids) for total in (sink, entropy, distance)]
        assert [values[head].item() for values in found] == pytest.approx(expected)


def test_shares_of_a_query_are_positive_and_sum_to_one(seen: tuple[TokenMap, TokenStream]) -> None:
    tokens, stream = seen
    for labels in (stream.token_kind_T, equal_bins(stream.segments, 4)):
        shares = pool_map(tokens, labels, 4, normalise=True).share_HAB
        assert bool((shares >= 0).all())
        torch.testing.assert_close(shares.sum(-1), torch.ones_like(shares[..., 0]))


def test_equal_bins_cut_each_segment_evenly() -> None:
    segments = Segments(torch.tensor([0] * 6 + [1] * 3, dtype=torch.int32), 2)
    assert equal_bins(segments, 3).tolist() == [0, 0, 1, 1, 2, 2, 0, 1, 2]


def _pool_long_video() -> None:
    """Pools maps of a Mamba-2 and an attention block of a video of 10,000 frames of 4 tokens."""
    model, num_tokens = make_model(dtype=torch.float32), 40_016
    segments = Segments(torch.zeros(num_tokens, dtype=torch.int32), 1)
    labels = torch.arange(num_tokens) * 8 // num_tokens
    hidden = torch.randn(num_tokens, 24, generator=torch.Generator().manual_seed(0))
    stream = TokenStream(
        hidden_TD=hidden,
        segments=segments,
        token_kind_T=torch.zeros(num_tokens, dtype=torch.int8),
        labels_T=torch.full((num_tokens,), -100),
        original_counts=(0,),
    )
    queries = torch.arange(num_tokens)[::1000]
    for layer in (0, 2):
        shares = pool_map(token_map(model.backbone.block(layer), stream), labels, 8, normalise=True, queries=queries)
        assert torch.allclose(shares.share_HAB.sum(-1), torch.ones(4, 8, dtype=torch.float64))


@pytest.mark.slow
def test_ten_thousand_frames_are_pooled_in_bounded_memory() -> None:
    # the dense matrix of one head alone would be 6.4 GB in fp32
    assert cost_elsewhere(_pool_long_video).peak_bytes < 400_000_000
