"""Services that keep the curves of many runs: MLflow and Weights & Biases, each only where it is configured.

Knows how to open a run there and hand it numbers; neither library is imported, or needed, unless its section is in the
configuration. A resumed run goes on under the same name.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

STEP = "global_step"
"""W&B's axis of all charts"""


class Tracker(Protocol):
    """Who is told of every step; used by rank 0 alone."""

    def log(self, scalars: Mapping[str, float], global_step: int) -> None:
        """The numbers of a step, by `phase/name`."""

    def close(self) -> None:
        """No more steps come from this attempt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MlflowConfig:
    """An MLflow server or folder."""

    tracking_uri: str
    experiment: str = "timeviper"


@dataclass(frozen=True, kw_only=True, slots=True)
class WandbConfig:
    """A project of Weights & Biases; its key is in WANDB_API_KEY, never in a file."""

    project: str
    mode: str = "online"
    """offline writes a folder to be sent later"""


class MlflowTracker:
    """See Tracker."""

    def __init__(self, config: MlflowConfig, run_name: str) -> None:
        self._mlflow: Any = importlib.import_module("mlflow")
        self._mlflow.set_tracking_uri(config.tracking_uri)
        experiment = self._mlflow.set_experiment(config.experiment)
        named = f"attributes.run_name = '{run_name}'"
        found = self._mlflow.search_runs([experiment.experiment_id], named, output_format="list", max_results=1)
        resumed = {"run_id": found[0].info.run_id} if found else {"run_name": run_name}
        self._mlflow.start_run(**resumed)

    def log(self, scalars: Mapping[str, float], global_step: int) -> None:
        """See Tracker."""
        self._mlflow.log_metrics({_mlflow_name(name): value for name, value in scalars.items()}, step=global_step)

    def close(self) -> None:
        """See Tracker."""
        self._mlflow.end_run()


class WandbTracker:
    """See Tracker."""

    def __init__(self, config: WandbConfig, run_name: str) -> None:
        library: Any = importlib.import_module("wandb")
        self._run = library.init(project=config.project, name=run_name, id=run_name, resume="allow", mode=config.mode)
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)

    def log(self, scalars: Mapping[str, float], global_step: int) -> None:
        """See Tracker. W&B drops what comes for an earlier step than its last, as a look at held-out samples does, but
        not where the step is one of the numbers."""
        self._run.log({**scalars, STEP: global_step})

    def close(self) -> None:
        """See Tracker."""
        self._run.finish()


def check_trackers(mlflow: MlflowConfig | None, wandb: WandbConfig | None) -> None:
    """Looks for the libraries of the configured ones without importing them; rank 0 alone opens them, later.

    Raises:
        ValueError: when one is not installed.
    """
    for name, config in (("mlflow", mlflow), ("wandb", wandb)):
        if config is not None and not sys.modules.get(name) and importlib.util.find_spec(name) is None:
            raise ValueError(f"metrics.{name} is configured but {name} is not installed; pip install {name}")


def open_trackers(mlflow: MlflowConfig | None, wandb: WandbConfig | None, run_name: str) -> list[Tracker]:
    """The configured ones.

    Raises:
        ValueError: see `check_trackers`.
    """
    check_trackers(mlflow, wandb)
    trackers: list[Tracker] = []
    if mlflow is not None:
        trackers.append(MlflowTracker(mlflow, run_name))
    if wandb is not None:
        trackers.append(WandbTracker(wandb, run_name))
    return trackers


def _mlflow_name(name: str) -> str:
    """MLflow takes letters, digits, _ - . space and / alone; groups are named by regular expressions."""
    return "".join(letter if letter.isalnum() or letter in "_-. /" else "_" for letter in name)
