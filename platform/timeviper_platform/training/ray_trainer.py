"""Trains under Ray Train. Checkpoints are the platform's own, because Ray does not always store reported ones."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch
from ray import train
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.util.metrics import Gauge

from timeviper_platform.common import storage
from timeviper_platform.common.cluster_checks import check_every_node, refuse_lost_outputs, storage_proof
from timeviper_platform.common.lease import hold_lease
from timeviper_platform.common.logs import setup_logging
from timeviper_platform.common.ray_task import task_options
from timeviper_platform.training.batches.loader import prefetch_in_thread
from timeviper_platform.training.batches.ray_loader import prefetch_on_ray
from timeviper_platform.training.checkpoint.manager import resolve_resume
from timeviper_platform.training.config import TrainConfig, resolve_paths
from timeviper_platform.training.distributed import all_ranks_end, from_rank_0
from timeviper_platform.training.eval_worker import evaluate_checkpoint
from timeviper_platform.training.hooks import RunHooks
from timeviper_platform.training.interrupts import FatalTrainingError, StoppedError
from timeviper_platform.training.metrics.attempt_record import describe_environment
from timeviper_platform.training.metrics.trackers import check_trackers
from timeviper_platform.training.preflight import check_inputs, check_resources, storage_inputs
from timeviper_platform.training.ray_interrupts import PreemptionWatch, Pulse, StopFile
from timeviper_platform.training.run import RunFolder, run_training
from timeviper_platform.training.validation.async_eval import EvalTask

logger = logging.getLogger(__name__)

RAY_FOLDER = "ray"
STOP_FILE = "STOP"
POINTER_FILE = "checkpoint.json"
"""File that Ray stores; holds the URI of a committed checkpoint."""
ALL_FAIL_TIMEOUT_S = 60.0
"""Seconds within which all ranks report the same mistake."""


def train_on_ray(config: TrainConfig, *, resume: str = "auto") -> dict[str, Any]:
    """Runs `config` on the connected cluster; returns the report by phase.

    Args:
        config: its local paths must be the same folders on every node.
        resume: auto, never, or a checkpoint's URI. Restarts always resume.

    Raises:
        ValueError: if the configuration is wrong, no node can hold a worker, or the run would get two histories.
        LeaseHeldError: if another job trains in the same run folder.
        StoppedError: after SIGTERM, once the workers have saved or if none runs.
        RuntimeError: if a node does not see the run's storage, or the run fails for good.
    """
    check_trackers(config.metrics.mlflow, config.metrics.wandb)
    refuse_lost_outputs({"runs": config.runs})
    config = resolve_paths(config)
    check_resources(config)
    folder = RunFolder.of(config)
    with hold_lease(folder.uri, f"training run {config.name}"):
        start = resolve_resume(folder.checkpoints, resume)
        check_inputs(config, start)
        with storage_proof({"runs": folder.uri}, storage_inputs(config) if start is None else {}) as proof:
            check_every_node(proof)
        return _fit(config, folder, start)


def _fit(config: TrainConfig, folder: RunFolder, start: str | None) -> dict[str, Any]:
    workers = config.workers
    name = f"{config.name}-{os.urandom(4).hex()}"  # Ray silently resumes an old run of a known name
    stop_file = StopFile(storage.join_uri(folder.uri, RAY_FOLDER, name, STOP_FILE))
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "config": config,
            "start": start,
            "stop_file": stop_file,
            "pulse": Pulse(name),
            "environment": describe_environment(),
        },
        torch_config=TorchConfig(
            backend="nccl" if workers.use_gpu else "gloo", timeout_s=math.ceil(workers.collective_timeout_s)
        ),
        scaling_config=ScalingConfig(
            num_workers=workers.num_workers,
            use_gpu=workers.use_gpu,
            resources_per_worker=dict(workers.resources_per_worker),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage.join_uri(folder.uri, RAY_FOLDER),
            failure_config=FailureConfig(
                max_failures=workers.max_failures, preemption_grace_s=workers.preemption_grace_s
            ),
        ),
    )
    try:
        with stop_file.created_on_sigterm(Pulse(name).last):
            outcome = trainer.fit().return_value
    except train.TrainingFailedError as error:
        raise RuntimeError(f"run {folder.uri} failed: {_cause(error)}") from error
    if isinstance(outcome, _EarlyEnd):
        raise StoppedError(outcome.message) if outcome.is_stopped else ValueError(outcome.message)
    report: dict[str, Any] = outcome
    return report


class _EarlyEnd(NamedTuple):
    """An end of all ranks that Ray must not retry."""

    message: str
    is_stopped: bool
    """True after a stop request, False for a wrong configuration."""


def _worker(arguments: dict[str, Any]) -> dict[str, Any] | _EarlyEnd:
    """Runs one rank. After a failure, Ray runs it again in a new process."""
    config: TrainConfig = arguments["config"]
    stop_file: StopFile = arguments["stop_file"]
    setup_logging(logging.WARNING)  # Ray and DeepSpeed log a page per checkpoint
    if train.get_context().get_world_rank() == 0:
        arguments["pulse"].start()
        logging.getLogger("timeviper_platform").setLevel(logging.INFO)
    torch.set_num_threads(config.workers.threads_per_worker)
    checkpoints = RunFolder.of(config).checkpoints
    hooks = RunHooks(
        interrupts=PreemptionWatch(stop_file.exists),
        on_checkpoint=_report,
        trackers=(_Gauges(config.name),),
        prefetch=prefetch_on_ray if config.loader.reader == "ray_data" else prefetch_in_thread,
        start_eval=_RayEval,
        environment=arguments["environment"],
    )
    try:
        # this run's own checkpoints take precedence
        resume_from = from_rank_0(lambda: resolve_resume(checkpoints, "auto")) or arguments["start"]
        return run_training(config, resume_from=resume_from, device=get_device(), hooks=hooks)
    except (ValueError, FatalTrainingError, StoppedError) as error:
        if not all_ranks_end(ALL_FAIL_TIMEOUT_S):
            raise  # the others wait for this rank in a collective: Ray ends and restarts them
        return _EarlyEnd(str(error), isinstance(error, StoppedError))


class _RayEval:
    def __init__(self, task: EvalTask) -> None:
        validation = task.config.phases[task.phase].validation
        assert validation is not None
        evaluate: Any = ray.remote(evaluate_checkpoint)
        self._ref = evaluate.options(**task_options(validation.resources), max_retries=1).remote(task)

    def metrics(self) -> dict[str, float] | None:
        ended, _ = ray.wait([self._ref], timeout=0)
        if not ended:
            return None
        metrics: dict[str, float] = ray.get(self._ref)
        return metrics

    def close(self) -> None:
        ray.cancel(self._ref, force=True)


class _Gauges:
    """Exports the last step's metrics to Prometheus."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Gauge] = {}

    def log(self, scalars: Mapping[str, float], global_step: int) -> None:
        for name, value in {**scalars, "all/global_step": float(global_step)}.items():
            phase, _, metric = name.partition("/")
            gauge = "timeviper_train_" + re.sub(r"\W+", "_", metric).strip("_")
            if gauge not in self._gauges:
                self._gauges[gauge] = Gauge(gauge, description=metric, tag_keys=("run", "phase"))
            self._gauges[gauge].set(value, tags={"run": self._run, "phase": phase})

    def close(self) -> None:
        """Does nothing: Ray removes the gauges with the worker."""


def _report(uri: str, row: dict[str, Any]) -> None:
    metrics = {name: row[name] for name in ("phase", "step", "global_step", "loss")}
    if train.get_context().get_world_rank() != 0:
        train.report(metrics)  # a barrier: every rank must call it
        return
    with tempfile.TemporaryDirectory(prefix="timeviper-pointer-") as folder:
        Path(folder, POINTER_FILE).write_text(json.dumps({"uri": uri}))
        train.report(metrics, checkpoint=Checkpoint.from_directory(folder))


def _cause(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None) or {}
    innermost = next(iter(failures.values()), error)
    lines = [line for line in str(innermost).splitlines() if line.strip()]
    return lines[-1] if lines else type(innermost).__name__
