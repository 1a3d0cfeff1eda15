"""The training configurations that are shipped: they load, name their data, and their tiny twins run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reference.training_corpus import Corpus, make_corpus
from timeviper_model.config import PRESETS
from timeviper_model.timeviper import TimeViper
from timeviper_model.weights import from_pretrained, load_tokenizer, save_pretrained
from timeviper_platform.config import load_config
from timeviper_platform.training.config import TrainConfig
from timeviper_platform.training.dry_run import describe_dry_run, dry_run
from timeviper_platform.training.local import train_local
from timeviper_platform.training.loop import RunFolder

CONFIGS = Path(__file__).resolve().parents[3] / "ray_configs"
RECIPES = {"align.yaml": "align", "instruct.yaml": "instruct", "lora.yaml": "adapt"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize("name", ["train.yaml", "tiny/train.yaml"])
def test_the_whole_chain_loads(name: str) -> None:
    config = load_config(TrainConfig, CONFIGS / name)
    assert list(config.phases)[-2:] == ["align", "instruct"]
    assert not config.phases["align"].use_transv
    assert config.phases["instruct"].use_transv


@pytest.mark.parametrize(("whole", "alone"), [("align", "align.yaml"), ("instruct", "instruct.yaml")])
def test_a_phase_alone_has_the_numbers_of_the_chain(whole: str, alone: str) -> None:
    chain = load_config(TrainConfig, CONFIGS / "train.yaml")
    config = load_config(TrainConfig, CONFIGS / alone)
    for field in ("trainable", "packing", "packs_per_step", "epochs", "use_transv", "frames", "schedule"):
        assert getattr(config.phases[whole], field) == getattr(chain.phases[whole], field)
    assert (config.precision, config.zero) == (chain.precision, chain.zero)


def test_a_dry_run_names_every_source_that_is_not_there() -> None:
    config = load_config(TrainConfig, CONFIGS / "instruct.yaml")
    result = dry_run(config)
    named = [problem for problem in result.problems if "no files at" in problem]
    assert len(named) == len(config.phases["instruct"].samples) == 24
    assert "no files at /mnt/cluster/timeviper/samples/instruct/queryd" in describe_dry_run(config, result)


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("name", RECIPES)
def test_tiny_twins_run(corpus: Corpus, name: str) -> None:
    phase = RECIPES[name]
    weights = corpus.folder / "weights"
    if not weights.exists():
        model = TimeViper(PRESETS["tiny"])
        model.init_weights(torch.Generator().manual_seed(0))
        save_pretrained(model, weights, tokenizer=load_tokenizer(corpus.tokenizer))
    overrides = [
        f"runs={corpus.folder}/runs",
        f"feature_store={corpus.features}",
        f"tokenizer={corpus.tokenizer}",
        f"phases.{phase}.samples=[{{uri: {corpus.samples}}}]",
        f"phases.{phase}.init={{weights: {weights}}}",
        f"phases.{phase}.steps=3",
        "metrics.tensorboard=false",
    ]
    config = load_config(TrainConfig, CONFIGS / "tiny" / name, overrides)
    assert train_local(config)[phase]["steps"] == 3
    before, after = from_pretrained(weights).state_dict(), from_pretrained(RunFolder.of(config).weights(phase))
    changed = [key for key, tensor in after.state_dict().items() if not torch.equal(tensor, before[key])]
    assert changed
