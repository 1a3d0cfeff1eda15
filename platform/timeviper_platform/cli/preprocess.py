"""Writes features of media: `timeviper preprocess --config ray_configs/tiny/preprocess.yaml [key=value ...]`.

Adds only what the feature store lacks. Broken media are counted, not fatal: the exit code is 0.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from timeviper_platform.common.config import load_config
from timeviper_platform.common.job import JobParser, JobResult, run_job
from timeviper_platform.data.inputs.readers import count_text
from timeviper_platform.data.preprocess.config import PreprocessConfig
from timeviper_platform.data.preprocess.estimate import estimate
from timeviper_platform.data.preprocess.run import run_preprocess


def main(arguments: Sequence[str] | None = None) -> int:
    parser = JobParser(
        __doc__,
        config_class=PreprocessConfig,
        config_file="ray_configs/preprocess.yaml",
        override="input=film.mp4 execution.num_workers=4",
    )
    parser.add_argument("--dry-run", action="store_true", help="plan and estimate without writing anything")
    return run_job(parser, preprocess, arguments)


def preprocess(options: argparse.Namespace) -> JobResult:
    """Writes the feature store, or estimates the cost."""
    config = load_config(PreprocessConfig, options.config, options.overrides)
    if options.dry_run:
        return JobResult(_estimate_lines(config))
    report = run_preprocess(config)
    return JobResult([f"features   {config.resolve_paths().feature_store}", *report.lines()])


def _estimate_lines(config: PreprocessConfig) -> list[str]:
    plan = estimate(config)
    reasons = ", ".join(f"{count} {kind}" for kind, count in sorted(plan.errors_by_type.items()))
    times, costs = [], []
    if plan.seconds is not None and plan.calibration is not None:
        sample = f"{plan.calibration.frames} frames of {plan.calibration.segments} segments, decoded and encoded here"
        times.append(f"about {plan.seconds:.0f} s ({sample})")
        decode, encode = (
            seconds / plan.calibration.frames * 1e3
            for seconds in (plan.calibration.decode_seconds, plan.calibration.encode_seconds)
        )
        costs.append(f"costs      {decode:.1f} ms to decode a frame on one core, {encode:.1f} ms to encode it")
    if plan.seconds_at_last_rate is not None:
        times.append(f"about {plan.seconds_at_last_rate:.0f} s at the rate of the last run")
    return [
        f"media      {plan.media}, of which rejected by their headers: {plan.errors}"
        + (f" = {reasons}" if reasons else ""),
        *([f"left out   {count_text(plan.files_left_out)}, by their names"] if plan.files_left_out else []),
        f"segments   {plan.segments} planned, {plan.segments_missing} to do",
        f"frames     {plan.frames_missing} to do, {plan.feature_bytes / 1e6:.1f} MB of features",
        f"time       {', '.join(times) or 'unknown: no sample could be decoded'}",
        *costs,
    ]
