"""Converts annotations to samples: `timeviper convert --config ray_configs/convert.yaml [key=value ...]`.

Reads LLaVA rows, messages, captions, dense captions and temporal grounding; writes the table that training reads.
Unusable rows are counted by reason and written to a second file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from timeviper_platform.common.config import load_config
from timeviper_platform.common.job import JobParser, JobResult, run_job
from timeviper_platform.data.annotations.convert import ConvertConfig, convert, rejects_uri


def main(arguments: Sequence[str] | None = None) -> int:
    parser = JobParser(
        __doc__,
        config_class=ConvertConfig,
        config_file="ray_configs/convert.yaml",
        override="format=didemo input=train_data.json",
    )
    return run_job(parser, convert_annotations, arguments)


def convert_annotations(options: argparse.Namespace) -> JobResult:
    config = load_config(ConvertConfig, options.config, options.overrides)
    report = convert(config)
    rejects = [f"rejects    {rejects_uri(config.output)}"] if report.rejects else []
    return JobResult([f"written    {config.output}", *report.lines(), *rejects])
