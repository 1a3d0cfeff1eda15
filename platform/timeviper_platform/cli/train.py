"""Trains on Ray: feature store and samples to checkpoints and weights.

    timeviper train --config ray_configs/tiny/train.yaml
    timeviper train --config ray_configs/train.yaml --resume never phases.align.steps=10
    timeviper train --config ray_configs/train.yaml --dry-run      # plan, groups and memory; starts nothing

On SIGTERM a run saves a checkpoint and stops; started again, it resumes. Weights are written to
runs/name/weights/<phase>, the report to runs/name/report.json.
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Sequence
from typing import Any

from timeviper_platform.common.config import load_config
from timeviper_platform.common.job import JobError, JobParser, JobResult, run_job
from timeviper_platform.common.ray_cluster import connect
from timeviper_platform.training.config import TrainConfig
from timeviper_platform.training.dry_run import describe_dry_run, dry_run
from timeviper_platform.training.interrupts import StoppedError
from timeviper_platform.training.ray_trainer import train_on_ray


def main(arguments: Sequence[str] | None = None) -> int:
    parser = JobParser(
        __doc__,
        config_class=TrainConfig,
        config_file="ray_configs/train.yaml",
        override="phases.align.steps=10",
    )
    parser.add_argument("--resume", default="auto", help="auto (default), never, or the URI of a checkpoint")
    parser.add_argument(
        "--dry-run", action="store_true", help="print plan, groups and memory; exit 1 if data are missing"
    )
    return run_job(parser, train, arguments)


def train(options: argparse.Namespace) -> JobResult:
    """Trains, or describes a run. After SIGTERM the exit code is 143, as in a shell."""
    config = load_config(TrainConfig, options.config, options.overrides)
    if options.dry_run:
        result = dry_run(config)
        return JobResult([describe_dry_run(config, result)], exit_code=1 if result.problems else 0)
    try:
        with connect(log_to_driver=True):
            return JobResult(report_lines(train_on_ray(config, resume=options.resume)))
    except StoppedError as error:
        raise JobError(str(error), exit_code=128 + signal.SIGTERM) from error


def report_lines(report: dict[str, Any]) -> list[str]:
    lines = [f"{'phase':<12}{'steps':>8}{'first loss':>12}{'last loss':>12}{'samples':>10}{'rejects':>9}{'seconds':>9}"]
    for name, phase in report.items():
        lines.append(
            f"{name:<12}{phase['steps']:>8}{_loss(phase['loss_first']):>12}{_loss(phase['loss_last']):>12}"
            f"{phase['samples']:>10}{sum(phase['rejects'].values()):>9}{phase['seconds']:>9.1f}"
        )
    return lines


def _loss(value: float | None) -> str:
    """None if the phase ran no step because it continued from its last checkpoint of another run."""
    return "-" if value is None else f"{value:.4f}"
