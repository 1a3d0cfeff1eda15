"""The shipped training configurations load, list their data, and their tiny twins run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reference.training_corpus import Corpus, make_corpus
from timeviper_model.config import PRESETS, Qwen2Config
from timeviper_model.timeviper import TimeViper
from timeviper_model.weights.weights_folder import from_pretrained, load_tokenizer, save_pretrained
from timeviper_platform.common.config import load_config
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.training.batches.packing import Pack
from timeviper_platform.training.batches.rows import SourceConfig
from timeviper_platform.training.config import InitConfig, TrainConfig
from timeviper_platform.training.cost.flops import training_flops
from timeviper_platform.training.dry_run import describe_dry_run, dry_run
from timeviper_platform.training.local import train_local
from timeviper_platform.training.phase import first_model_config
from timeviper_platform.training.run import RunFolder

CONFIGS = Path(__file__).resolve().parents[3] / "ray_configs"
RECIPES = {"align.yaml": "align", "instruct.yaml": "instruct", "lora.yaml": "adapt"}
SOURCES = {
    "llava-video kinetics webvid sharegpt4video sharegemini moviechat videochat-flash",  # 1.8 M video instructions
    "llava-onevision-single-image",  # 2.8 M
    "activitynet coin vitt hirest youcook2",  # 26 K dense captions
    "didemo ht-step vtg-llm et-bench howto100m timechat timesuite internvid vid2seq time-r1 queryd",  # 250 K grounding
}
"""Sources named in the paper (arXiv 2511.16595)."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def without_bucket(name: str, folder: Path) -> Path:
    """A copy with a folder in place of the bucket, which needs credentials."""
    file = folder / name
    file.write_text((CONFIGS / name).read_text().replace("s3://your-bucket", "/nowhere/bucket"))
    return file


def tiny_weights(corpus: Corpus) -> Path:
    weights = corpus.folder / "weights"
    if not weights.exists():
        model = TimeViper(PRESETS["tiny"])
        model.init_weights(torch.Generator().manual_seed(0))
        save_pretrained(model, weights, tokenizer=load_tokenizer(corpus.tokenizer))
    return weights


def test_weights_must_have_the_sizes_of_a_named_preset(corpus: Corpus) -> None:
    store, weights = FeatureStore.open(corpus.features), str(tiny_weights(corpus))
    assert first_model_config(InitConfig(weights=weights, preset="tiny"), store, None).text == PRESETS["tiny"].text
    with pytest.raises(ValueError, match="have other sizes than the preset '9b'"):
        first_model_config(InitConfig(weights=weights, preset="9b"), store, None)


@pytest.mark.parametrize("name", ["train.yaml", "tiny/train.yaml"])
def test_configurations_of_all_phases_load(name: str) -> None:
    config = load_config(TrainConfig, CONFIGS / name)
    assert list(config.phases)[-2:] == ["align", "instruct"]
    assert not config.phases["align"].use_transv
    assert config.phases["instruct"].use_transv


@pytest.mark.parametrize(("whole", "alone"), [("align", "align.yaml"), ("instruct", "instruct.yaml")])
def test_a_configuration_of_one_phase_equals_that_phase_of_the_chain(whole: str, alone: str) -> None:
    chain = load_config(TrainConfig, CONFIGS / "train.yaml")
    config = load_config(TrainConfig, CONFIGS / alone)
    for field in ("trainable", "packing", "packs_per_step", "epochs", "use_transv", "frames", "schedule"):
        assert getattr(config.phases[whole], field) == getattr(chain.phases[whole], field)
    assert (config.dtype, config.zero) == (chain.dtype, chain.zero)


def test_a_dry_run_lists_every_missing_source(tmp_path: Path) -> None:
    file = without_bucket("instruct.yaml", tmp_path)
    # the tiny preset, because probing the memory of 9b blocks is slow
    config = load_config(TrainConfig, file, ["phases.instruct.init.preset=tiny"])
    result = dry_run(config)
    named = [problem for problem in result.problems if "no files at" in problem]
    assert len(named) == len(config.phases["instruct"].samples) == 24
    text = describe_dry_run(config, result)
    assert "no files at /nowhere/bucket/samples/instruct/queryd" in text
    assert "     57.42%  /nowhere/bucket/samples/instruct/llava-onevision-single-image (absent, 2,800,000" in text
    assert "      0.47%  /nowhere/bucket/samples/instruct/queryd (absent, 22,727 samples)" in text
    assert " steps of the whole mixture, 4,875,998 samples as configured in `expected`" in text
    assert "GPU-hours at 40%" in text


