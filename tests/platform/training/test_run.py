"""Whole runs on one rank in this process, without Ray."""

from __future__ import annotations

import copy
import functools
import json
import logging
import os
import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import s3fs
import torch
import yaml

from reference.bare_training import train_bare
from reference.training_corpus import DIM, QUESTIONS, RECIPE, Corpus, make_corpus, train_config, train_values
from timeviper_model.config import PRESETS, Qwen2Config, TransVSite
from timeviper_model.weights.weights_folder import from_pretrained, load_tokenizer
from timeviper_platform.common import storage
from timeviper_platform.common.config import load_config, parse_config
from timeviper_platform.common.lease import LeaseHeldError, hold_lease
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.data.store.writer import write_store
from timeviper_platform.training.batches.packing import PackPosition
from timeviper_platform.training.checkpoint.deepspeed_files import take_snapshot
from timeviper_platform.training.checkpoint.export import export_weights
from timeviper_platform.training.checkpoint.initial_weights import load_weights
from timeviper_platform.training.checkpoint.manager import Checkpoints
from timeviper_platform.training.config import TrainConfig, resolve_paths
from timeviper_platform.training.local import main, train_local
from timeviper_platform.training.metrics.writer import read_metrics
from timeviper_platform.training.optim.deepspeed_engine import build_ds_engine
from timeviper_platform.training.phase import first_model, prepare_phase
from timeviper_platform.training.run import RunFolder
from timeviper_platform.training.step import TrainContext, train_step

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.usefixtures("group_of_one")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def finished(corpus: Corpus, group_of_one: None) -> TrainConfig:
    """An uninterrupted run of both phases."""
    config = train_config(corpus, name="finished")
    train_local(config)
    return config


def curve(config: TrainConfig) -> list[tuple[int, float, float]]:
    return [(row["global_step"], row["loss"], row["grad_norm"]) for row in read_metrics(RunFolder.of(config).uri)]


def test_a_run_that_starts_at_the_end_of_another_reports_no_losses(finished: TrainConfig, corpus: Corpus) -> None:
    newest = Checkpoints(RunFolder.of(finished).checkpoints).newest()
    assert newest is not None
    report = train_local(train_config(corpus, name="second"), resume=newest)
    assert [(phase["steps"], phase["loss_first"], phase["loss_last"]) for phase in report.values()] == [
        (0, None, None)
    ] * len(report)


def interrupted_after(finished: TrainConfig, corpus: Corpus, name: str, step: int) -> TrainConfig:
    """A hard-linked copy of the finished run, as if killed after its checkpoint at `step`."""
    config = train_config(corpus, name=name)
    source, target = Path(RunFolder.of(finished).uri), Path(RunFolder.of(config).uri)
    shutil.copytree(source, target, copy_function=os.link)
    for folder in (target / "checkpoints").glob("step-*"):
        if int(folder.name[-8:]) > step:
            shutil.rmtree(folder)
    shutil.rmtree(target / "weights" / "instruct")
    return config


def test_phases_run_in_a_chain_and_learn(finished: TrainConfig) -> None:
    folder = RunFolder.of(finished)
    report = json.loads(Path(folder.report).read_text())
    assert [(name, phase["steps"]) for name, phase in report.items()] == [("align", 3), ("instruct", 6)]
    assert report["instruct"]["loss_last"] < report["instruct"]["loss_first"] - 1.0
    assert report["align"]["rejects"] == {"too_long": 3}
    assert report["instruct"]["samples"] > 0
    rejects = json.loads(Path(folder.rejects("align")).read_text())
    assert rejects[0]["reason"] == "too_long"
    align, instruct = from_pretrained(folder.weights("align")), from_pretrained(folder.weights("instruct"))
    assert torch.equal(align.backbone.embeddings.weight, _first_model_weight(finished))
    assert not torch.equal(instruct.backbone.embeddings.weight, align.backbone.embeddings.weight)
    assert instruct.state_dict()["transv.3.alpha"].item() != 0.0


