from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reference.hiccups import HiccupFileSystem
from reference.training_corpus import ANSWERS, QUESTIONS, Corpus, make_corpus, sample_row, write_samples
from timeviper_model.weights.weights_folder import load_tokenizer
from timeviper_platform.common import storage
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.data.synthetic.tokenizer import train_tokenizer
from timeviper_platform.training.batches.rows import SampleRows, SourceConfig
from timeviper_platform.training.batches.samples import FramesConfig, SampleBuilder
from timeviper_platform.training.batches.sizes import (
    MeasureOnAllRanks,
    SampleTable,
    count_rejects,
    join_blocks,
    measure_blocks,
    measure_samples,
)

MAX_TOKENS = 100


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"), num_samples=40)


def builder_of(corpus: Corpus, frames: FramesConfig | None = None) -> SampleBuilder:
    store = FeatureStore.open(corpus.features)
    return SampleBuilder(store, load_tokenizer(corpus.tokenizer), "nemotron", frames or FramesConfig())


def rows_of(corpus: Corpus) -> SampleRows:
    return SampleRows.read([SourceConfig(uri=corpus.samples), SourceConfig(uri=corpus.samples, weight=0.5)])


def assert_same(one: SampleTable, other: SampleTable) -> None:
    assert list(one.rejects) == list(other.rejects)
    assert one.fingerprint == other.fingerprint
    for name in ("row_indices", "weights", "num_tokens", "num_vision_tokens", "num_frames", "num_targets"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("num_ranks", [2, 3, 50])
def test_many_ranks_measure_the_same_table_as_one(corpus: Corpus, num_ranks: int) -> None:
    rows, builder = rows_of(corpus), builder_of(corpus)
    alone = measure_samples(rows, builder, max_tokens=MAX_TOKENS, max_frames=None)
    assert count_rejects(alone.rejects)["too_long"] > 0
    shards = [
        measure_blocks(rows, builder, MAX_TOKENS, None, rank=rank, world_size=num_ranks, block_rows=7)
        for rank in range(num_ranks)
    ]
    assert max(sum(len(usable) for usable, _ in shard) for shard in shards) < len(alone)
    assert_same(join_blocks(rows, shards), alone)


@pytest.mark.usefixtures("group_of_one")
def test_a_table_is_measured_once_and_then_read_from_the_cache(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, builder = rows_of(corpus), builder_of(corpus)
    alone = measure_samples(rows, builder, max_tokens=MAX_TOKENS, max_frames=None)
    measure = MeasureOnAllRanks(str(tmp_path))
    assert_same(measure(rows, builder, max_tokens=MAX_TOKENS, max_frames=None), alone)
    monkeypatch.setattr(SampleBuilder, "build", None)  # building would fail
    assert_same(measure(rows_of(corpus), builder_of(corpus), max_tokens=MAX_TOKENS, max_frames=None), alone)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.usefixtures("group_of_one")
def test_a_cache_that_cannot_be_written_or_read_ends_no_run(
    corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is shared by all runs, and may belong to another user."""
    monkeypatch.setenv(storage.FIRST_WAIT_VARIABLE, "0")
    rows, builder = rows_of(corpus), builder_of(corpus)
    alone = measure_samples(rows, builder, max_tokens=MAX_TOKENS, max_frames=None)
    (tmp_path / "file").touch()
    monkeypatch.setattr(HiccupFileSystem, "broken", {"tables"})
    for folder in (f"{tmp_path}/file/tables", f"hiccup://{tmp_path}/tables"):
        measure = MeasureOnAllRanks(folder)
        assert_same(measure(rows, builder, max_tokens=MAX_TOKENS, max_frames=None), alone)
    assert caplog.text.count("the sizes of the samples are not cached: cannot write ") == 2


@pytest.mark.usefixtures("group_of_one")
def test_a_damaged_table_is_measured_again(corpus: Corpus, tmp_path: Path) -> None:
    rows, builder = rows_of(corpus), builder_of(corpus)
    measure = MeasureOnAllRanks(str(tmp_path))
    before = measure(rows, builder, max_tokens=MAX_TOKENS, max_frames=None)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no archive"):
        file.write_bytes(damaged)
        assert_same(measure(rows, builder, max_tokens=MAX_TOKENS, max_frames=None), before)
        assert file.read_bytes() != damaged


@pytest.mark.usefixtures("group_of_one")
def test_another_mixture_tokenizer_store_or_cap_has_another_table(corpus: Corpus, tmp_path: Path) -> None:
    other = make_corpus(tmp_path / "other", num_videos=5)
    longer = [*QUESTIONS, *ANSWERS, "a red circle appears before a blue square"]
    inputs = {
        "samples": (SampleRows.read([SourceConfig(uri=corpus.samples)]), builder_of(corpus), None),
        "weight": (SampleRows.read([SourceConfig(uri=corpus.samples, weight=2.0)]), builder_of(corpus), None),
        "frames": (rows_of(corpus), builder_of(corpus, FramesConfig(max_frames=3)), None),
        "store": (rows_of(corpus), builder_of(replace(corpus, folder=other.folder)), None),
        "cap": (rows_of(corpus), builder_of(corpus), 5),
        "tokenizer": (
            rows_of(corpus),
            SampleBuilder(FeatureStore.open(corpus.features), train_tokenizer(longer, 300), "nemotron", FramesConfig()),
            None,
        ),
        "template": (
            rows_of(corpus),
            SampleBuilder(
                FeatureStore.open(corpus.features), load_tokenizer(corpus.tokenizer), "chatml", FramesConfig()
            ),
            None,
        ),
    }
    measure = MeasureOnAllRanks(str(tmp_path / "tables"))
    for number, (rows, builder, max_frames) in enumerate(inputs.values(), start=1):
        measure(rows, builder, max_tokens=400, max_frames=max_frames)
        assert len(list((tmp_path / "tables").iterdir())) == number


def test_rows_of_weight_zero_are_not_built(tmp_path: Path, corpus: Corpus) -> None:
    write_samples(tmp_path / "samples.parquet", [sample_row(0, [], [("user", "a"), ("assistant", "b")])])
    rows = SampleRows.read([SourceConfig(uri=corpus.samples), SourceConfig(uri=str(tmp_path), weight=0)])
    table = measure_samples(rows, builder_of(corpus), max_tokens=400, max_frames=None)
    assert table.row_indices.tolist() == list(range(40))


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_negative_or_infinite_weight_is_a_counted_reject(corpus: Corpus, weight: float) -> None:
    rows = SampleRows.read([SourceConfig(uri=corpus.samples)])
    rows.weights = rows.weights.copy()
    rows.weights[3] = weight
    measured = measure_samples(rows, builder_of(corpus), max_tokens=MAX_TOKENS, max_frames=None)
    (reject,) = (reject for reject in measured.rejects if reject.reason == "bad_weight")
    assert reject.detail == f"weight = {weight} must be finite and at least 0"
    assert 3 not in measured.row_indices
    with pytest.raises(ValueError, match=f"{weight} of x.parquet must be finite"):
        SourceConfig(uri="x.parquet", weight=weight)
