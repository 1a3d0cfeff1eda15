"""Weights to scores: `python jobs/evaluate.py --config ray_configs/tiny/evaluate.yaml [key=value ...]`.

Asks held-out questions with their video and without it, and writes the report beside every question's outcome.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import ray

from timeviper_platform.common.config import run_command
from timeviper_platform.evaluation.report import report_lines
from timeviper_platform.evaluation.run import EvaluateConfig, run_evaluation


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses, runs, prints; returns the exit code."""
    result = run_command(
        arguments,
        EvaluateConfig,
        evaluate,
        description=__doc__,
        config_file="ray_configs/evaluate.yaml",
        override="max_questions=40 weights=outputs/weights",
    )
    print(result.text, file=sys.stderr if result.exit_code else sys.stdout)
    return result.exit_code


def evaluate(config: EvaluateConfig) -> list[str]:
    """Runs the evaluation on Ray; the report's lines."""
    if not ray.is_initialized():  # `ray job submit` sets RAY_ADDRESS; without one, a Ray of this process
        ray.init(address=os.environ.get("RAY_ADDRESS") or "local", log_to_driver=False)
    return [*report_lines(run_evaluation(config)), f"report: {config.output}"]


if __name__ == "__main__":
    sys.exit(main())