def test_a_pure_transformer_trains_through_the_same_phases(corpus: Corpus) -> None:
    values = train_values(corpus, name="qwen", checkpoint={"every_steps": 100, "keep": 1})
    values["phases"]["align"]["init"] = {"preset": "tiny-qwen", "seed": 3}
    config = parse_config(TrainConfig, values)
    train_local(config)
    report = json.loads(Path(RunFolder.of(config).report).read_text())
    assert report["instruct"]["loss_last"] < report["instruct"]["loss_first"] - 1.0
    trained = from_pretrained(RunFolder.of(config).weights("instruct"))
    assert isinstance(trained.config.text, Qwen2Config)
    assert trained.state_dict()["transv.1.alpha"].item() != 0.0


def _first_model_weight(config: TrainConfig) -> torch.Tensor:
    from timeviper_model.timeviper import TimeViper

    model = TimeViper(PRESETS["tiny"])
    model.init_weights(torch.Generator().manual_seed(3))
    return model.backbone.embeddings.weight


def test_a_phase_can_replace_the_transv_sites_of_its_weights(finished: TrainConfig, corpus: Corpus) -> None:
    values = train_values(corpus, name="other-sites")
    del values["phases"]["align"]
    weights = RunFolder.of(finished).weights("align")
    site = {"layer": 8, "select": "attention", "keep": 0.25, "transfer": "none"}
    values["phases"]["instruct"] |= {"init": {"weights": weights, "transv": [site]}, "steps": 2}
    values["phases"]["instruct"]["trainable"] = [{"match": ".*", "lr": 1e-3}]
    config = parse_config(TrainConfig, values)
    train_local(config)
    before, after, *more = read_metrics(RunFolder.of(config).uri)[-1]["num_vision_tokens"]
    assert before > after
    assert not more
    assert from_pretrained(RunFolder.of(config).weights("instruct")).config.transv == (TransVSite(**site),)
    assert from_pretrained(weights).config.transv == PRESETS["tiny"].transv


@pytest.mark.parametrize("max_grad_norm", [pytest.param(1.0, marks=pytest.mark.slow), 0.05])
def test_losses_equal_those_of_a_bare_loop(corpus: Corpus, max_grad_norm: float) -> None:
    values = train_values(corpus, name=f"clip-{max_grad_norm}", zero={"max_grad_norm": max_grad_norm})
    del values["phases"]["instruct"]
    values["phases"]["align"] |= {
        "trainable": [{"match": ".*", "lr": 5e-3, "weight_decay": 0.5}],
        "steps": 4,
        "schedule": {"warmup_ratio": 0.4, "final_ratio": 0.1},
        "use_transv": True,
    }
    config = parse_config(TrainConfig, values)
    train_local(config)
    store = FeatureStore.open(corpus.features)
    init = config.phases["align"].init
    assert init is not None
    model = first_model(init, store, None)
    phase = prepare_phase(config, "align", model, store, load_tokenizer(corpus.tokenizer), rank=0, world_size=1)
    assert [loss for _, loss, _ in curve(config)] == pytest.approx(train_bare(phase, config.zero), rel=2e-6)


def test_metrics_rows_describe_their_step(finished: TrainConfig) -> None:
    rows = read_metrics(RunFolder.of(finished).uri)
    align, instruct = rows[0], rows[-1]
    assert align["num_vision_tokens"][0] == align["num_vision_tokens"][2] > 0  # TransV off
    before, after_first, after_second = instruct["num_vision_tokens"]
    assert before > after_first > after_second > 0
    assert set(align["lr"]) == {r"projector\..* decay", r"projector\..* no decay"}
    assert align["attempt"] == 1
    assert 0 < align["fill"] <= 1
    assert 0 <= align["data_wait_share"] <= 1
    assert align["tflops_per_second"] > 0
    assert align["peak_memory_bytes"] > 100e6
    assert "mfu" not in align  # this CPU's peak is unknown
    assert align["tokens_per_second"] == pytest.approx(align["num_tokens"] / align["seconds"])


