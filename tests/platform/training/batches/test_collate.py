"""Identity 3 through collate: a pack of samples gives the loss and the gradients of the samples one by one."""

from __future__ import annotations

import pytest
import torch

from reference.training_corpus import DIM, Corpus, make_corpus
from timeviper_model.batching.batch import IGNORE_INDEX, PackedBatch
from timeviper_model.config import PRESETS
from timeviper_model.timeviper import TimeViper
from timeviper_model.weights.weights_folder import load_tokenizer
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.training.batches.collate import Collated, collate, dummy_batch
from timeviper_platform.training.batches.rows import SampleRows, SourceConfig
from timeviper_platform.training.batches.samples import FramesConfig, SampleBuilder, TokenizedSample


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def model() -> TimeViper:
    model = TimeViper(PRESETS["tiny"])
    model.init_weights(torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("alpha"):
                parameter.fill_(0.7)  # TransV takes part
    return model


def built_samples(corpus: Corpus, count: int) -> tuple[list[TokenizedSample], FeatureStore]:
    store = FeatureStore.open(corpus.features)
    builder = SampleBuilder(store, load_tokenizer(corpus.tokenizer), "nemotron", FramesConfig())
    rows = SampleRows.read([SourceConfig(uri=corpus.samples)])
    built = [builder.build(rows[number]) for number in range(count)]
    assert all(isinstance(item, TokenizedSample) for item in built)
    return [item for item in built if isinstance(item, TokenizedSample)], store


def batch_of(collated: Collated) -> PackedBatch:
    assert collated.batch is not None
    assert not collated.damaged
    return collated.batch


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
    built, store = built_samples(corpus, 6)  # text alone, one turn, two turns, several lengths
    packed = batch_of(collate(built, store, DIM, pad_to=pad_to, pad_token_id=0))
    alone = [batch_of(collate([item], store, DIM, pad_to=None, pad_token_id=0)) for item in built]
    loss, gradients = loss_and_gradients(model, [packed])
    expected_loss, expected = loss_and_gradients(model, alone)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradients.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: name + text
        )


def test_a_pack_carries_the_stored_rows_of_its_frames(corpus: Corpus) -> None:
    built, store = built_samples(corpus, 3)
    batch = batch_of(collate(built, store, DIM, pad_to=None, pad_token_id=0))
    rows = [store.read(item.media_id, item.frames).features.flatten(0, 1) for sample in built for item in sample.media]
    assert torch.equal(batch.vision_features, torch.cat(rows))
    assert batch.num_segments == 3


def test_a_dummy_has_no_target_and_reaches_every_parameter(model: TimeViper) -> None:
    loss, gradients = loss_and_gradients(model, [dummy_batch(DIM, pad_token_id=0)])
    assert loss == 0.0
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert all(not gradient.any() for gradient in gradients.values())
