from __future__ import annotations

from typing import Any

import pytest
import torch

from reference.training_corpus import DIM, RECIPE, Corpus, make_corpus, train_values, write_validation_samples
from timeviper_model.batching.batch import Sample, pack_samples
from timeviper_model.config import PRESETS
from timeviper_model.timeviper import TimeViper
from timeviper_model.weights.weights_folder import load_tokenizer
from timeviper_platform.common.config import parse_config
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.data.store.writer import write_store
from timeviper_platform.training.config import TrainConfig
from timeviper_platform.training.local import train_local
from timeviper_platform.training.metrics.writer import read_metrics
from timeviper_platform.training.phase import Phase, prepare_phase
from timeviper_platform.training.run import RunFolder
from timeviper_platform.training.validation.exact_match import answer_task, exact_match_share

SYSTEM, VISION, INSTRUCTION, RESPONSE = range(4)
KINDS = [SYSTEM, *[VISION] * 4, INSTRUCTION, INSTRUCTION, *[RESPONSE] * 3, INSTRUCTION, VISION, RESPONSE, RESPONSE]
CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


def toy_sample() -> Sample:
    """Two turns: a medium of 4 tokens and an answer of 3; a medium of 1 token and an answer of 2."""
    ids = [7, 0, 0, 0, 0, 8, 9, 20, 21, 22, 10, 0, 23, 24]
    targets = [token if kind == RESPONSE else -100 for token, kind in zip(ids, KINDS, strict=True)]
    index = [-1, 0, 1, 2, 3, *[-1] * 6, 4, -1, -1]
    return Sample(input_ids=ids, vision_index=index, token_kind=KINDS, labels=[*targets[1:], -100])


def toy_features() -> torch.Tensor:
    return torch.randn(5, DIM, generator=torch.Generator().manual_seed(1))


def toy_model() -> TimeViper:
    model = TimeViper(PRESETS["tiny"]).train()
    model.init_weights(torch.Generator().manual_seed(0))
    return model


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    corpus = make_corpus(tmp_path_factory.mktemp("corpus"))
    write_validation_samples(corpus)
    return corpus


def values_with_answers(corpus: Corpus, num_answers: int, **changes: Any) -> dict[str, Any]:
    values = train_values(corpus, **changes)
    validation = {"samples": [{"uri": str(corpus.folder / "held-out.parquet")}], "every_steps": 4, "where": "ranks"}
    values["phases"]["instruct"]["validation"] = {**validation, "num_answers": num_answers}
    return values


def prepared(corpus: Corpus, num_answers: int, *, rank: int, world_size: int, features: str = "") -> Phase:
    config = parse_config(TrainConfig, values_with_answers(corpus, num_answers))
    store, tokenizer = FeatureStore.open(features or corpus.features), load_tokenizer(corpus.tokenizer)
    return prepare_phase(config, "instruct", toy_model(), store, tokenizer, rank=rank, world_size=world_size)


def test_a_task_ends_where_the_first_answer_starts() -> None:
    task = answer_task(toy_sample(), toy_features())
    assert task.prompt.input_ids == [7, 0, 0, 0, 0, 8, 9]
    assert task.answer == [20, 21, 22]
    assert torch.equal(task.features, toy_features()[:4])


@pytest.mark.usefixtures("group_of_one")
def test_a_learnt_sample_is_answered_and_an_unknown_one_is_not() -> None:
    model, sample, features = toy_model(), toy_sample(), toy_features()
    learnt = answer_task(sample, features)
    assert exact_match_share(model, [learnt], **CPU) == 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(30):
        optimizer.zero_grad()
        model(pack_samples([sample], [features])).loss_sum.backward()
        optimizer.step()
    assert exact_match_share(model, [learnt], **CPU) == 1.0
    late = learnt._replace(answer=[20, 21, 23])  # another last id
    assert exact_match_share(model, [learnt, late], **CPU) == 0.5
    assert exact_match_share(model, [], **CPU) == 0.0
    assert model.training


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.slow
def test_generating_answers_leaves_training_bit_identical(corpus: Corpus) -> None:
    curves, states = [], []
    for num_answers in (0, 3):
        config = parse_config(TrainConfig, values_with_answers(corpus, num_answers, name=f"answers-{num_answers}"))
        torch.manual_seed(11)
        report = train_local(config)
        states.append(torch.get_rng_state())
        rows = read_metrics(RunFolder.of(config).uri)
        curves.append([(row["loss"], row["grad_norm"], row.get("validation_loss")) for row in rows])
        shares = {row["step"]: row["validation_exact_match"] for row in rows if "validation_exact_match" in row}
        assert list(shares) == ([4, 6] if num_answers else [])
        assert report["instruct"]["validation_exact_match"] == shares.get(6)
    assert curves[0] == curves[1]
    assert torch.equal(*states)


@pytest.mark.parametrize(("num_answers", "expected"), [(4, [0, 1, 2, 3]), (9, [0, 1, 2, 3, 4]), (0, [])])
def test_the_ranks_share_the_first_samples(corpus: Corpus, num_answers: int, expected: list[int]) -> None:
    ranks = [prepared(corpus, num_answers, rank=rank, world_size=2).validator for rank in range(2)]
    assert [rank and rank.answer_entries for rank in ranks] == [expected[0::2], expected[1::2]]


def test_an_unreadable_sample_is_left_out_and_logged(corpus: Corpus, caplog: pytest.LogCaptureFixture) -> None:
    good = FeatureStore.open(corpus.features)
    media = {media_id: good.read(media_id).features.float() for media_id in good.media_ids}
    media["video-1"][0, 0, 0] = torch.nan
    write_store(str(corpus.folder / "damaged"), media, recipe=RECIPE)
    phase = prepared(corpus, 3, rank=0, world_size=1, features=str(corpus.folder / "damaged"))
    assert phase.validator is not None
    assert len(list(phase.validator.loader.samples([0, 1, 2]))) == 2
    assert "validation sample sample-0001 is left out: " in caplog.text


def test_phases_that_cannot_answer_are_rejected_with_advice(corpus: Corpus) -> None:
    with pytest.raises(
        ValueError, match=r"instruct.validation.num_answers: with self.zero.stage = 3 .* stage 2 or lower"
    ):
        parse_config(TrainConfig, values_with_answers(corpus, 2, zero={"stage": 3}))
    assert parse_config(TrainConfig, values_with_answers(corpus, 0, zero={"stage": 3})).zero.stage == 3
    with pytest.raises(ValueError, match="num_answers = -1 must be at least 0"):
        parse_config(TrainConfig, values_with_answers(corpus, -1))
    values = values_with_answers(corpus, 2)
    values["phases"]["instruct"]["use_transv"] = False
    config = parse_config(TrainConfig, values)
    store, tokenizer = FeatureStore.open(corpus.features), load_tokenizer(corpus.tokenizer)
    with pytest.raises(
        ValueError, match=r"instruct.validation.num_answers: generation runs .* num_answers: 0 in this phase"
    ):
        prepare_phase(config, "instruct", toy_model(), store, tokenizer, rank=0, world_size=1)