@pytest.mark.parametrize(
    "step", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(5, marks=pytest.mark.slow)]
)  # in a phase, at its end, in the next
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(
    finished: TrainConfig, corpus: Corpus, step: int
) -> None:
    config = interrupted_after(finished, corpus, f"resumed-{step}", step)
    shutil.rmtree(Path(RunFolder.of(config).uri, "metrics"))
    train_local(config)
    assert curve(config) == curve(finished)[step:]
    one, other = (from_pretrained(RunFolder.of(c).weights("instruct")).state_dict() for c in (config, finished))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_snapshot_does_not_change_while_training_continues(corpus: Corpus) -> None:
    values = train_values(corpus, name="snapshot")
    values["phases"]["align"] |= {"trainable": [{"match": ".*", "lr": 1e-2}], "use_transv": True}
    config = parse_config(TrainConfig, values)
    store, init = FeatureStore.open(corpus.features), config.phases["align"].init
    assert init is not None
    model = first_model(init, store, None)
    phase = prepare_phase(config, "align", model, store, load_tokenizer(corpus.tokenizer), rank=0, world_size=1)
    micro_steps = phase.loader.num_micro_steps
    ds_engine = build_ds_engine(model, phase.groups, config.zero, dtype="float32", num_micro_steps=micro_steps)
    first, second = phase.loader.steps(PackPosition(0, 0), 0, 2)
    context = TrainContext(device=torch.device("cpu"), dtype=torch.float32, use_transv=True)
    train_step(ds_engine, first, context)
    files = take_snapshot(ds_engine)
    before = copy.deepcopy(files)
    train_step(ds_engine, second, context)
    after = take_snapshot(ds_engine)
    ds_engine.destroy()

    def values_of(content: dict[str, Any]) -> list[torch.Tensor]:
        saved = content["zero_pp_rank_0_mp_rank_00_optim_states.pt"]["optimizer_state_dict"]
        moments = [state["exp_avg"] for state in saved["base_optimizer_state"]["state"].values()]
        return [*content["mp_rank_00_model_states.pt"]["module"].values(), *moments]

    assert all(torch.equal(one, other) for one, other in zip(values_of(files), values_of(before), strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(values_of(files), values_of(after), strict=True))


@pytest.mark.slow  # test_kills has the same store
def test_a_run_on_an_object_store_resumes_from_there(
    finished: TrainConfig, corpus: Corpus, s3_bucket: s3fs.S3FileSystem
) -> None:
    checkpoint = {"every_steps": 5, "keep": 2}
    config = train_config(corpus, name="remote", runs="s3://bucket/runs", checkpoint=checkpoint)
    train_local(config)
    folder = RunFolder.of(config)
    newest = Checkpoints(folder.checkpoints).newest()
    assert newest is not None
    # as if killed before its end
    s3_bucket.rm_file(f"{newest.removeprefix('s3://')}/COMMIT")
    storage.remove(folder.weights("instruct"))
    report = train_local(config)
    assert report["instruct"]["steps"] == 6
    assert curve(config) == curve(finished)
    own, expected = (load_weights(RunFolder.of(c).weights("instruct")).state_dict() for c in (config, finished))
    assert all(torch.equal(own[name], expected[name]) for name in expected)


def test_a_failed_save_ends_the_run_and_keeps_the_last_checkpoint(corpus: Corpus) -> None:
    config = train_config(corpus, name="full-disk", checkpoint={"every_steps": 2, "keep": 20, "max_failed_saves": 0})
    folder = Path(RunFolder.of(config).checkpoints)
    folder.mkdir(parents=True)
    (folder / "step-00000005").write_text("a file where a folder should be")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "remove", lambda uri: None)
        with pytest.raises(RuntimeError, match=r"a checkpoint in .* could not be written: .*rank 0"):
            train_local(config)
    newest = Checkpoints(str(folder)).newest()
    assert newest is not None
    assert newest.endswith("step-00000003")


