from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from timeviper_platform.training.batches import packing
from timeviper_platform.training.batches.packing import (
    PackedOrder,
    PackingConfig,
    PackPlan,
    PackPosition,
    assign_packs,
    epoch_order,
    pack_best_fit,
)
from timeviper_platform.training.batches.sizes import SampleTable


def table_of(num_tokens: np.ndarray, *, weights: np.ndarray | None = None, frames: int = 1) -> SampleTable:
    count = len(num_tokens)
    return SampleTable(
        row_indices=np.arange(count),
        weights=np.ones(count) if weights is None else weights,
        num_tokens=num_tokens,
        num_vision_tokens=num_tokens // 2,
        num_frames=np.full(count, frames),
        num_targets=np.full(count, 3),
        fingerprint="synthetic",
    )


def mixed_lengths(count: int) -> np.ndarray:
    """Short text, captions of one image, and videos of up to 256 frames of 16 tokens."""
    generator = np.random.default_rng(0)
    text = generator.integers(30, 400, count // 3)
    images = generator.integers(40, 120, count // 3) + 16
    videos = generator.integers(8, 256, count - 2 * (count // 3)) * 16 + generator.integers(40, 200)
    return np.concatenate([text, images, videos])


def lists(packed: PackedOrder) -> list[list[int]]:
    return [packed.pack(number) for number in range(packed.num_packs)]


def slow_best_fit(tokens: list[int], frames: list[int], config: PackingConfig) -> list[list[int]]:
    """Best fit as defined: the sample that waited longest, then the longest that fit, the latest of equals."""
    buffer, upcoming, packs = list(range(len(tokens)))[: config.buffer_size], list(range(len(tokens))), []
    upcoming = upcoming[config.buffer_size :]
    while buffer:
        pack: list[int] = []
        chosen: int | None = min(buffer)
        while chosen is not None:
            pack.append(chosen)
            buffer = [item for item in buffer if item != chosen] + upcoming[:1]
            upcoming = upcoming[1:]
            left = config.max_tokens - sum(tokens[item] for item in pack)
            frames_left = (config.max_frames or 0) - sum(frames[item] for item in pack)
            fits = [item for item in buffer if tokens[item] <= left and frames[item] <= frames_left]
            chosen = max(fits, key=lambda item: (tokens[item], item), default=None)
        packs.append(pack)
    return packs


def test_packs_of_a_mixed_set_are_at_least_98_percent_full() -> None:
    lengths = mixed_lengths(3000)
    packs = PackPlan(table_of(lengths), PackingConfig(max_tokens=8192), seed=1).epoch(0)
    assert sum(pack.num_tokens for pack in packs) == lengths.sum()
    assert sum(pack.num_tokens for pack in packs) / (len(packs) * 8192) >= 0.98


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 5)), min_size=1, max_size=200),
    st.integers(1, 20),
)
@settings(max_examples=60, deadline=None)
def test_every_sample_is_in_one_pack_within_the_caps(sizes: list[tuple[int, int]], buffer_size: int) -> None:
    tokens, frames = np.array(sizes).T
    config = PackingConfig(max_tokens=50, max_frames=5, buffer_size=buffer_size)
    packs = lists(pack_best_fit(np.arange(len(sizes)), tokens, frames, config))
    assert packs == slow_best_fit(tokens.tolist(), frames.tolist(), config)
    assert sorted(index for pack in packs for index in pack) == list(range(len(sizes)))
    assert all(tokens[pack].sum() <= 50 and frames[pack].sum() <= 5 for pack in packs)


def test_no_sample_waits_longer_than_the_buffer() -> None:
    lengths = np.array([10, 10, 10, 7] + [10] * 500)  # 7 fits with no other and is never the longest
    packs = pack_best_fit(np.arange(504), lengths, np.ones(504), PackingConfig(max_tokens=10, buffer_size=8))
    assert packs.pack(3) == [3]


