"""The Ray Train adapter on the shared cluster: two workers, a lost one, and going on where a run stopped."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import pytest
import yaml

from reference.training_corpus import make_corpus, train_values
from timeviper_platform.training.checkpoint import Checkpoints
from timeviper_platform.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.cluster
def test_two_workers_train_and_a_stopped_run_goes_on(
    tmp_path: Path, ray_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = make_corpus(tmp_path)
    values = train_values(corpus, workers={"num_workers": 2, "resources_per_worker": {"CPU": 0.5}})
    values["checkpoint"]["every_steps"] = 3
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    train = runpy.run_path(str(ROOT / "jobs" / "train.py"))["main"]

    assert train(["--config", str(tmp_path / "train.yaml"), "--resume", "never"]) == 0
    shown = capsys.readouterr().out
    assert "instruct           6" in shown
    run = tmp_path / "runs" / "run"
    whole = read_metrics(str(run))
    assert [row["global_step"] for row in whole] == list(range(1, 10))

    # as a kill after the checkpoint at step 6 leaves it
    shutil.rmtree(Checkpoints(str(run / "checkpoints")).committed()[-1])
    shutil.rmtree(run / "weights" / "instruct")
    assert train(["--config", str(tmp_path / "train.yaml")]) == 0
    again = read_metrics(str(run))
    assert [row["attempt"] for row in again] == [1] * 6 + [2] * 3
    assert [row["loss"] for row in again] == [row["loss"] for row in whole]
    assert (run / "weights" / "instruct" / "config.json").is_file()

    assert train(["--config", str(tmp_path / "train.yaml"), "--resume", "never"]) == 1
    assert "--resume never, but" in capsys.readouterr().err


@pytest.mark.cluster
def test_a_run_that_cannot_work_fails_once_with_its_cause(
    tmp_path: Path, ray_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    values = train_values(make_corpus(tmp_path), feature_store="/nowhere/features")
    values["workers"] = {"num_workers": 1, "resources_per_worker": {"CPU": 0.5}}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    train = runpy.run_path(str(ROOT / "jobs" / "train.py"))["main"]
    assert train(["--config", str(tmp_path / "train.yaml")]) == 1
    assert capsys.readouterr().err.endswith(
        "train: no feature store at '/nowhere/features'; run jobs/preprocess.py with output: /nowhere/features\n"
    )