def test_restarting_a_finished_run_does_nothing(finished: TrainConfig, corpus: Corpus) -> None:
    before = curve(finished)
    report = train_local(finished)
    assert report["instruct"]["steps"] == 6
    assert curve(finished) == before


def test_only_the_newest_checkpoints_are_kept(corpus: Corpus) -> None:
    values = train_values(corpus, name="pruned", checkpoint={"every_steps": 1, "keep": 2})
    del values["phases"]["instruct"]
    config = parse_config(TrainConfig, values)
    train_local(config)
    folder = RunFolder.of(config).checkpoints
    assert [Path(uri).name for uri in Checkpoints(folder).committed()] == ["step-00000002", "step-00000003"]
    assert sorted(path.name for path in Path(folder).glob("step-*")) == ["step-00000002", "step-00000003"]


@pytest.mark.slow
def test_bfloat16_learns_and_exports_its_float32_masters(corpus: Corpus, finished: TrainConfig) -> None:
    values = train_values(corpus, name="bfloat16", dtype="bfloat16", activation_checkpointing=True)
    config = parse_config(TrainConfig, values)
    report = train_local(config)
    reference = json.loads(Path(RunFolder.of(finished).report).read_text())
    assert report["instruct"]["loss_last"] == pytest.approx(reference["instruct"]["loss_last"], rel=0.1)
    weight = from_pretrained(RunFolder.of(config).weights("instruct")).lm_head.weight
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float())


@pytest.mark.parametrize(
    "stage", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow), 2, 3]
)
def test_bfloat16_masters_start_from_float32_and_frozen_tensors_are_exported_as_they_came(
    corpus: Corpus, stage: int
) -> None:
    """Before, both were rounded to bfloat16 once."""
    values = train_values(corpus, name=f"exact-{stage}", dtype="bfloat16", zero={"stage": stage})
    del values["phases"]["instruct"]
    values["phases"]["align"] |= {
        "trainable": [{"match": r"(projector|backbone\.layers\.1)\..*", "lr": 0.0}],
        "steps": 1,
    }
    config = parse_config(TrainConfig, values)
    train_local(config)
    store, init = FeatureStore.open(corpus.features), config.phases["align"].init
    assert init is not None
    expected = first_model(init, store, None).state_dict()
    exported = from_pretrained(RunFolder.of(config).weights("align")).state_dict()
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
    assert not torch.equal(expected["lm_head.weight"], expected["lm_head.weight"].bfloat16().float())


