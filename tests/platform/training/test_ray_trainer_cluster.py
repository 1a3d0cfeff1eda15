"""Ray Train on the shared cluster: two workers, a killed one, SIGTERM, and resuming."""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
import torch
import yaml

from reference.training_corpus import make_corpus, train_values
from timeviper_platform.common.config import parse_config
from timeviper_platform.training.checkpoint.manager import Checkpoints
from timeviper_platform.training.config import TrainConfig
from timeviper_platform.training.eval_worker import evaluate_checkpoint
from timeviper_platform.training.hooks import RunHooks
from timeviper_platform.training.interrupts import Interrupt, StoppedError
from timeviper_platform.training.local import train_local
from timeviper_platform.training.metrics.writer import read_metrics
from timeviper_platform.training.run import run_training
from timeviper_platform.training.validation.async_eval import EvalTask

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
@pytest.mark.cluster
def test_two_workers_take_over_the_run_of_one(
    tmp_path: Path, ray_address: str, group_of_one: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resumes on Ray, with validation by a task, what one rank had trained up to its checkpoint at step 5."""
    corpus = make_corpus(tmp_path)
    values = train_values(corpus, workers={"num_workers": 2, "resources_per_worker": {"CPU": 0.5}})
    train_local(parse_config(TrainConfig, values))
    run = tmp_path / "runs" / "run"
    whole = read_metrics(str(run))
    for checkpoint in (run / "checkpoints").glob("step-*"):
        if int(checkpoint.name[-8:]) > 5:
            shutil.rmtree(checkpoint)
    shutil.rmtree(run / "weights" / "instruct")
    validation = {"samples": [{"uri": corpus.samples}], "every_steps": 3, "resources": {"CPU": 0.1}}
    values["phases"]["instruct"]["validation"] = validation
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    train = runpy.run_path(str(ROOT / "jobs" / "train.py"))["main"]

    assert train(["--config", str(tmp_path / "train.yaml")]) == 0
    assert "instruct           6" in capsys.readouterr().out
    rows = read_metrics(str(run))
    assert [row["attempt"] for row in rows] == [1] * 5 + [2] * 4
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in whole], rel=1e-5)
    losses = {row["global_step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
    assert list(losses) == [6, 9]  # by a task, and by the ranks after the last step
    middle = str(run / "checkpoints" / "step-00000006")
    metrics = evaluate_checkpoint(EvalTask(parse_config(TrainConfig, values), "instruct", middle, 3, 6))
    assert losses[6] == pytest.approx(metrics["validation_loss"], rel=1e-5)
    assert (run / "weights" / "instruct" / "config.json").is_file()

    assert train(["--config", str(tmp_path / "train.yaml"), "--resume", "never"]) == 1
    assert "--resume never, but" in capsys.readouterr().err


def kill_one_worker() -> None:
    """Sends SIGKILL to a training worker of this job."""
    job = ray.get_runtime_context().get_job_id()
    workers = [
        actor["Pid"]
        for actor in ray._private.state.actors().values()
        if actor["JobID"] == job and actor["State"] == "ALIVE" and "TrainWorker" in actor["ActorClassName"]
    ]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(900)  # three processes, two attempts, two cores
@pytest.mark.cluster
def test_a_killed_worker_leaves_no_trace_in_the_curve_and_sigterm_saves_and_stops(
    tmp_path: Path, ray_address: str, group_of_one: None, capsys: pytest.CaptureFixture[str]
) -> None:
    values = train_values(make_corpus(tmp_path), workers={"num_workers": 2, "resources_per_worker": {"CPU": 0.5}})
    init = values["phases"].pop("align")["init"]
    values["phases"]["instruct"] |= {"init": init, "steps": 300}
    values["checkpoint"]["every_steps"] = 5
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    run = str(tmp_path / "runs" / "run")

    def disturb() -> None:
        while len(read_metrics(run)) < 7:
            time.sleep(0.05)
        kill_one_worker()
        while read_metrics(run)[-1]["attempt"] < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        disturbed = pool.submit(disturb)
        train = runpy.run_path(str(ROOT / "jobs" / "train.py"))["main"]
        code = train(["--config", str(tmp_path / "train.yaml")])
        disturbed.result(timeout=0)
    rows = read_metrics(run)
    assert code == 128 + signal.SIGTERM
    assert f"error: stopped on request after step {len(rows)} of phase instruct" in capsys.readouterr().err
    newest = Checkpoints(f"{run}/checkpoints").newest()
    assert newest is not None
    assert int(newest[-8:]) == len(rows) < 300
    assert {row["attempt"] for row in rows} == {1, 2}

    alone = parse_config(TrainConfig, values | {"name": "alone"})
    interrupts = iter([Interrupt.NONE] * len(rows) + [Interrupt.STOP])
    hooks = RunHooks(interrupts=lambda: next(interrupts))
    with pytest.raises(StoppedError):
        run_training(alone, resume_from=None, device=torch.device("cpu"), hooks=hooks)
    expected = [row["loss"] for row in read_metrics(str(tmp_path / "runs" / "alone"))]
    assert [row["loss"] for row in rows] == pytest.approx(expected, rel=1e-5)


@pytest.mark.cluster
def test_a_misconfigured_run_fails_once_with_its_cause(
    tmp_path: Path, ray_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    values = train_values(make_corpus(tmp_path), feature_store="/nowhere/features")
    values["workers"] = {"num_workers": 1, "resources_per_worker": {"CPU": 0.5}}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    train = runpy.run_path(str(ROOT / "jobs" / "train.py"))["main"]
    assert train(["--config", str(tmp_path / "train.yaml")]) == 1
    assert capsys.readouterr().err.endswith(
        "error: no feature store at '/nowhere/features'; run jobs/preprocess.py with feature_store: /nowhere/features\n"
    )


@pytest.mark.cluster
def test_a_run_that_waits_for_resources_ends_within_ten_seconds_of_sigterm(
    tmp_path: Path, ray_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before, it waited until it was killed."""
    values = train_values(make_corpus(tmp_path))
    values["workers"] = {"num_workers": 99, "resources_per_worker": {"CPU": 1}}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    sent = [0.0]

    def stop() -> None:
        while not list((tmp_path / "runs" / "run" / "ray").glob("*")):
            time.sleep(0.05)
        time.sleep(2.0)
        sent[0] = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)

    train = runpy.run_path(str(ROOT / "jobs" / "train.py"))["main"]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(stop)
        assert train(["--config", str(tmp_path / "train.yaml")]) == 128 + signal.SIGTERM
    assert time.monotonic() - sent[0] < 10
    assert "error: stopped on request while no worker was running" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "run" / "LEASE").exists()
