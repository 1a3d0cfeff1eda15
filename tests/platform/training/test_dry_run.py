"""A dry run reports the plan and groups of the run; memory estimates equal measured memory."""

from __future__ import annotations

import json
import re
import runpy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from reference.training_corpus import Corpus, make_corpus, train_config, train_values
from timeviper_model.config import PRESETS
from timeviper_model.weights.families import text_config_to_dict
from timeviper_model.weights.weights_folder import load_tokenizer
from timeviper_platform.common.config import parse_config
from timeviper_platform.common.devices import Dtype, torch_dtype
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.training.batches.packing import Pack, PackPosition
from timeviper_platform.training.config import TrainConfig
from timeviper_platform.training.cost.memory import (
    ModelSizes,
    activation_bytes,
    saved_bytes,
    saved_bytes_per_token,
    state_bytes,
)
from timeviper_platform.training.cost.node import node_needs
from timeviper_platform.training.dry_run import PlanFacts, describe_dry_run, dry_run
from timeviper_platform.training.optim.deepspeed_engine import build_ds_engine
from timeviper_platform.training.phase import first_model, prepare_phase

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def plan_of(config: TrainConfig, phase: str) -> PlanFacts:
    facts = {item.name: item.plan for item in dry_run(config).phases}[phase]
    assert facts is not None
    return facts


def test_the_reported_plan_is_the_plan_of_the_loader(corpus: Corpus) -> None:
    values = train_values(corpus, workers={"num_workers": 2})
    del values["phases"]["instruct"]["steps"]
    values["phases"]["instruct"]["epochs"] = 1
    config = train_config(corpus, **values)
    facts = plan_of(config, "instruct")
    store = FeatureStore.open(corpus.features)
    init = config.phases["align"].init
    assert init is not None
    model = first_model(init, store, None)
    phase = prepare_phase(config, "instruct", model, store, load_tokenizer(corpus.tokenizer), rank=0, world_size=1)
    steps = list(phase.loader.steps(PackPosition(0, 0), 0, phase.num_steps))
    batches = [item.batch for step in steps for item in step.micro_batches if not item.is_dummy]
    with torch.no_grad():
        left = torch.stack([model(batch.to("cpu", torch.float32)).num_vision_tokens for batch in batches]).sum(0)
    assert facts.num_steps == len(steps)
    assert facts.num_packs == len(batches)
    assert facts.vision_tokens == tuple(left.tolist())
    assert facts.text_tokens == sum(step.counts.num_tokens - step.counts.num_vision_tokens for step in steps)
    assert facts.fill == pytest.approx(sum(len(batch.input_ids) for batch in batches) / (len(batches) * 160))
    assert facts.num_dummies_per_step == 1  # three packs on two ranks


def test_a_backbone_is_read_before_the_run(corpus: Corpus, tmp_path: Path) -> None:
    values = train_values(corpus)
    values["phases"]["align"]["init"]["backbone"] = str(tmp_path)
    config = parse_config(TrainConfig, values)
    result = dry_run(config)
    assert [problem for problem in result.problems if "has no config.json" in problem]
    small = result.phases[0].sizes.num_parameters
    text = replace(PRESETS["tiny"].text, vocab_size=700)
    (tmp_path / "config.json").write_text(json.dumps(text_config_to_dict(text)))
    result = dry_run(config)
    assert result.problems == []
    added = 2 * (700 - 512) * text.hidden_size
    assert result.phases[0].sizes.num_parameters == small + added


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("use_transv", [True, False])
def test_activation_estimates_equal_the_bytes_autograd_keeps(corpus: Corpus, dtype: Dtype, use_transv: bool) -> None:
    config = train_config(corpus)
    store = FeatureStore.open(corpus.features)
    init = config.phases["align"].init
    assert init is not None
    model = first_model(init, store, None)
    phase = prepare_phase(config, "align", model, store, load_tokenizer(corpus.tokenizer), rank=0, world_size=1)
    model = model.to(torch_dtype(dtype))
    batch = next(phase.loader.steps(PackPosition(0, 0), 0, 1)).micro_batches[0].batch.to("cpu", torch_dtype(dtype))
    vision = torch.bincount(batch.segment_ids[batch.vision_index >= 0], minlength=batch.num_segments)
    shape = Pack(
        num_tokens=len(batch.input_ids),
        vision_counts=tuple(vision.tolist()),
        num_targets=int((batch.labels >= 0).sum()),
    )

    def measured() -> int:
        return saved_bytes(lambda: model(batch, use_transv=use_transv), list(model.parameters()))

    def estimated(*, checkpointing: bool) -> int:
        return activation_bytes(
            model.config, shape, dtype=dtype, use_transv=use_transv, activation_checkpointing=checkpointing
        )

    assert estimated(checkpointing=False) == pytest.approx(measured(), rel=0.15)
    model.gradient_checkpointing = True
    text = model.config.text
    again = max(saved_bytes_per_token(text, kind, torch_dtype(dtype)) for kind in set(text.block_types))
    assert estimated(checkpointing=True) == pytest.approx(measured() + again * shape.num_tokens, rel=0.15)


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "float32"), (0, "bfloat16"), (1, "bfloat16"), (2, "float32"), (3, "bfloat16")]
)
def test_state_estimates_equal_the_bytes_that_deepspeed_keeps(corpus: Corpus, stage: int, dtype: Dtype) -> None:
    config = train_config(corpus, zero={"stage": stage}, dtype=dtype)
    store = FeatureStore.open(corpus.features)
    init = config.phases["align"].init
    assert init is not None
    model = first_model(init, store, None)
    phase = prepare_phase(config, "align", model, store, load_tokenizer(corpus.tokenizer), rank=0, world_size=1)
    sizes = ModelSizes(sum(p.numel() for p in model.parameters()), sum(group.num_parameters for group in phase.groups))
    ds_engine = build_ds_engine(model, phase.groups, config.zero, dtype=dtype, num_micro_steps=1)
    expected = state_bytes(sizes, zero_stage=stage, world_size=1, dtype=dtype)
    weights = sum(p.ds_numel if stage == 3 else p.numel() for p in model.parameters()) * torch_dtype(dtype).itemsize
    masters = sum(tensor.nbytes for tensor in fp32_masters(ds_engine, stage, dtype))
    ds_engine.destroy()
    assert weights == expected.parameters
    assert masters + 2 * 4 * sizes.num_trained == expected.optimizer


