"""Exports a checkpoint as a weights folder (safetensors, config.json, tokenizer) for evaluation and serving.

timeviper export --checkpoint outputs/runs/tiny/checkpoints/step-00000400 --output outputs/weights/tiny
timeviper export --config ray_configs/tiny/train.yaml --output outputs/weights/tiny    # the run's newest
timeviper export --from-public checkpoint-final --preset 9b --output outputs/weights/9b  # TimeViper's own code
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from timeviper_model.config import PRESETS
from timeviper_platform.common.config import load_config
from timeviper_platform.common.job import USAGE_EXIT_CODE, JobError, JobParser, JobResult, run_job
from timeviper_platform.training.checkpoint.export import convert_public_checkpoint, export_newest, export_weights
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
    parser.add_argument("--from-public", help="file or folder saved by TimeViper's public code, instead")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="vision, TransV and sizes of --from-public")
    parser.add_argument("--tokenizer", help="tokenizer of --from-public: folder or name, by default its folder")
    parser.add_argument("--output", required=True, help="URI of the weights folder; replaced if it exists")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return run_job(parser, export, arguments)


def export(options: argparse.Namespace) -> JobResult:
    if [options.checkpoint, options.config, options.from_public].count(None) != 2:
        raise JobError("pass one of --checkpoint, --config and --from-public", exit_code=USAGE_EXIT_CODE)
    if (options.from_public is None) != (options.preset is None) or (options.tokenizer and not options.from_public):
        raise JobError("--from-public needs --preset; these and --tokenizer go together", exit_code=USAGE_EXIT_CODE)
    if options.from_public is not None:
        convert_public_checkpoint(
            options.from_public,
            options.output,
            preset=PRESETS[options.preset],
            tokenizer=options.tokenizer,
            dtype=options.dtype,
        )
        return JobResult([f"{options.from_public} -> {options.output}"])
    if options.checkpoint is not None:
        export_weights(options.checkpoint, options.output, dtype=options.dtype)
        return JobResult([f"{options.checkpoint} -> {options.output}"])
    config = load_config(TrainConfig, options.config, options.overrides)
    checkpoint = export_newest(RunFolder.of(config).checkpoints, options.output, dtype=options.dtype)
    return JobResult([f"{checkpoint} -> {options.output}"])
