"""Sends metrics to MLflow and Weights & Biases, imported only when configured."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from timeviper_platform.common.storage import shown_text

logger = logging.getLogger(__name__)

STEP = "global_step"
"""x axis of all W&B charts."""

MIN_PAUSE_S = 30.0
"""Minimum seconds between two attempts to reach a tracker that fails."""

MAX_STALL_SHARE = 0.02
"""Maximum share of the time that a failing tracker may take."""


class Tracker(Protocol):
    def log(self, scalars: Mapping[str, float], global_step: int) -> None:
        """Records a step's metrics, keyed by `phase/name`."""

    def close(self) -> None:
        """Ends this attempt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MlflowConfig:
    tracking_uri: str
    experiment: str = "timeviper"


@dataclass(frozen=True, kw_only=True, slots=True)
class WandbConfig:
    """Weights & Biases project. The key is read from WANDB_API_KEY."""

    project: str
    mode: str = "online"
    """W&B's mode; `offline` writes a folder to upload later."""


class MlflowTracker:
    def __init__(self, config: MlflowConfig, run_name: str) -> None:
        self._mlflow: Any = importlib.import_module("mlflow")
        self._mlflow.set_tracking_uri(config.tracking_uri)
        experiment = self._mlflow.set_experiment(config.experiment)
        query = f"attributes.run_name = '{run_name}'"
        found = self._mlflow.search_runs([experiment.experiment_id], query, output_format="list", max_results=1)
        resumed = {"run_id": found[0].info.run_id} if found else {"run_name": run_name}
        self._mlflow.start_run(**resumed)

    def log(self, scalars: Mapping[str, float], global_step: int) -> None:
        self._mlflow.log_metrics({_mlflow_name(name): value for name, value in scalars.items()}, step=global_step)

    def close(self) -> None:
        self._mlflow.end_run()


class WandbTracker:
    def __init__(self, config: WandbConfig, run_name: str) -> None:
        library: Any = importlib.import_module("wandb")
        self._run = library.init(project=config.project, name=run_name, id=run_name, resume="allow", mode=config.mode)
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)

    def log(self, scalars: Mapping[str, float], global_step: int) -> None:
        """Sends the step as a metric, because W&B drops late values of earlier steps."""
        self._run.log({**scalars, STEP: global_step})

    def close(self) -> None:
        self._run.finish()


class TolerantTracker:
    """A tracker whose errors are logged: its server may restart while a run of days goes on.

    Steps that it misses are in the run's own metrics.
    """

    def __init__(self, tracker: Tracker, *, min_pause_s: float = MIN_PAUSE_S) -> None:
        self._tracker, self._min_pause_s = tracker, min_pause_s
        self._name = type(tracker).__name__.strip("_")
        self._num_missed = 0
        self._next_try = 0.0

    def log(self, scalars: Mapping[str, float], global_step: int) -> None:
        started = time.monotonic()
        if started < self._next_try:
            self._num_missed += 1
            return
        try:
            self._tracker.log(scalars, global_step)
        except Exception as error:  # noqa: BLE001 - libraries share no base class
            now = time.monotonic()
            self._next_try = now + max(self._min_pause_s, (now - started) / MAX_STALL_SHARE)
            self._num_missed += 1
            logger.warning(
                "%s: step %d is not recorded, training goes on; next attempt in %.0f s: %s",
                *(self._name, global_step, self._next_try - now, shown_text(str(error)) or type(error).__name__),
            )
            return
        if self._num_missed:
            logger.warning("%s: answers again; it lacks %d rows, see the run's metrics", self._name, self._num_missed)
            self._num_missed = 0

    def close(self) -> None:
        try:
            self._tracker.close()
        except Exception as error:  # noqa: BLE001 - as above
            logger.warning("%s: not closed: %s", self._name, shown_text(str(error)) or type(error).__name__)


def check_trackers(mlflow: MlflowConfig | None, wandb: WandbConfig | None) -> None:
    """Raises ValueError when a configured library is not installed. Imports none."""
    for name, config in (("mlflow", mlflow), ("wandb", wandb)):
        if config is not None and not sys.modules.get(name) and importlib.util.find_spec(name) is None:
            raise ValueError(f"metrics.{name} is configured but {name} is not installed; pip install {name}")


def open_trackers(mlflow: MlflowConfig | None, wandb: WandbConfig | None, run_name: str) -> list[Tracker]:
    check_trackers(mlflow, wandb)
    trackers: list[Tracker] = []
    if mlflow is not None:
        trackers.append(MlflowTracker(mlflow, run_name))
    if wandb is not None:
        trackers.append(WandbTracker(wandb, run_name))
    return trackers


def _mlflow_name(name: str) -> str:
    return "".join(char if char.isalnum() or char in "_-. /" else "_" for char in name)