def test_frozen_tensors_whose_source_is_gone_are_exported_rounded_with_a_warning(
    corpus: Corpus, finished: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = train_values(corpus, name="source-gone", dtype="bfloat16")
    weights = tmp_path / "weights"
    shutil.copytree(RunFolder.of(finished).weights("align"), weights)
    del values["phases"]["instruct"]
    values["phases"]["align"] |= {"init": {"weights": str(weights)}, "steps": 1}
    config = parse_config(TrainConfig, values)
    train_local(config)
    newest = Checkpoints(RunFolder.of(config).checkpoints).newest()
    assert newest is not None
    shutil.rmtree(weights)
    export_weights(newest, str(tmp_path / "again"))
    assert "frozen tensors are exported as rounded to bfloat16, because their source is gone" in caplog.text
    head = from_pretrained(tmp_path / "again").lm_head.weight
    assert torch.equal(head, head.bfloat16().float())


def test_unusable_kernels_end_a_run_before_its_first_step(corpus: Corpus) -> None:
    config = train_config(corpus, name="kernels", backend="kernels")
    with pytest.raises(RuntimeError, match=r"backend = kernels cannot be used .*need CUDA, not cpu"):
        train_local(config)
    assert curve(config) == []


@pytest.fixture(scope="module")
def runs_by_stage(corpus: Corpus, finished: TrainConfig) -> Callable[[int], TrainConfig]:
    """A finished run under each ZeRO stage, trained on first use."""

    @functools.cache
    def run(stage: int) -> TrainConfig:
        config = train_config(corpus, name=f"zero-{stage}", zero={"stage": stage})
        train_local(config)
        return config

    return lambda stage: finished if stage == 2 else run(stage)


def expect_same_run(config: TrainConfig, expected: TrainConfig, first_step: int = 0) -> None:
    rows = zip(curve(config)[first_step:], curve(expected)[first_step:], strict=True)
    for (_, loss, norm), (_, expected_loss, expected_norm) in rows:
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert norm == pytest.approx(expected_norm, rel=1e-5)
    own, other = (from_pretrained(RunFolder.of(c).weights("instruct")).state_dict() for c in (config, expected))
    for name, tensor in other.items():
        torch.testing.assert_close(own[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_zero_stages_agree_and_export_the_same(
    runs_by_stage: Callable[[int], TrainConfig], finished: TrainConfig, stage: int
) -> None:
    expect_same_run(runs_by_stage(stage), finished)


@pytest.mark.slow
def test_an_offloaded_optimizer_trains_the_same(corpus: Corpus, finished: TrainConfig) -> None:
    config = train_config(corpus, name="offload", zero={"stage": 2, "offload_optimizer": True})
    train_local(config)
    expect_same_run(config, finished)
    with pytest.raises(ValueError, match=r"offload_optimizer needs zero.stage 1, 2 or 3"):
        train_config(corpus, zero={"stage": 0, "offload_optimizer": True})


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [pytest.param(2, 3, marks=pytest.mark.slow), (3, 0), pytest.param(0, 2, marks=pytest.mark.slow)],
)
def test_a_run_resumes_under_another_zero_stage(
    runs_by_stage: Callable[[int], TrainConfig], finished: TrainConfig, corpus: Corpus, saved: int, resumed: int
) -> None:
    name = f"stage-{saved}-{resumed}"
    interrupted_after(runs_by_stage(saved), corpus, name, 5)
    config = train_config(corpus, name=name, zero={"stage": resumed})
    train_local(config)
    first_attempts = [row["attempt"] == 1 for row in read_metrics(RunFolder.of(config).uri)]
    assert first_attempts == [True] * 5 + [False] * 4
    expect_same_run(config, finished, first_step=5)


@pytest.mark.slow
def test_bfloat16_masters_survive_another_zero_stage_bit_for_bit(corpus: Corpus) -> None:
    values = train_values(corpus, name="masters", dtype="bfloat16")
    train_local(parse_config(TrainConfig, values))
    saved = interrupted_after(parse_config(TrainConfig, values), corpus, "masters-3", 8)
    checkpoint = Checkpoints(RunFolder.of(saved).checkpoints).newest()
    assert checkpoint is not None
    export_weights(checkpoint, RunFolder.of(saved).weights("before"))
    for rule in values["phases"]["instruct"]["trainable"]:
        rule |= {"lr": 0.0}  # the last step then does not change the masters
    resumed = parse_config(TrainConfig, values | {"name": "masters-3", "zero": {"stage": 3}})
    train_local(resumed)
    before, after = (from_pretrained(RunFolder.of(saved).weights(name)).state_dict() for name in ("before", "instruct"))
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in before.values())


def test_an_export_replaces_nothing_but_weights(finished: TrainConfig) -> None:
    """An export to the run's own folder deleted the run."""
    run = RunFolder.of(finished)
    newest = Checkpoints(run.checkpoints).newest()
    assert newest is not None
    storage.write_bytes("memory://exports/other/films/a.mp4", b"1")
    storage.write_bytes("memory://exports/file", b"1")
    for output in (
        run.uri,
        run.checkpoints,
        "memory://exports",
        "memory://exports/other/films",
        "memory://exports/file",
    ):
        with pytest.raises(ValueError, match=f"{output} exists and is no weights folder, and would be deleted"):
            export_weights(newest, output)
    assert Checkpoints(run.checkpoints).newest() == newest
    assert storage.exists("memory://exports/other/films/a.mp4")
    assert storage.exists("memory://exports/file")
    export_weights(newest, "memory://exports/weights")
    whole = storage.files_in("memory://exports/weights")
    for uri in whole:
        if not uri.endswith("/config.json"):  # a killed upload
            storage.remove(uri)
    export_weights(newest, "memory://exports/weights")
    assert storage.files_in("memory://exports/weights") == whole


def test_exported_weights_record_their_origin(finished: TrainConfig, tmp_path: Path) -> None:
    newest = Checkpoints(RunFolder.of(finished).checkpoints).newest()
    assert newest is not None
    export_weights(newest, str(tmp_path / "weights"), dtype="bfloat16")
    described = json.loads((tmp_path / "weights" / "config.json").read_text())
    metadata = described["timeviper_metadata"]
    assert metadata["phase"] == "instruct"
    assert metadata["step"] == "6"
    assert len(metadata["recipe_hash"]) == 64
    assert metadata["max_frames"] == "6"
    assert metadata["use_transv"] == "true"
    assert metadata["time_text"] == "never"  # no sample is about times
    assert described["torch_dtype"] == "bfloat16"
    text = QUESTIONS[0]
    tokenizer = load_tokenizer(tmp_path / "weights")
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_export_job_takes_a_configuration_or_a_checkpoint(
    finished: TrainConfig, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = runpy.run_path(str(ROOT / "jobs" / "export.py"))["main"]
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(train_values(corpus, name="finished"), sort_keys=False))
    assert job(["--config", str(tmp_path / "train.yaml"), "--output", str(tmp_path / "weights")]) == 0
    assert "step-00000009 -> " in capsys.readouterr().out
    assert from_pretrained(tmp_path / "weights").config.transv
    assert job(["--checkpoint", "/nowhere", "--output", str(tmp_path / "other")]) == 1
    assert "error: there is no committed checkpoint at '/nowhere'" in capsys.readouterr().err
    assert job(["--config", str(tmp_path / "train.yaml"), "--output", str(tmp_path / "other"), "name=none"]) == 1
    assert "no committed checkpoint in" in capsys.readouterr().err


def test_resuming_with_another_plan_is_rejected(finished: TrainConfig, corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="was training phase instruct on another pack plan"):
        train_local(train_config(corpus, name="finished", seed=1))


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"packs_per_step": 1}, r"packs_per_step 3 -> 1\)"),
        ({"steps": 5}, r"num_steps 6 -> 5\)"),
        ({"steps": None, "epochs": 1}, r"num_epochs None -> 1\)"),
        ({"schedule": {"warmup_ratio": 0.5}}, r"schedule.warmup_ratio 0.03 -> 0.5\)"),
    ],
)
def test_resuming_with_other_steps_is_rejected(
    finished: TrainConfig, corpus: Corpus, changes: dict[str, Any], difference: str
) -> None:
    config = interrupted_after(finished, corpus, "other-steps", 5)
    values = train_values(corpus, name=config.name)
    values["phases"]["instruct"] |= changes
    with pytest.raises(ValueError, match=rf"phase instruct with other steps \({difference}: a phase may only become"):
        train_local(parse_config(TrainConfig, values))
    shutil.rmtree(RunFolder.of(config).uri)


