"""LoRA adapters: trained, resumed and merged into the weights."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from reference.training_corpus import Corpus, make_corpus, train_config, train_values
from timeviper_model.weights.weights_folder import from_pretrained
from timeviper_platform.common.config import parse_config
from timeviper_platform.training.checkpoint.manager import Checkpoints
from timeviper_platform.training.config import TrainConfig
from timeviper_platform.training.dry_run import dry_run
from timeviper_platform.training.local import train_local
from timeviper_platform.training.metrics.writer import read_metrics
from timeviper_platform.training.run import RunFolder

pytestmark = pytest.mark.usefixtures("group_of_one")
RULE = {"match": r".*\.lora_[AB]", "lr": 5e-3}
PROJECTIONS = ("in_proj.weight", "out_proj.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def lora_values(corpus: Corpus, name: str, **changes: Any) -> dict[str, Any]:
    values = train_values(corpus, name=name, **changes)
    values["phases"]["instruct"] |= {"lora": {"rank": 4, "alpha": 8}, "trainable": [RULE]}
    return values


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_only_the_adapted_projections_differ_after_the_phase(corpus: Corpus, stage: int) -> None:
    config = parse_config(TrainConfig, lora_values(corpus, f"lora-{stage}", zero={"stage": stage}))
    report = train_local(config)
    assert report["instruct"]["loss_last"] < report["instruct"]["loss_first"]
    folder = RunFolder.of(config)
    before, after = (from_pretrained(folder.weights(name)).state_dict() for name in ("align", "instruct"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {n for n in before if n.startswith("backbone.layers.") and n.endswith(PROJECTIONS)}
    assert changed == expected
    rank = torch.linalg.matrix_rank(
        (after["backbone.layers.0.mixer.in_proj.weight"] - before["backbone.layers.0.mixer.in_proj.weight"]).double(),
        rtol=1e-4,
    )
    assert rank == 4


def test_an_interrupted_adapter_phase_resumes_bit_identically(corpus: Corpus) -> None:
    config = parse_config(TrainConfig, lora_values(corpus, "lora-2b"))
    train_local(config)
    folder = RunFolder.of(config)
    whole = [row["loss"] for row in read_metrics(folder.uri)]
    for checkpoint in Checkpoints(folder.checkpoints).committed():
        if int(checkpoint[-8:]) > 5:
            shutil.rmtree(checkpoint)
    train_local(config)
    rows = read_metrics(folder.uri)
    assert [row["loss"] for row in rows] == whole
    assert rows[-1]["attempt"] == 2


def test_adapters_without_a_rule_are_an_error(corpus: Corpus) -> None:
    values = lora_values(corpus, "idle")
    values["phases"]["instruct"]["trainable"] = [{"match": r"projector\..*", "lr": 1e-3}]
    config = parse_config(TrainConfig, values)
    with pytest.raises(ValueError, match=r"LoRA tensors such as backbone.* are trained by no rule"):
        dry_run(config)


def test_a_dry_run_counts_the_adapters(corpus: Corpus) -> None:
    facts = dry_run(parse_config(TrainConfig, lora_values(corpus, "counted"))).phases[1]
    whole = dry_run(train_config(corpus)).phases[1]
    assert facts.sizes.num_parameters == whole.sizes.num_parameters + facts.sizes.num_trained
    assert facts.plan is not None
