from __future__ import annotations

import pytest
import torch

from reference.merge_loops import merge_tokens_by_loops
from timeviper_model.layers.tome import merge_rounds, merge_tokens


def test_rounds_halve_and_then_take_the_remainder() -> None:
    assert merge_rounds(729, 16) == [364, 182, 91, 46, 23, 7]
    assert merge_rounds(16, 16) == []
    assert merge_rounds(17, 16) == [1]


@pytest.mark.parametrize(("num_patches", "num_tokens", "num_heads"), [(16, 4, 4), (27, 5, 2), (36, 4, 1), (9, 8, 2)])
def test_merging_equals_the_loops(num_patches: int, num_tokens: int, num_heads: int) -> None:
    features = torch.randn(3, num_patches, 8, generator=torch.Generator().manual_seed(num_patches))
    merged = merge_tokens(features, num_tokens, num_heads=num_heads)
    for frame, expected_of in zip(merged, features, strict=True):
        expected = torch.tensor(merge_tokens_by_loops(expected_of.double().tolist(), num_tokens, num_heads))
        torch.testing.assert_close(frame, expected.float(), rtol=1e-5, atol=1e-5)


def test_bf16_features_are_summed_in_fp32() -> None:
    features = torch.randn(1, 300, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    merged = merge_tokens(features, 2, num_heads=1)
    expected = torch.tensor(merge_tokens_by_loops(features[0].double().tolist(), 2, 1))
    assert merged.dtype == torch.bfloat16
    # half a unit of bf16: only the result is rounded
    torch.testing.assert_close(merged[0].double(), expected.double(), rtol=2**-8, atol=1e-6)


def test_few_tokens_pass_through() -> None:
    features = torch.randn(2, 4, 8)
    assert torch.equal(merge_tokens(features, 4, num_heads=2), features)
    assert torch.equal(merge_tokens(features, 16, num_heads=2), features)


def test_frames_are_merged_independently() -> None:
    features = torch.randn(4, 36, 8)
    together = merge_tokens(features, 4, num_heads=2)
    alone = torch.cat([merge_tokens(frame[None], 4, num_heads=2) for frame in features])
    torch.testing.assert_close(together, alone)


def test_invalid_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="num_heads = 3 must divide the features' width 8"):
        merge_tokens(torch.randn(1, 9, 8), 4, num_heads=3)
    with pytest.raises(ValueError, match="num_tokens = 0"):
        merge_tokens(torch.randn(1, 9, 8), 0)