def fp32_masters(ds_engine: Any, stage: int, dtype: Dtype) -> list[torch.Tensor]:
    if stage == 3:
        return list(ds_engine.optimizer.fp32_partitioned_groups_flat)
    if stage > 0:
        return list(ds_engine.optimizer.single_partition_of_fp32_groups)
    return [] if dtype == "float32" else [tensor for group in ds_engine.optimizer.fp32_groups for tensor in group]


def test_partitioned_states_are_divided_by_the_ranks() -> None:
    sizes = ModelSizes(num_parameters=1000, num_trained=100)
    rows = [state_bytes(sizes, zero_stage=stage, world_size=4, dtype="bfloat16") for stage in range(4)]
    assert [tuple(row) for row in rows] == [(2000, 200, 1200), (2000, 200, 300), (2000, 50, 300), (500, 50, 300)]


def test_the_needs_of_a_node_follow_its_ranks() -> None:
    """The 9B on two nodes of eight GPUs, with ZeRO-2 and in an object store."""
    sizes = ModelSizes(num_parameters=9_000_000_000, num_trained=8_000_000_000)
    stage = partial(node_needs, sizes, world_size=16, dtype="bfloat16", use_gpu=True, cache_bytes=10**9)
    needs = stage(zero_stage=2, offload_optimizer=False, remote=True)
    assert needs.num_ranks == 8
    assert needs.checkpoint == 18e9 + 96e9
    assert needs.traffic == needs.host_save == 18e9 + 48e9  # the parameters, and half of the shards
    assert (needs.host_start, needs.host_caches, needs.host) == (8 * 36e9, 8e9, 8 * 36e9)
    assert needs.disk == needs.traffic + 36e9
    assert needs.seconds == 66.0
    shards = stage(zero_stage=3, offload_optimizer=True, remote=False)
    assert shards.checkpoint == 96e9 + 2e9  # trained parameters as masters alone
    assert (shards.traffic, shards.host_optimizer, shards.disk) == (49e9, 48e9, 0)


def test_the_job_prints_the_report_and_missing_inputs(corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    values = train_values(corpus, workers={"num_workers": 2})
    values["phases"]["instruct"]["samples"].append({"uri": "/nowhere/videos", "weight": 2.0})
    path = corpus.folder / "train.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    job = runpy.run_path(str(ROOT / "jobs" / "train.py"))["main"]
    assert job(["--config", str(path), "--dry-run"]) == 1
    shown = capsys.readouterr().out
    assert "2 ranks, float32, ZeRO-2" in shown
    assert "projector\\..* decay: 2 tensors, 24,576 parameters, lr 0.001, weight decay 0.01" in shown
    assert "100.00%  " + corpus.samples in shown
    assert "a node of 2 ranks in GB: host memory" in shown
    assert re.search(r"a checkpoint: 0\.\d+ GB, 0\.\d+ for keep \+ 1; a save or resume moves .* at 1 GB/s", shown)
    assert "phases.instruct.samples: no files at /nowhere/videos" in shown
    assert not (corpus.folder / "runs").exists()
    assert job(["--config", str(path), "--dry-run", "phases.instruct.samples=[]"]) == 1
    override = f"phases.instruct.samples=[{{uri: {corpus.samples}}}]"
    assert job(["--config", str(path), "--dry-run", override]) == 0


def test_groups_and_memory_are_reported_without_data(corpus: Corpus) -> None:
    config = train_config(corpus, feature_store="/nowhere/features", tokenizer="/nowhere/tokenizer")
    result = dry_run(config)
    assert [phase.plan for phase in result.phases] == [None, None]
    assert result.phases[0].sizes.num_trained == 24_832
    assert result.phases[0].activations > 0
    assert [problem.split(":")[0] for problem in result.problems] == ["feature_store", "tokenizer"]
    assert "no plan" in describe_dry_run(config, result)
