"""A pack gives the loss and gradients of its samples run one by one."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from reference.training_corpus import DIM, Corpus
from timeviper_model.batching.batch import IGNORE_INDEX, PackedBatch
from timeviper_model.config import PRESETS
from timeviper_model.timeviper import TimeViper
from timeviper_model.weights.weights_folder import load_tokenizer
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.training.batches.collate import PackReader, dummy_batch
from timeviper_platform.training.batches.rows import SampleRows, SourceConfig
from timeviper_platform.training.batches.samples import FramesConfig, SampleBuilder
from timeviper_platform.training.batches.sizes import measure_samples
from timeviper_platform.training.batches.step_batches import BatchShape, PackTask


@pytest.fixture(scope="module")
def model() -> TimeViper:
    model = TimeViper(PRESETS["tiny"])
    model.init_weights(torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("alpha"):
                parameter.fill_(0.7)  # so that TransV contributes
    return model


class Reading(NamedTuple):
    reader: PackReader
    rows: list[dict[str, Any]]
    sizes: list[tuple[int, ...]]

    def pack(self, *indices: int) -> PackedBatch:
        task = PackTask(0, [self.rows[index] for index in indices], [self.sizes[index] for index in indices])
        (micro_batch,) = self.reader.read([task])
        assert not micro_batch.damaged
        return micro_batch.batch


def reading(corpus: Corpus, *, pad_to: int | None = None) -> Reading:
    builder = SampleBuilder(
        FeatureStore.open(corpus.features), load_tokenizer(corpus.tokenizer), "nemotron", FramesConfig()
    )
    rows = SampleRows.read([SourceConfig(uri=corpus.samples)])
    table = measure_samples(rows, builder, max_tokens=1000, max_frames=None)
    shape = BatchShape(
        packs_per_step=1, max_tokens=1000, pad_to=pad_to, dim=DIM, pad_token_id=0, num_epochs=None, vision_cost=1.0
    )
    return Reading(PackReader(builder, shape), rows.block(0, 6), [table.sizes(index) for index in range(6)])


def loss_and_gradients(model: TimeViper, batches: list[PackedBatch]) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss over all labelled positions of the batches, and its gradients."""
    model.zero_grad()
    num_targets = max(1, sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in batches))
    loss = 0.0
    for batch in batches:
        output = model(batch.to("cpu", torch.float32))
        (output.loss_sum / num_targets).backward()
        loss += output.loss_sum.item() / num_targets
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("pad_to", [None, 900])
def test_packed_samples_equal_separate_samples_in_loss_and_every_gradient(
    corpus: Corpus, model: TimeViper, pad_to: int | None
) -> None:
    packed = reading(corpus, pad_to=pad_to).pack(*range(6))  # text alone, one turn, two turns, several lengths
    alone = [reading(corpus).pack(index) for index in range(6)]
    loss, gradients = loss_and_gradients(model, [packed])
    expected_loss, expected = loss_and_gradients(model, alone)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradients.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: name + text
        )


def test_a_pack_carries_the_stored_rows_of_its_frames(corpus: Corpus) -> None:
    batch = reading(corpus).pack(0, 1, 2)
    store = FeatureStore.open(corpus.features)
    rows = [store.read(f"video-{index}").features.flatten(0, 1) for index in range(3)]
    assert torch.equal(batch.vision_features, torch.cat(rows))
    assert batch.num_segments == 3


def test_a_dummy_has_no_target_and_reaches_every_parameter(model: TimeViper) -> None:
    loss, gradients = loss_and_gradients(model, [dummy_batch(DIM, pad_token_id=0)])
    assert loss == 0.0
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert all(not gradient.any() for gradient in gradients.values())
