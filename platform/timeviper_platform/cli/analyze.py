"""Draws the paper's figures: `timeviper analyze --config ray_configs/tiny/analyze.yaml [key=value ...]`.

Writes each figure as JSON, CSV, SVG and PNG. One process: a task of the cluster in RAY_ADDRESS, else this one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from timeviper_platform.common.config import load_config
from timeviper_platform.common.job import JobParser, JobResult, run_job
from timeviper_platform.evaluation.analyze import AnalyzeConfig, analyze


def main(arguments: Sequence[str] | None = None) -> int:
    parser = JobParser(
        __doc__,
        config_class=AnalyzeConfig,
        config_file="ray_configs/analyze.yaml",
        override="figures=[maps] max_questions=8",
    )
    return run_job(parser, write_figures, arguments)


def write_figures(options: argparse.Namespace) -> JobResult:
    config = load_config(AnalyzeConfig, options.config, options.overrides)
    return JobResult([f"written    {uri}" for uri in analyze(config)])