def test_a_finished_phase_may_be_lengthened(
    finished: TrainConfig, corpus: Corpus, caplog: pytest.LogCaptureFixture
) -> None:
    config = interrupted_after(finished, corpus, "longer", 9)
    values = train_values(corpus, name=config.name)
    values["phases"]["instruct"]["steps"] = 10
    with caplog.at_level(logging.INFO):
        report = train_local(parse_config(TrainConfig, values))
    assert "phase instruct is lengthened from 6 to 10 steps" in caplog.text
    rows = read_metrics(RunFolder.of(config).uri)
    assert [row["attempt"] == 1 for row in rows] == [True] * 9 + [False] * 4
    assert report["instruct"]["steps"] == 10
    assert rows[9]["lr"] != rows[8]["lr"]
    whole = parse_config(TrainConfig, values | {"name": "longer-from-the-start"})
    train_local(whole)
    expected = read_metrics(RunFolder.of(whole).uri)
    names = ("lr", "num_samples", "num_tokens", "num_targets")
    assert [[row[name] for name in names] for row in rows[9:]] == [
        [row[name] for name in names] for row in expected[9:]
    ]


def test_each_attempt_records_configuration_versions_and_commit(finished: TrainConfig) -> None:
    folder = Path(RunFolder.of(finished).uri, "attempts", "attempt-0001")
    assert load_config(TrainConfig, folder / "config.yaml") == finished
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["num_ranks"] == 1
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?", environment["commit"] or "0" * 40)


