from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timeviper_model.batching.segments import MAX_ROW_WASTE, Segments, group_by_length
from timeviper_model.batching.shapes import put_rows, take_rows


def make_segments(lengths: list[int]) -> Segments:
    ids = torch.tensor([index for index, length in enumerate(lengths) for _ in range(length)], dtype=torch.int32)
    return Segments(ids, len(lengths))


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(any))
def test_buckets_hold_every_token_once_and_waste_little(lengths: list[int]) -> None:
    segments = make_segments(lengths)
    x = torch.arange(sum(lengths) * 2.0).view(-1, 2)
    padded = [bucket.pad(x) for bucket in segments.buckets]
    joined = segments.join([bucket.unpad(rows) for bucket, rows in zip(segments.buckets, padded, strict=True)])
    assert torch.equal(joined, x)
    for bucket, rows in zip(segments.buckets, padded, strict=True):
        assert rows.shape[:2] == (bucket.num_rows, bucket.length)
        assert bucket.num_rows * bucket.length <= MAX_ROW_WASTE * len(bucket.token_index)
        for row, segment, length in zip(rows, bucket.segment_index.tolist(), bucket.row_lengths.tolist(), strict=True):
            assert torch.equal(row[:length], x[segments.ids == segment])
            assert not row[length:].any()


def test_rows_follow_the_requested_order() -> None:
    segments = make_segments([2, 3, 2, 2])
    x = torch.arange(1.0, 10.0)
    assert segments.rows([2, 0]).pad(x).tolist() == [[6.0, 7.0], [1.0, 2.0]]
    assert segments.rows([0, 1]).pad(x).tolist() == [[1.0, 2.0, 0.0], [3.0, 4.0, 5.0]]
    assert segments.positions_T.tolist() == [0, 1, 0, 1, 2, 0, 1, 0, 1]


def test_one_long_and_many_short_segments_share_no_bucket() -> None:
    groups = group_by_length([1000, *[10] * 50, 0])
    assert groups == [[0], list(range(1, 51))]


def test_a_segment_may_lose_all_its_tokens() -> None:
    segments = make_segments([2, 1, 3]).keep(torch.tensor([0, 1, 4, 5]))
    assert segments.lengths == [2, 0, 2]
    assert segments.seq_idx_T is not None
    assert make_segments([0, 4]).seq_idx_T is None


def test_original_positions_survive_repeated_drops() -> None:
    whole = make_segments([5, 0, 3])
    assert torch.equal(whole.original_positions_T, whole.positions_T)
    once = whole.keep(torch.tensor([0, 2, 3, 4, 6, 7]))
    twice = once.keep(torch.tensor([0, 2, 3, 5]))
    assert twice.positions_T.tolist() == [0, 1, 2, 0]
    assert twice.original_positions_T.tolist() == [0, 3, 4, 2]


def test_original_positions_must_match_the_tokens() -> None:
    ids = torch.zeros(3, dtype=torch.int32)
    later = Segments(ids, 1, torch.tensor([40, 41, 42]))
    assert later.positions_T.tolist() == [0, 1, 2]
    assert later.keep(torch.tensor([1, 2])).original_positions_T.tolist() == [41, 42]
    with pytest.raises(ValueError, match=r"\(2,\) original positions for \(3,\) ids"):
        Segments(ids, 1, torch.tensor([0, 1]))


def test_ids_beyond_the_number_of_segments_are_refused() -> None:
    with pytest.raises(ValueError, match="num_segments = 1"):
        Segments(torch.tensor([0, 1]), 1)


def test_taking_and_putting_rows_are_each_others_gradient() -> None:
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([3, 0, 4])
    assert torch.equal(take_rows(x, index), x[index])
    torch.autograd.gradcheck(lambda t: take_rows(t, index), x)
    torch.autograd.gradcheck(lambda t: put_rows(t, torch.tensor([6, 1, 2, 0, 5]), 7), x)
