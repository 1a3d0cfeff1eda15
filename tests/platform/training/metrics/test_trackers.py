"""Who is told of the steps: only what is configured, never imported otherwise; the picture; the held-out loss."""

from __future__ import annotations

import subprocess
import sys
import types
import xml.etree.ElementTree as ET
from collections.abc import Callable
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
from timeviper_platform.training.metrics.charts import draw_curves
from timeviper_platform.training.metrics.trackers import MlflowConfig, WandbConfig, open_trackers
from timeviper_platform.training.metrics.writer import MetricsWriter, read_metrics
from timeviper_platform.training.phase import prepare_phase
from timeviper_platform.training.ray_trainer import train_on_ray
from timeviper_platform.training.run import RunFolder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


class Recorder(types.ModuleType):
    """A library that notes what it is called with."""

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


def test_a_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ValueError, match=r"metrics.mlflow is configured but mlflow is not installed; pip install"):
        open_trackers(MlflowConfig(tracking_uri="file:///nowhere"), None, "run")


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("run", [train_local, train_on_ray])  # the driver looks before it asks Ray for anything
def test_a_library_that_is_not_there_is_named_before_the_run_starts(
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
    with MetricsWriter(str(tmp_path), 1, tensorboard=False, trackers=trackers) as writer:
        writer.write(row)
    expected = {"align/loss": 2.5, r"align/lr/a\..* decay": 0.1}
    assert ("log", ({**expected, "global_step": 7},), {}) in wandb.calls
    assert ("define_metric", ("*",), {"step_metric": "global_step"}) in wandb.calls
    assert ("log_metrics", ({"align/loss": 2.5, "align/lr/a_.._ decay": 0.1},), {"step": 7}) in mlflow.calls
    assert [mlflow.calls[-1][0], wandb.calls[-1][0]] == ["end_run", "finish"]


def test_another_attempt_goes_on_in_mlflows_run_of_the_same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = Recorder("mlflow")
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    for found in ([], [types.SimpleNamespace(info=types.SimpleNamespace(run_id="the first"))]):
        mlflow.found = found
        open_trackers(MlflowConfig(tracking_uri="file:///x"), None, "run")
    started = [keywords for name, _, keywords in mlflow.calls if name == "start_run"]
    assert started == [{"run_name": "run"}, {"run_id": "the first"}]


def test_curves_show_every_phase_and_the_held_out_loss() -> None:
    rows = [
        {"phase": phase, "global_step": step, "loss": 10.0 / step, "tokens_per_second": 100.0 * step}
        for step, phase in enumerate(["align"] * 3 + ["in<struct"] * 3, start=1)
    ]
    rows[5]["validation_loss"] = 3.0
    root = ET.fromstring(draw_curves(rows, "run & more"))
    kinds = [element.tag.rpartition("}")[2] for element in root.iter()]
    assert kinds.count("polyline") == 4  # two charts of two phases
    assert kinds.count("circle") == 1
    first = root.find(".//{*}polyline")
    assert first is not None
    heights = [float(point.split(",")[1]) for point in first.attrib["points"].split()]
    assert heights == sorted(heights)  # a falling loss goes down the picture
    assert draw_curves([], "nothing").startswith("<svg")


@pytest.mark.usefixtures("group_of_one")
def test_the_held_out_loss_is_the_models_on_samples_that_it_never_trains_on(corpus: Corpus) -> None:
    values = train_values(corpus, name="held-out")
    held_out = {"samples": [{"uri": write_validation_samples(corpus)}], "every_steps": 4, "where": "ranks"}
    values["phases"]["instruct"]["validation"] = held_out
    config = parse_config(TrainConfig, values)
    report = train_local(config)
    folder = RunFolder.of(config)
    told = {row["step"]: row["validation_loss"] for row in read_metrics(folder.uri) if "validation_loss" in row}
    assert list(told) == [4, 6]
    assert report["instruct"]["validation_loss"] == told[6]
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
    assert told[6] == pytest.approx(float(expected), rel=1e-5)
