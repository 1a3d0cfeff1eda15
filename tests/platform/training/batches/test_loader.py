from __future__ import annotations

import itertools
import pickle
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from reference.training_corpus import DIM, Corpus
from timeviper_model.weights.weights_folder import load_tokenizer
from timeviper_platform.common.ray_cluster import connect
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.training.batches.loader import BatchLoader, LoaderConfig, Prefetcher, prefetch_in_thread
from timeviper_platform.training.batches.packing import PackingConfig, PackPlan, PackPosition
from timeviper_platform.training.batches.ray_loader import prefetch_on_ray
from timeviper_platform.training.batches.rows import SampleRows, SourceConfig
from timeviper_platform.training.batches.samples import FramesConfig, SampleBuilder
from timeviper_platform.training.batches.sizes import SampleTable, measure_samples
from timeviper_platform.training.batches.step_batches import BatchShape, StepBatches


def builder_of(corpus: Corpus) -> SampleBuilder:
    store = FeatureStore.open(corpus.features)
    return SampleBuilder(store, load_tokenizer(corpus.tokenizer), "nemotron", FramesConfig())


def measured_table(corpus: Corpus) -> SampleTable:
    rows = SampleRows.read([SourceConfig(uri=corpus.samples)])
    return measure_samples(rows, builder_of(corpus), max_tokens=200, max_frames=None)