def test_gpu_hours_of_missing_sources_are_those_of_their_expected_samples(tmp_path: Path) -> None:
    config = load_config(TrainConfig, without_bucket("instruct.yaml", tmp_path), ["phases.instruct.init.preset=tiny"])
    phase, tiny = config.phases["instruct"], PRESETS["tiny"]
    (facts,) = dry_run(config).phases
    kinds = [kind for source in phase.samples for kind in source.expected]
    alone = {
        (kind.num_frames, kind.num_text_tokens): training_flops(
            tiny,
            Pack(
                num_tokens=kind.num_frames * tiny.vision.num_tokens_per_frame + kind.num_text_tokens,
                vision_counts=(kind.num_frames * tiny.vision.num_tokens_per_frame,),
                num_targets=kind.num_text_tokens,
            ),
            use_transv=True,
            trained_share=1.0,
        )
        for kind in kinds
    }
    flops = sum(kind.num_samples * alone[kind.num_frames, kind.num_text_tokens] for kind in kinds)
    assert facts.flops == pytest.approx(flops, rel=1e-3)  # the last step is counted as a full one
    twice = replace(phase, samples=tuple(replace(source, weight=2.0) for source in phase.samples))
    (doubled,) = dry_run(replace(config, phases={"instruct": twice})).phases
    assert doubled.flops == pytest.approx(2 * flops, rel=1e-3)
    silent = replace(phase, samples=(*phase.samples, SourceConfig(uri="/nowhere/own")))
    (unknown,) = dry_run(replace(config, phases={"instruct": silent})).phases
    assert unknown.expected is None
    assert {source.share for source in unknown.sources} == {None}


def test_instruct_lists_every_source_of_the_paper() -> None:
    config = load_config(TrainConfig, CONFIGS / "instruct.yaml")
    named = {Path(source.uri).name for source in config.phases["instruct"].samples}
    assert named == {name for group in SOURCES for name in group.split()}


def test_the_baseline_differs_from_the_hybrid_only_in_its_model() -> None:
    baseline = load_config(TrainConfig, CONFIGS / "qwen.yaml")
    for name in ("align", "instruct"):
        hybrid = load_config(TrainConfig, CONFIGS / f"{name}.yaml").phases[name]
        own = baseline.phases[name]
        for field in ("samples", "packing", "packs_per_step", "epochs", "frames", "schedule"):
            assert getattr(own, field) == getattr(hybrid, field)
        assert own.trainable[0] == hybrid.trainable[0]  # the others train TransV
        assert not own.use_transv
    init = baseline.phases["align"].init
    assert init is not None
    assert replace(init, backbone=None).model_config().transv == ()


@pytest.mark.usefixtures("group_of_one")
def test_the_tiny_baseline_trains_all_phases(corpus: Corpus) -> None:
    overrides = [
        f"runs={corpus.folder}/runs",
        f"feature_store={corpus.features}",
        f"tokenizer={corpus.tokenizer}",
        "metrics.tensorboard=false",
        *(f"phases.{name}.samples=[{{uri: {corpus.samples}}}]" for name in ("language", "align", "instruct")),
        *(f"phases.{name}.steps=1" for name in ("language", "align", "instruct")),
    ]
    config = load_config(TrainConfig, CONFIGS / "tiny" / "qwen.yaml", overrides)
    assert list(train_local(config)) == ["language", "align", "instruct"]
    trained = from_pretrained(RunFolder.of(config).weights("instruct")).config
    assert isinstance(trained.text, Qwen2Config)
    assert trained.transv == ()


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("name", RECIPES)
def test_tiny_twins_run(corpus: Corpus, name: str) -> None:
    phase, weights = RECIPES[name], tiny_weights(corpus)
    overrides = [
        f"runs={corpus.folder}/runs",
        f"feature_store={corpus.features}",
        f"tokenizer={corpus.tokenizer}",
        f"phases.{phase}.samples=[{{uri: {corpus.samples}}}]",
        f"phases.{phase}.init.weights={weights}",
        f"phases.{phase}.steps=3",
        "metrics.tensorboard=false",
    ]
    if name == "instruct.yaml":
        overrides.append(f"phases.{phase}.validation.samples=[{{uri: {corpus.samples}}}]")
    config = load_config(TrainConfig, CONFIGS / "tiny" / name, overrides)
    assert train_local(config)[phase]["steps"] == 3
    before, after = from_pretrained(weights).state_dict(), from_pretrained(RunFolder.of(config).weights(phase))
    changed = [key for key, tensor in after.state_dict().items() if not torch.equal(tensor, before[key])]
    assert changed
