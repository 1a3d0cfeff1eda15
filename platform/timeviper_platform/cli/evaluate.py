"""Scores weights on questions: `timeviper evaluate --config ray_configs/tiny/evaluate.yaml [key=value ...]`.

Answers validation questions with and without their video; writes the report and every outcome.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from timeviper_platform.common.config import load_config
from timeviper_platform.common.job import JobParser, JobResult, run_job
from timeviper_platform.common.ray_cluster import connect
from timeviper_platform.evaluation.report import report_lines
from timeviper_platform.evaluation.run import EvaluateConfig, run_evaluation


def main(arguments: Sequence[str] | None = None) -> int:
    parser = JobParser(
        __doc__,
        config_class=EvaluateConfig,
        config_file="ray_configs/evaluate.yaml",
        override="max_questions=40 weights=outputs/weights",
    )
    return run_job(parser, evaluate, arguments)


def evaluate(options: argparse.Namespace) -> JobResult:
    config = load_config(EvaluateConfig, options.config, options.overrides)
    with connect():
        report = run_evaluation(config)
    return JobResult([*report_lines(report), f"report: {config.output}"])