def make_loader(
    corpus: Corpus, *, rank: int, world_size: int, pad: bool = False, table: SampleTable | None = None
) -> BatchLoader:
    shape = BatchShape(
        packs_per_step=3,
        max_tokens=200,
        pad_to=200 if pad else None,
        dim=DIM,
        pad_token_id=0,
        num_epochs=None,
        vision_cost=0.5,
    )
    plan = PackPlan(table or measured_table(corpus), PackingConfig(max_tokens=200), seed=2)
    rows = SampleRows.read([SourceConfig(uri=corpus.samples)])
    return BatchLoader(plan, rows, builder_of(corpus), shape, rank=rank, world_size=world_size)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_together_read_the_batches_of_one_rank(corpus: Corpus, world_size: int) -> None:
    alone = make_loader(corpus, rank=0, world_size=1).steps(PackPosition(0, 0), 0, 4)
    ranks = [
        make_loader(corpus, rank=r, world_size=world_size).steps(PackPosition(0, 0), 0, 4) for r in range(world_size)
    ]
    for expected, *shares in zip(alone, *ranks, strict=True):
        assert {len(share.micro_batches) for share in shares} == {-(-3 // world_size)}
        own = [item.batch for share in shares for item in share.micro_batches if not item.is_dummy]
        key = [tuple(batch.input_ids.tolist()) for batch in own]
        assert sorted(key) == sorted(tuple(item.batch.input_ids.tolist()) for item in expected.micro_batches)
        assert {share.counts.num_targets for share in shares} == {expected.counts.num_targets}
        labelled = sum(int((batch.labels >= 0).sum()) for batch in own)
        assert labelled == expected.counts.num_targets  # the loss is divided by it


def test_a_loader_continues_from_any_step(corpus: Corpus) -> None:
    whole = list(make_loader(corpus, rank=0, world_size=2).steps(PackPosition(0, 0), 0, 9))
    rest = list(make_loader(corpus, rank=0, world_size=2).steps(whole[5].counts.end, 6, 9))
    assert [step.counts.step for step in rest] == [7, 8, 9]
    for one, other in zip(whole[6:], rest, strict=True):
        for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
            assert torch.equal(a.batch.input_ids, b.batch.input_ids)
            assert torch.equal(a.batch.vision_features, b.batch.vision_features)
    assert whole[-1].counts.end.epoch > 0  # into the next epoch


def test_a_sample_of_another_size_than_planned_is_an_error(corpus: Corpus) -> None:
    table = measured_table(corpus)
    np.add(table.num_targets, 1, out=table.num_targets)
    loader = make_loader(corpus, rank=0, world_size=1, table=table)
    with pytest.raises(RuntimeError, match=r"sample sample-\d+ has .* planned .*sample-tables in the runs folder"):
        next(loader.steps(PackPosition(0, 0), 0, 1))


def test_padding_and_fill_are_counted(corpus: Corpus) -> None:
    step = next(make_loader(corpus, rank=0, world_size=2, pad=True).steps(PackPosition(0, 0), 0, 1))
    assert all(len(item.batch.input_ids) == 200 for item in step.micro_batches if not item.is_dummy)
    assert step.counts.num_padding_tokens == 3 * 200 - step.counts.num_tokens + 2  # one dummy of two tokens
    assert step.counts.fill == pytest.approx(step.counts.num_tokens / 600)


def test_prefetched_steps_equal_the_steps(corpus: Corpus) -> None:
    loader = make_loader(corpus, rank=1, world_size=2)
    ahead = prefetch_in_thread(loader, PackPosition(0, 0), 0, 3, LoaderConfig())
    assert [step.counts.step for step in ahead] == [1, 2, 3]
    ahead.close()
    with pytest.raises(ValueError, match="'ray_data' needs Ray: submit jobs"):
        prefetch_in_thread(loader, PackPosition(0, 0), 0, 3, LoaderConfig(reader="ray_data"))


def test_a_pickled_reader_gives_the_same_batches(corpus: Corpus) -> None:
    loader = make_loader(corpus, rank=0, world_size=2)
    ((counts, packs),) = loader.tasks(PackPosition(0, 0), 0, 1)
    reader, sent = pickle.loads(pickle.dumps((loader.reader, packs)))
    assert_same_steps([loader.batches(counts, reader.read(sent))], list(loader.steps(PackPosition(0, 0), 0, 1)))


@pytest.mark.cluster
def test_ray_data_reads_the_same_steps_in_the_same_order(corpus: Corpus, ray_address: str) -> None:
    loader = make_loader(corpus, rank=1, world_size=2)
    config = LoaderConfig(reader="ray_data", num_readers=1, cpus_per_reader=0.25)
    with connect():
        ahead = prefetch_on_ray(loader, PackPosition(0, 0), 0, 8, config, steps_per_graph=5)  # two graphs
        found = list(ahead)
        ahead.close()
    assert_same_steps(found, list(loader.steps(PackPosition(0, 0), 0, 8)))


def assert_same_steps(found: list[StepBatches], expected: list[StepBatches]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.counts == other.counts
        for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
            assert a._replace(batch=None) == b._replace(batch=None)
            assert all(torch.equal(getattr(a.batch, n), getattr(b.batch, n)) for n in b.batch.__slots__)


def test_prefetch_is_limited_in_bytes_but_always_holds_one_item() -> None:
    produced = 0

    def source() -> Iterator[int]:
        nonlocal produced
        for number in itertools.count():
            produced += 1
            yield number

    ahead = Prefetcher(source(), num_bytes=lambda item: 100, max_bytes=250)
    _wait_until(lambda: produced == 3)  # two are queued, the thread holds the third
    time.sleep(0.05)
    assert produced == 3
    assert next(ahead) == 0
    _wait_until(lambda: produced == 4)
    ahead.close()
    large = Prefetcher(iter([7]), num_bytes=lambda item: 1000, max_bytes=1)
    assert list(large) == [7]


def test_an_error_of_the_source_reaches_the_consumer_after_earlier_items() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise RuntimeError("row group 3 is damaged")

    ahead = Prefetcher(source(), num_bytes=lambda item: 1, max_bytes=10)
    assert next(ahead) == 1
    with pytest.raises(RuntimeError, match="row group 3 is damaged"):
        next(ahead)


def test_closing_ends_the_thread() -> None:
    ahead = Prefetcher(itertools.count(), num_bytes=lambda item: 1, max_bytes=5)
    ahead.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch" and thread.is_alive()]


def _wait_until(holds: object, timeout_s: float = 5.0) -> None:
    assert callable(holds)
    deadline = time.monotonic() + timeout_s
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert holds()
