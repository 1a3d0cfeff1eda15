"""The run under Ray Train: a thin adapter that starts workers, restarts them, and calls the same loop.

Knows Ray. Ray places the workers, brings up torch.distributed and restarts the group after a failure; checkpoints
are ours (COMMIT-marked, in the run's folder), because a checkpoint that Ray was told of is not always there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch
from ray import train
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.util.metrics import Gauge

from timeviper_platform.common import storage
from timeviper_platform.common.logs import setup_logging
from timeviper_platform.training.batches.loader import prefetch_in_thread
from timeviper_platform.training.batches.ray_loader import prefetch_on_ray
from timeviper_platform.training.checkpoint.manager import resolve_resume
from timeviper_platform.training.config import TrainConfig, with_absolute_paths
from timeviper_platform.training.distributed import all_ranks_end, from_rank_0
from timeviper_platform.training.eval_worker import evaluate_checkpoint
from timeviper_platform.training.interrupts import FatalTrainingError, Interrupt, StoppedError, sigterm_interrupts
from timeviper_platform.training.metrics.trackers import check_trackers
from timeviper_platform.training.run import RunFolder, run_training
from timeviper_platform.training.validation.async_eval import EvalTask

logger = logging.getLogger(__name__)

RAY_FOLDER = "ray"
"""Ray Train's own small files inside the run's folder"""
PREEMPTION_CHECK_S = 5.0
"""between questions to Ray whether a node goes away: each is a barrier of milliseconds, and the shortest warnings are
those of half a minute. Steps that take longer are each preceded by one"""
LAST_SAVE_S = 120.0
"""before a node is taken away: what was learnt since the first warning is saved once more"""
SAME_END_S = 60.0
"""within which all ranks find the same mistake, reading samples at their own pace"""
SIGNAL_CHECK_S = 0.2
STOP_FILE = "STOP"
"""in Ray's own folder of this submission: the driver was asked to end the run"""
POINTER_FILE = "checkpoint.json"
"""what Ray stores of a checkpoint: the URI of ours"""


def train_on_ray(config: TrainConfig, *, resume: str = "auto") -> dict[str, Any]:
    """Runs `config` on the connected cluster; the report by phase.

    Args:
        config: the run; local paths in it must be the same folder on every node.
        resume: auto, never, or a checkpoint's URI. After a failure the group resumes by itself in any case.

    Raises:
        ValueError: when the configuration and what it names do not fit together, or `resume` would leave two histories.
        StoppedError: when this process was sent SIGTERM; the workers have saved.
        RuntimeError: when the run fails for good, with the cause.
    """
    check_trackers(config.metrics.mlflow, config.metrics.wandb)
    config = with_absolute_paths(config)
    folder = RunFolder.of(config)
    start = resolve_resume(folder.checkpoints, resume)
    workers = config.workers
    name = f"{config.name}-{os.urandom(4).hex()}"  # a known name would make Ray resume an old run unasked
    stop = storage.join_uri(folder.uri, RAY_FOLDER, name, STOP_FILE)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"config": config, "start": start, "stop": stop},
        torch_config=TorchConfig(backend="nccl" if workers.use_gpu else "gloo"),
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
        with _passing_on_sigterm(stop):
            outcome = trainer.fit().return_value
    except train.TrainingFailedError as error:
        raise RuntimeError(f"run {folder.uri} failed: {_cause(error)}") from error
    if isinstance(outcome, _Ended):
        raise StoppedError(outcome.message) if outcome.is_stopped else ValueError(outcome.message)
    report: dict[str, Any] = outcome
    return report


class _Ended(NamedTuple):
    """How all ranks alike came to their end early, in a way that another attempt would not change."""

    message: str
    is_stopped: bool
    """as asked; else something is wrong with the configuration"""


