"""Checkpoint -> weights folder (safetensors, config.json, tokenizer) for evaluation and serving.

python jobs/export.py --checkpoint outputs/runs/tiny/checkpoints/step-00000400 --output outputs/weights/tiny
python jobs/export.py --config ray_configs/tiny/train.yaml --output outputs/weights/tiny    # the run's newest
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from timeviper_platform.common.config import load_config, setup_logging
from timeviper_platform.training.checkpoint.export import export_weights
from timeviper_platform.training.checkpoint.manager import Checkpoints
from timeviper_platform.training.config import TrainConfig
from timeviper_platform.training.run import RunFolder


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the job; the exit code."""
    parser = argparse.ArgumentParser(description="Export a checkpoint's weights.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", help="URI of a committed checkpoint")
    source.add_argument("--config", help="a training configuration: its run's newest committed checkpoint")
    parser.add_argument("--output", required=True, help="URI of the weights folder; replaced where it exists")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration")
    parsed = parser.parse_args(arguments)
    setup_logging()
    try:
        checkpoint = parsed.checkpoint or newest_checkpoint(load_config(TrainConfig, parsed.config, parsed.overrides))
        export_weights(checkpoint, parsed.output, dtype=parsed.dtype)
    except (ValueError, RuntimeError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    print(f"{checkpoint} -> {parsed.output}")
    return 0


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
