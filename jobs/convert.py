"""Converts annotations to samples: `python jobs/convert.py --config ray_configs/convert.yaml [key=value ...]`.

Reads LLaVA-style JSON, captions, dense captions and temporal grounding; writes the table that training reads. Counts
unusable rows by reason.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from timeviper_platform.common.config import load_config
from timeviper_platform.common.job import JobParser, JobResult, run_job
from timeviper_platform.data.annotations.convert import ConvertConfig, convert


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
    counts = convert(config)
    return JobResult([f"written    {config.output}", *counts.lines()])


if __name__ == "__main__":
    sys.exit(main())