@contextlib.contextmanager
def _passing_on_sigterm(stop: str) -> Iterator[None]:
    """While this holds, SIGTERM to this process becomes the file `stop`, which the workers look for."""
    if threading.current_thread() is not threading.main_thread():  # where no signal arrives
        yield
        return
    ended = threading.Event()
    with sigterm_interrupts() as interrupts:

        def watch() -> None:
            while not ended.wait(SIGNAL_CHECK_S):
                if interrupts() is Interrupt.STOP:
                    logger.warning("SIGTERM: the workers save and stop")
                    storage.write_bytes(stop, b"")
                    return

        thread = threading.Thread(target=watch, name="sigterm", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _is_there(stop: str) -> bool:
    try:
        return storage.exists(stop)
    except storage.StorageUnavailableError as error:  # asked again in seconds
        logger.warning("nobody knows whether the run is to stop: %s", error)
        return False


def _worker(arguments: dict[str, Any]) -> dict[str, Any] | _Ended:
    """One rank; called again in a new process after a failure. The report, or how all ranks ended early."""
    config: TrainConfig = arguments["config"]
    setup_logging(logging.WARNING)  # what Ray's and DeepSpeed's own modules tell is a page a checkpoint
    if train.get_context().get_world_rank() == 0:
        logging.getLogger("timeviper_platform").setLevel(logging.INFO)
    torch.set_num_threads(config.workers.threads_per_worker)
    checkpoints = RunFolder.of(config).checkpoints
    # what this run has committed since comes before where it started
    resume_from = from_rank_0(lambda: resolve_resume(checkpoints, "auto")) or arguments["start"]
    try:
        return run_training(
            config,
            resume_from=resume_from,
            device=get_device(),
            interrupts=PreemptionWatch(lambda: _is_there(arguments["stop"])),
            on_checkpoint=_report,
            trackers=[_Gauges(config.name)],
            prefetch=prefetch_on_ray if config.loader.reader == "ray_data" else prefetch_in_thread,
            start_eval=_RayEval,
        )
    except (ValueError, FatalTrainingError, StoppedError) as error:
        if not all_ranks_end(SAME_END_S):
            raise  # the others wait for this rank: Ray ends them
        return _Ended(
            str(error), isinstance(error, StoppedError)
        )  # on every rank alike: a further attempt would meet it again


class _RayEval:
    """An EvalHandle as a task on any node that has its resources (see beside.py)."""

    def __init__(self, task: EvalTask) -> None:
        validation = task.config.phases[task.phase].validation
        assert validation is not None
        needs = dict(validation.resources)
        evaluate: Any = ray.remote(evaluate_checkpoint)
        self._ref = evaluate.options(
            num_cpus=needs.pop("CPU", 0), num_gpus=needs.pop("GPU", 0), resources=needs, max_retries=1
        ).remote(task)

    def metrics(self) -> dict[str, float] | None:
        """See EvalHandle."""
        ended, _ = ray.wait([self._ref], timeout=0)
        if not ended:
            return None
        metrics: dict[str, float] = ray.get(self._ref)
        return metrics

    def close(self) -> None:
        """See EvalHandle."""
        ray.cancel(self._ref, force=True)


class _Gauges:
    """The numbers of the last step for Prometheus, which scrapes every Ray node."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Gauge] = {}

    def log(self, scalars: Mapping[str, float], global_step: int) -> None:
        """Sets one gauge a number; the phase and the run are tags."""
        for name, value in {**scalars, "all/global_step": float(global_step)}.items():
            phase, _, metric = name.partition("/")
            gauge = "timeviper_train_" + re.sub(r"\W+", "_", metric).strip("_")
            if gauge not in self._gauges:
                self._gauges[gauge] = Gauge(gauge, description=metric, tag_keys=("run", "phase"))
            self._gauges[gauge].set(value, tags={"run": self._run, "phase": phase})

    def close(self) -> None:
        """Ray takes the gauges away with the worker."""


class PreemptionWatch:
    """A wish to save when Ray hears that a node will be taken away, and once more shortly before it is.

    Ray itself ends the workers then. Every rank must ask Ray before the same steps, and their clocks differ: rank 0
    says what time it is, and after how many steps the next question is due.

    Args:
        is_stop_asked: looked at by rank 0 alone, as often as Ray is asked.
    """

    def __init__(self, is_stop_asked: Callable[[], bool] = lambda: False) -> None:
        self._is_stop_asked = is_stop_asked
        self._interval = 1
        self._num_asked = 0
        self._asked_at = time.monotonic()
        self._warned: set[str] = set()
        self._warned_late: set[str] = set()

    def __call__(self) -> Interrupt:
        """Asked before every step; every so often that is a barrier over all ranks."""
        self._num_asked += 1
        if self._num_asked < self._interval:
            return Interrupt.NONE
        info = train.get_preemption_info()
        self._interval, now, is_stop_asked = from_rank_0(
            lambda: (self._steps_until_next(), time.time(), self._is_stop_asked())
        )
        self._num_asked, self._asked_at = 0, time.monotonic()
        if is_stop_asked:
            return Interrupt.STOP
        return Interrupt.SAVE if info is not None and self._is_news(info, now) else Interrupt.NONE

    def _is_news(self, info: train.PreemptionInfo, now: float) -> bool:
        """True for the first warning of a node, and for the first that is close to its time."""
        left_s = None if info.deadline_ms is None else info.deadline_ms / 1000 - now
        nodes = set(info.preempted_node_ids)
        is_news = not nodes <= self._warned
        self._warned |= nodes
        if left_s is not None and left_s <= LAST_SAVE_S:
            is_news = is_news or not nodes <= self._warned_late
            self._warned_late |= nodes
        if is_news:
            left = "an unknown time" if left_s is None else f"{left_s:.0f} s"
            logger.warning(
                "ranks %s lose their nodes %s in %s: saving now", info.preempted_ranks, info.preempted_node_ids, left
            )
        return is_news

    def _steps_until_next(self) -> int:
        seconds_per_step = (time.monotonic() - self._asked_at) / self._num_asked
        return max(1, int(PREEMPTION_CHECK_S / max(seconds_per_step, 1e-3)))


def _report(uri: str, row: dict[str, Any]) -> None:
    """Tells Ray of a committed checkpoint. Never once a step: the call waits for the controller's next look.

    Ray takes only checkpoints inside its own run folder, so it is given a small file that points to ours.
    """
    metrics = {name: row[name] for name in ("phase", "step", "global_step", "loss")}
    if train.get_context().get_world_rank() != 0:
        train.report(metrics)  # every rank reports, as the call is a barrier; one of them brings the pointer
        return
    with tempfile.TemporaryDirectory(prefix="timeviper-pointer-") as folder:
        Path(folder, POINTER_FILE).write_text(json.dumps({"uri": uri}))
        train.report(metrics, checkpoint=Checkpoint.from_directory(folder))


def _cause(error: BaseException) -> str:
    """The last line of the innermost failure: what the user can act on."""
    failures = getattr(error, "worker_failures", None) or {}
    innermost = next(iter(failures.values()), error)
    lines = [line for line in str(innermost).splitlines() if line.strip()]
    return lines[-1] if lines else type(innermost).__name__
