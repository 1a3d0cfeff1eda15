"""Exports a checkpoint as a weights folder (safetensors, config.json, tokenizer) for evaluation and serving.

python jobs/export.py --checkpoint outputs/runs/tiny/checkpoints/step-00000400 --output outputs/weights/tiny
python jobs/export.py --config ray_configs/tiny/train.yaml --output outputs/weights/tiny    # the run's newest
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from timeviper_platform.common.config import load_config
from timeviper_platform.common.job import USAGE_EXIT_CODE, JobError, JobParser, JobResult, run_job
from timeviper_platform.training.checkpoint.export import export_weights
from timeviper_platform.training.checkpoint.manager import Checkpoints
from timeviper_platform.training.config import TrainConfig
from timeviper_platform.training.run import RunFolder


def main(arguments: Sequence[str] | None = None) -> int:
    parser = JobParser(
        __doc__,
        config_class=TrainConfig,
        config_file="ray_configs/train.yaml: takes its run's newest committed checkpoint",
        override="name=second",
        config_required=False,
    )
    parser.add_argument("--checkpoint", help="URI of a committed checkpoint, instead of --config")
    parser.add_argument("--output", required=True, help="URI of the weights folder; replaced if it exists")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return run_job(parser, export, arguments)


def export(options: argparse.Namespace) -> JobResult:
    if (options.checkpoint is None) == (options.config is None):
        raise JobError("pass either --checkpoint or --config", exit_code=USAGE_EXIT_CODE)
    checkpoint = options.checkpoint or newest_checkpoint(load_config(TrainConfig, options.config, options.overrides))
    export_weights(checkpoint, options.output, dtype=options.dtype)
    return JobResult([f"{checkpoint} -> {options.output}"])


def newest_checkpoint(config: TrainConfig) -> str:
    """The newest committed checkpoint of the configured run.

    Raises:
        ValueError: when there is none.
    """
    folder = RunFolder.of(config).checkpoints
    newest = Checkpoints(folder).newest()
    if newest is None:
        raise ValueError(f"no committed checkpoint in {folder}; run jobs/train.py first")
    return newest


if __name__ == "__main__":
    sys.exit(main())
