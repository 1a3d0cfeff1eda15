"""Exports a checkpoint as a weights folder (safetensors, config.json, tokenizer) for evaluation and serving.

Runs as a task of the cluster in RAY_ADDRESS, else in this process.

timeviper export --checkpoint outputs/runs/tiny/checkpoints/step-00000400 --output outputs/weights/tiny
timeviper export --config ray_configs/tiny/train.yaml --output outputs/weights/tiny    # the run's newest
timeviper export --from-public checkpoint-final --preset 9b --output outputs/weights/9b  # TimeViper's own code
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

from timeviper_model.config import PRESETS
from timeviper_platform.common.cluster_checks import refuse_lost_outputs
from timeviper_platform.common.config import absolute_path, load_config
from timeviper_platform.common.job import USAGE_EXIT_CODE, JobError, JobParser, JobResult, run_job
from timeviper_platform.common.ray_task import run_as_task
from timeviper_platform.training.checkpoint.export import (
    FLOAT32_BYTES,
    convert_public_checkpoint,
    export_bytes,
    export_newest,
    export_weights,
    num_parameters,
)
from timeviper_platform.training.checkpoint.manager import Checkpoints
from timeviper_platform.training.config import TrainConfig, resolve_paths
from timeviper_platform.training.run import RunFolder

PROCESS_BYTES = 1 << 30
"""Memory of a process besides its tensors."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = JobParser(
        __doc__,
        config_class=TrainConfig,
        config_file="ray_configs/train.yaml: exports its run's newest committed checkpoint",
        override="name=second",
        config_required=False,
    )
    parser.add_argument("--checkpoint", help="URI of a committed checkpoint, instead of --config")
    parser.add_argument("--from-public", help="file or folder saved by TimeViper's public code, instead")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="vision, TransV and sizes of --from-public")
    parser.add_argument("--tokenizer", help="tokenizer of --from-public: folder or name, by default its folder")
    parser.add_argument("--output", required=True, help="URI of the weights folder; an older one is replaced")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--num-cpus", type=float, default=1.0, help="CPUs of the task on a cluster")
    parser.add_argument("--memory-gb", type=float, help="memory of the task (default: by the number of parameters)")
    return run_job(parser, export, arguments)


def export(options: argparse.Namespace) -> JobResult:
    if [options.checkpoint, options.config, options.from_public].count(None) != 2:
        raise JobError("pass one of --checkpoint, --config and --from-public", exit_code=USAGE_EXIT_CODE)
    if (options.from_public is None) != (options.preset is None) or (options.tokenizer and not options.from_public):
        raise JobError("--from-public needs --preset; these and --tokenizer go together", exit_code=USAGE_EXIT_CODE)
    refuse_lost_outputs({"--output": options.output})
    output, dtype = absolute_path(options.output), options.dtype
    call: Callable[[], str]
    if options.from_public is not None:
        preset, source = PRESETS[options.preset], absolute_path(options.from_public)
        tokenizer = options.tokenizer and absolute_path(options.tokenizer, if_exists=True)
        call = partial(convert_public_checkpoint, source, output, preset=preset, tokenizer=tokenizer, dtype=dtype)
        memory = FLOAT32_BYTES * num_parameters(preset)
    elif options.checkpoint is not None:
        source = absolute_path(options.checkpoint)
        call, memory = partial(export_weights, source, output, dtype=dtype), export_bytes(source)
    else:
        folder = RunFolder.of(resolve_paths(load_config(TrainConfig, options.config, options.overrides))).checkpoints
        newest = Checkpoints(folder).newest()
        call = partial(export_newest, folder, output, dtype=dtype)
        memory = 0 if newest is None else export_bytes(newest)
    memory = memory + PROCESS_BYTES if options.memory_gb is None else round(options.memory_gb * 1e9)
    source = run_as_task(
        call,
        resources={"CPU": options.num_cpus, "memory": memory},
        wanted_by="the export",
        way_out="set --num-cpus and --memory-gb",
        folders={"--output": output.rstrip("/").rpartition("/")[0]},
    )
    return JobResult([f"{source} -> {options.output}"])
