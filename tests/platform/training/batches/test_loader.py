from __future__ import annotations

import itertools
import pickle
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from reference.training_corpus import DIM, Corpus, make_corpus
from timeviper_model.weights.weights_folder import load_tokenizer
from timeviper_platform.common.ray_cluster import ray_session
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.training.batches import ray_loader
from timeviper_platform.training.batches.loader import BatchLoader, LoaderConfig, Prefetcher, prefetch_in_thread
from timeviper_platform.training.batches.packing import PackingConfig, PackPlan, PackPosition
from timeviper_platform.training.batches.rows import SampleRows, SourceConfig
from timeviper_platform.training.batches.samples import FramesConfig, SampleBuilder
from timeviper_platform.training.batches.sizes import measure_samples
from timeviper_platform.training.batches.step_batches import BatchShape, StepBatches


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def make_loader(
    corpus: Corpus, *, rank: int, world_size: int, packs_per_step: int = 3, pad: bool = False
) -> BatchLoader:
    builder = SampleBuilder(
        FeatureStore.open(corpus.features), load_tokenizer(corpus.tokenizer), "nemotron", FramesConfig()
    )
    rows = SampleRows.read([SourceConfig(uri=corpus.samples)])
    packing = PackingConfig(max_tokens=200)
    table, _ = measure_samples(rows, builder, max_tokens=packing.max_tokens, max_frames=None)
    shape = BatchShape(
        packs_per_step=packs_per_step,
        max_tokens=200,
        pad_to=200 if pad else None,
        dim=DIM,
        pad_token_id=0,
        num_epochs=None,
        vision_cost=0.5,
    )
    return BatchLoader(PackPlan(table, packing, seed=2), rows, builder, shape, rank=rank, world_size=world_size)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_together_see_what_one_rank_sees(corpus: Corpus, world_size: int) -> None:
    alone = make_loader(corpus, rank=0, world_size=1).steps(PackPosition(0, 0), 0, 4)
    ranks = [
        make_loader(corpus, rank=r, world_size=world_size).steps(PackPosition(0, 0), 0, 4) for r in range(world_size)
    ]
    for expected, *shares in zip(alone, *ranks, strict=True):
        assert {len(share.micro_batches) for share in shares} == {-(-3 // world_size)}
        own = [item.batch for share in shares for item in share.micro_batches if not item.is_dummy]
        key = [tuple(batch.input_ids.tolist()) for batch in own]
        assert sorted(key) == sorted(tuple(item.batch.input_ids.tolist()) for item in expected.micro_batches)
        assert {share.num_targets for share in shares} == {expected.num_targets}
        labelled = sum(int((batch.labels >= 0).sum()) for batch in own)
        assert labelled == expected.num_targets  # what the loss is divided by


def test_a_loader_goes_on_from_any_step_as_if_it_had_not_stopped(corpus: Corpus) -> None:
    whole = list(make_loader(corpus, rank=0, world_size=2).steps(PackPosition(0, 0), 0, 9))
    rest = list(make_loader(corpus, rank=0, world_size=2).steps(whole[5].end, 6, 9))
    assert [step.step for step in rest] == [7, 8, 9]
    for one, other in zip(whole[6:], rest, strict=True):
        for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
            assert torch.equal(a.batch.input_ids, b.batch.input_ids)
            assert torch.equal(a.batch.vision_features, b.batch.vision_features)
    assert whole[-1].end.epoch > 0  # the walk crossed an epoch


def test_a_sample_of_another_size_than_planned_ends_the_loader(corpus: Corpus) -> None:
    loader = make_loader(corpus, rank=0, world_size=1)
    planned = loader._plan.table.num_targets
    np.add(planned, 1, out=planned)
    with pytest.raises(RuntimeError, match=r"sample sample-\d+ has .* planned were .*sample-tables beside the runs"):
        next(loader.steps(PackPosition(0, 0), 0, 1))


def test_padding_and_fill_are_counted(corpus: Corpus) -> None:
    step = next(make_loader(corpus, rank=0, world_size=2, pad=True).steps(PackPosition(0, 0), 0, 1))
    assert all(len(item.batch.input_ids) == 200 for item in step.micro_batches if not item.is_dummy)
    assert step.num_padding_tokens == 3 * 200 - step.num_tokens + 2  # one dummy of two tokens
    assert step.fill == pytest.approx(step.num_tokens / 600)


def test_prefetched_steps_are_the_steps(corpus: Corpus) -> None:
    loader = make_loader(corpus, rank=1, world_size=2)
    ahead = prefetch_in_thread(loader, PackPosition(0, 0), 0, 3, LoaderConfig())
    assert [step.step for step in ahead] == [1, 2, 3]
    ahead.close()
    with pytest.raises(ValueError, match="'ray_data' needs Ray: submit jobs"):
        prefetch_in_thread(loader, PackPosition(0, 0), 0, 3, LoaderConfig(reader="ray_data"))


def test_a_reader_and_its_tasks_give_the_same_in_another_process(corpus: Corpus) -> None:
    loader = make_loader(corpus, rank=0, world_size=2)
    (task,) = loader.tasks(PackPosition(0, 0), 0, 1)
    reader, sent = pickle.loads(pickle.dumps((loader.reader, task)))
    assert_same_steps([reader.read(sent)], [loader.reader.read(task)])


@pytest.mark.cluster
def test_ray_data_reads_the_same_steps_in_the_same_order(
    corpus: Corpus, ray_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_loader, "STEPS_PER_GRAPH", 5)  # so that the order holds across graphs
    loader = make_loader(corpus, rank=1, world_size=2)
    config = LoaderConfig(reader="ray_data", num_readers=1, cpus_per_reader=0.25)
    with ray_session():
        ahead = ray_loader.prefetch_on_ray(loader, PackPosition(0, 0), 0, 8, config)
        found = list(ahead)
        ahead.close()
    assert_same_steps(found, list(loader.steps(PackPosition(0, 0), 0, 8)))


def assert_same_steps(found: list[StepBatches], expected: list[StepBatches]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one._replace(micro_batches=[]) == other._replace(micro_batches=[])
        for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
            assert (a.sample_ids, a.pack, a.is_dummy) == (b.sample_ids, b.pack, b.is_dummy)
            assert all(torch.equal(getattr(a.batch, n), getattr(b.batch, n)) for n in b.batch.__slots__)


def test_prefetch_stays_within_its_bytes_and_always_holds_one_item() -> None:
    made = 0

    def source() -> Iterator[int]:
        nonlocal made
        for number in itertools.count():
            made += 1
            yield number

    ahead = Prefetcher(source(), num_bytes=lambda item: 100, max_bytes=250)
    _wait_until(lambda: made == 3)  # two wait, the third is in the thread's hand
    time.sleep(0.05)
    assert made == 3
    assert next(ahead) == 0
    _wait_until(lambda: made == 4)
    ahead.close()
    large = Prefetcher(iter([7]), num_bytes=lambda item: 1000, max_bytes=1)
    assert list(large) == [7]


def test_an_error_of_the_source_reaches_the_consumer_after_what_came_before() -> None:
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
