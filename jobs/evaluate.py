"""Weights to scores: `python jobs/evaluate.py --config ray_configs/tiny/evaluate.yaml [key=value ...]`.

Asks held-out questions with their video and without it, and writes the report beside every question's outcome.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import ray

from timeviper_platform.config import load_config
from timeviper_platform.evaluation.job import EvaluateConfig, run_evaluation
from timeviper_platform.evaluation.report import report_lines
from timeviper_platform.logs import setup_logging


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses, runs, prints; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file, see ray_configs/evaluate.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value, e.g. max_questions=40 weights=outputs/weights")
    options = parser.parse_args(arguments)
    setup_logging()
    try:
        config = load_config(EvaluateConfig, options.config, options.overrides)
        if not ray.is_initialized():  # `ray job submit` sets RAY_ADDRESS; without one, a Ray of this process
            ray.init(address=os.environ.get("RAY_ADDRESS") or "local", log_to_driver=False)
        print("\n".join([*report_lines(run_evaluation(config)), f"report: {config.output}"]))
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