def test_a_second_run_in_the_same_folder_is_refused(corpus: Corpus) -> None:
    """Before, both trained and removed each other's checkpoints."""
    config = train_config(corpus, name="leased")
    with hold_lease(RunFolder.of(config).uri, "training run leased"):
        with pytest.raises(
            LeaseHeldError, match=r"runs/leased is in use by training run leased of .*process \d+, since"
        ):
            train_local(config)
    assert curve(config) == []


def test_resuming_with_other_trained_parameters_is_rejected(finished: TrainConfig, corpus: Corpus) -> None:
    config = interrupted_after(finished, corpus, "refused", 5)
    values = train_values(corpus, name=config.name)
    values["phases"]["instruct"]["trainable"] = [{"match": "lm_head.*", "lr": 1e-3}]
    with pytest.raises(ValueError, match="cannot change its trainable parameters half-way"):
        train_local(parse_config(TrainConfig, values))


def with_value(corpus: Corpus, path: str, value: Any) -> dict[str, Any]:
    values = copy.deepcopy(train_values(corpus, name="broken"))
    node: Any = values
    *parents, last = path.split(".")
    for parent in parents:
        node = node[parent]
    node[last] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "phases.align.packing.max_token",
            3,
            "unknown key 'phases.align.packing.max_token' (did you mean 'max_tokens'?); the keys here are max_tok",
        ),
        ("phases.align.init", None, "phases.align.init: the first phase needs its initial weights"),
        ("phases.align.steps", None, "a phase needs either steps or epochs"),
        ("phases", {}, "phases: name at least one"),
        ("name", "a/b", "no slash"),
        ("phases.align.init", {"seed": 1}, "init needs weights, a preset or a backbone"),
        ("feature_store", "/nowhere/features", "no feature store at '/nowhere/features'"),
        ("phases.align.samples", [{"uri": "/nowhere.parquet"}], "there are no samples at '/nowhere.parquet'"),
        ("phases.align.trainable", [{"match": "nothing", "lr": 1e-3}], "'nothing' matches no parameter"),
        ("phases.align.init", {"weights": "/nowhere"}, "config.json does not exist"),
    ],
)
def test_invalid_configurations_fail_before_the_first_step(
    corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture, path: str, value: Any, message: str
) -> None:
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(with_value(corpus, path, value), sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "timeviper_platform.training.local.setup_logging", lambda level: None
        )  # it would take caplog's place
        assert main(["--config", str(tmp_path / "train.yaml")]) == 1
    assert message in caplog.text


def test_features_of_another_width_are_rejected(corpus: Corpus, tmp_path: Path) -> None:
    write_store(str(tmp_path / "wide"), {"a": torch.zeros(2, 4, DIM + 1)}, recipe=RECIPE)
    with pytest.raises(ValueError, match="have width 65, the model's projector takes 64"):
        train_local(train_config(corpus, name="wide", feature_store=str(tmp_path / "wide")))


def test_local_paths_become_absolute_and_hub_names_stay(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(corpus.folder)
    config = resolve_paths(
        train_config(corpus, feature_store="features", tokenizer="nvidia/NVIDIA-Nemotron-Nano-9B-v2", runs="s3://a/b")
    )
    assert config.feature_store == corpus.features
    assert config.tokenizer == "nvidia/NVIDIA-Nemotron-Nano-9B-v2"
    assert config.runs == "s3://a/b"
    assert resolve_paths(train_config(corpus, tokenizer="tokenizer")).tokenizer == corpus.tokenizer
