"""Trackers are opened only when configured; validation loss in the metrics of a run."""

from __future__ import annotations

import subprocess
import sys
import time
import types
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from reference.training_corpus import Corpus, make_corpus, train_values, write_validation_samples
from timeviper_model.weights.weights_folder import from_pretrained, load_tokenizer
from timeviper_platform.common.config import parse_config
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.training.batches.packing import PackPosition
from timeviper_platform.training.config import TrainConfig
from timeviper_platform.training.local import train_local
from timeviper_platform.training.metrics.trackers import MlflowConfig, TolerantTracker, WandbConfig, open_trackers
from timeviper_platform.training.metrics.writer import MetricsWriter, read_metrics
from timeviper_platform.training.phase import prepare_phase
from timeviper_platform.training.ray_trainer import train_on_ray
from timeviper_platform.training.run import RunFolder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


class Recorder(types.ModuleType):
    """A stand-in library that records its calls."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.found: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **keywords: Any) -> Recorder:
            self.calls.append((name, args, keywords))
            return self.found if name == "search_runs" else self

        return call


def test_nothing_is_opened_or_imported_unless_configured() -> None:
    assert open_trackers(None, None, "run") == []
    code = "import sys, timeviper_platform.training.local; print({'mlflow', 'wandb', 'ray'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "set()\n"


def test_a_missing_library_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ValueError, match=r"metrics.mlflow is configured but mlflow is not installed; pip install"):
        open_trackers(MlflowConfig(tracking_uri="file:///nowhere"), None, "run")


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("run", [train_local, train_on_ray])  # the driver checks before it connects to Ray
def test_a_missing_library_is_an_error_before_the_run_starts(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, run: Callable[[TrainConfig], Any]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    values = train_values(corpus, name="no-wandb", metrics={"wandb": {"project": "p"}})
    with pytest.raises(ValueError, match=r"metrics.wandb is configured but wandb is not installed; pip install"):
        run(parse_config(TrainConfig, values))
    assert not Path(values["runs"], "no-wandb").exists()


def test_every_step_reaches_the_configured_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow, wandb = Recorder("mlflow"), Recorder("wandb")
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    trackers = open_trackers(MlflowConfig(tracking_uri="file:///x"), WandbConfig(project="p"), "run")
    row = {"phase": "align", "step": 3, "global_step": 7, "loss": 2.5, "lr": {r"a\..* decay": 0.1}}
    with MetricsWriter(str(tmp_path), 2, tensorboard=False, trackers=trackers) as writer:
        writer.write(row)
    expected = {"align/loss": 2.5, r"align/lr/a\..* decay": 0.1, "align/attempt": 2.0}
    assert ("log", ({**expected, "global_step": 7},), {}) in wandb.calls
    assert ("define_metric", ("*",), {"step_metric": "global_step"}) in wandb.calls
    sent = {"align/loss": 2.5, "align/lr/a_.._ decay": 0.1, "align/attempt": 2.0}
    assert ("log_metrics", (sent,), {"step": 7}) in mlflow.calls
    assert [mlflow.calls[-1][0], wandb.calls[-1][0]] == ["end_run", "finish"]


class Failing:
    """A tracker whose server is away for some calls."""

    def __init__(self) -> None:
        self.is_away = False
        self.steps: list[int] = []
        self.num_calls = 0

    def log(self, scalars: Mapping[str, float], global_step: int) -> None:
        self.num_calls += 1
        if self.is_away:
            raise ConnectionError("https://me:secret@tracker.invalid refused")
        self.steps.append(global_step)

    def close(self) -> None:
        raise ConnectionError("refused")


def test_a_tracker_that_fails_does_not_end_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Failing()
    with MetricsWriter(str(tmp_path), 1, tensorboard=False, trackers=[tracker]) as writer:
        for step in range(1, 6):
            tracker.is_away = step >= 3
            writer.write({"phase": "align", "step": step, "global_step": step, "loss": 1.0})
    assert tracker.steps == [1, 2]
    assert tracker.num_calls == 3, "a server that is away is not waited for in every step"
    assert [row["step"] for row in read_metrics(str(tmp_path))] == [1, 2, 3, 4, 5]
    assert "Failing: step 3 is not recorded, training goes on; next attempt in 30 s" in caplog.text
    assert "Failing: not closed: refused" in caplog.text
    assert "secret" not in caplog.text


def test_a_tracker_that_answers_again_says_what_it_lacks(caplog: pytest.LogCaptureFixture) -> None:
    failing = Failing()
    tracker = TolerantTracker(failing, min_pause_s=0.0)
    for step in range(1, 5):
        failing.is_away = step in (2, 3)
        tracker.log({}, step)
        time.sleep(0.01)
    assert failing.steps == [1, 4]
    assert "Failing: answers again; it lacks 2 rows" in caplog.text


def test_another_attempt_continues_the_mlflow_run_of_the_same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = Recorder("mlflow")
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    for found in ([], [types.SimpleNamespace(info=types.SimpleNamespace(run_id="the first"))]):
        mlflow.found = found
        open_trackers(MlflowConfig(tracking_uri="file:///x"), None, "run")
    started = [keywords for name, _, keywords in mlflow.calls if name == "start_run"]
    assert started == [{"run_name": "run"}, {"run_id": "the first"}]


@pytest.mark.usefixtures("group_of_one")
def test_the_validation_loss_is_the_loss_of_the_model_on_validation_samples(corpus: Corpus) -> None:
    values = train_values(corpus, name="validation", metrics={"tensorboard": False})
    validation = {"samples": [{"uri": write_validation_samples(corpus)}], "every_steps": 4, "where": "ranks"}
    values["phases"]["instruct"]["validation"] = validation
    config = parse_config(TrainConfig, values)
    report = train_local(config)
    folder = RunFolder.of(config)
    losses = {row["step"]: row["validation_loss"] for row in read_metrics(folder.uri) if "validation_loss" in row}
    assert list(losses) == [4, 6]
    assert report["instruct"]["validation_loss"] == losses[6]
    ET.fromstring(Path(folder.uri, "curves.svg").read_text())

    model, store = from_pretrained(folder.weights("instruct")), FeatureStore.open(corpus.features)
    phase = prepare_phase(config, "instruct", model, store, load_tokenizer(corpus.tokenizer), rank=0, world_size=1)
    assert phase.validator is not None
    with torch.no_grad():
        outputs = [
            model(item.batch.to("cpu", torch.float32))
            for step in phase.validator.loader.steps(PackPosition(0, 0), 0, phase.validator.num_steps)
            for item in step.micro_batches
            if not item.is_dummy
        ]
    expected = sum(output.loss_sum for output in outputs) / sum(output.num_targets for output in outputs)
    assert sum(int(output.num_targets) for output in outputs) > 0
    assert losses[6] == pytest.approx(float(expected), rel=1e-5)