def test_processes_of_a_machine_share_a_large_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, config = table_of(mixed_lengths(300)), PackingConfig(max_tokens=8192)
    expected = PackPlan(table, config, seed=4).epoch(1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(packing, "MIN_SHARED_SAMPLES", 1)
    assert PackPlan(table, config, seed=4).epoch(1) == expected
    monkeypatch.setattr(packing, "pack_best_fit", None)  # the second process computes nothing
    assert PackPlan(table, config, seed=4).epoch(1) == expected


@pytest.mark.slow
def test_five_million_samples_are_packed_in_ten_cpu_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, every rank took four times as long."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    table = table_of(mixed_lengths(5_000_000))
    start = time.process_time()
    assert PackPlan(table, PackingConfig(max_tokens=8192), seed=4).num_packs(0) > 100_000
    assert time.process_time() - start < 10.0


def test_plan_is_a_function_of_seed_epoch_and_samples() -> None:
    table = table_of(mixed_lengths(300))
    config = PackingConfig(max_tokens=8192)
    one, same = PackPlan(table, config, seed=4), PackPlan(table, config, seed=4)
    assert one.epoch(3) == same.epoch(3)
    assert one.hash == same.hash
    assert one.epoch(3) != one.epoch(2)
    others = [
        PackPlan(table, config, seed=5),
        PackPlan(table, PackingConfig(max_tokens=9000), seed=4),
        PackPlan(replace(table, fingerprint="other"), config, seed=4),
    ]
    assert len({one.hash, *(other.hash for other in others)}) == 4
    assert one.epoch(3) != others[0].epoch(3)


def test_a_weight_is_the_number_of_times_an_epoch_shows_a_sample() -> None:
    weights = np.array([0.0, 1.0, 2.0] + [0.25] * 4000)
    counts = np.bincount(epoch_order(weights, seed=0, epoch=0), minlength=len(weights))
    assert counts[:3].tolist() == [0, 1, 2]
    assert 850 < counts[3:].sum() < 1150
    assert counts[3:].max() == 1


def test_packs_are_taken_across_epochs_without_loss_or_repeat() -> None:
    plan = PackPlan(table_of(np.full(10, 10)), PackingConfig(max_tokens=20), seed=0)  # 5 packs an epoch
    position, seen = PackPosition(0, 0), []
    for _ in range(4):
        packs, position = plan.take(position, 3, num_epochs=None)
        seen += packs
    assert seen == [*plan.epoch(0), *plan.epoch(1), *plan.epoch(2)[:2]]
    assert position == PackPosition(2, 2)


def test_limited_epochs_end_with_a_short_step() -> None:
    plan = PackPlan(table_of(np.full(10, 10)), PackingConfig(max_tokens=20), seed=0)
    assert plan.num_steps(packs_per_step=4, num_epochs=2) == 3
    last, end = plan.take(PackPosition(1, 3), 4, num_epochs=2)
    assert last == plan.epoch(1)[3:]
    assert plan.take(end, 4, num_epochs=2)[0] == []


def test_ranks_get_equal_numbers_of_packs_balanced_by_cost() -> None:
    assert assign_packs([5, 1, 4, 2], 2) == [[0, 1], [2, 3]]
    shares = assign_packs([9, 1, 1, 1, 1], 3)
    assert sorted(index for share in shares for index in share) == [0, 1, 2, 3, 4]
    assert max(len(share) for share in shares) == 2
    assert shares[0] == [0]
    assert [len(share) for share in assign_packs([9, 1, 1, 1, 1], 2)] == [
        2,
        3,
    ]  # not [1, 4], whatever the costs


def test_an_epoch_without_samples_is_an_error() -> None:
    plan = PackPlan(table_of(np.full(3, 10), weights=np.zeros(3)), PackingConfig(max_tokens=20), seed=0)
    with pytest.raises(ValueError, match="epoch 0 has no samples"):
        plan.epoch(0)
