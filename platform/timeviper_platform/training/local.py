"""Training without Ray: `[torchrun --nproc-per-node N -m] timeviper_platform.training.local --config FILE`."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from timeviper_platform.common.config import load_config
from timeviper_platform.common.devices import torch_device
from timeviper_platform.common.job import user_error
from timeviper_platform.common.lease import hold_lease
from timeviper_platform.common.logs import setup_logging
from timeviper_platform.training.checkpoint.manager import resolve_resume
from timeviper_platform.training.config import HANG_TIMEOUT_S, TrainConfig
from timeviper_platform.training.distributed import from_rank_0
from timeviper_platform.training.hooks import RunHooks
from timeviper_platform.training.interrupts import StoppedError, sigterm_interrupts
from timeviper_platform.training.metrics.trackers import check_trackers
from timeviper_platform.training.run import RunFolder, run_training

logger = logging.getLogger(__name__)


def train_local(config: TrainConfig, *, resume: str = "auto") -> dict[str, Any]:
    """Runs `config` as one rank of the launcher's group; returns the report by phase.

    `resume` is auto, never, or a checkpoint's URI.

    Raises:
        LeaseHeldError: if another job trains in the same run folder.
    """
    check_trackers(config.metrics.mlflow, config.metrics.wandb)
    torch.set_num_threads(config.workers.threads_per_worker)
    with (
        process_group(use_gpu=config.workers.use_gpu, timeout_s=config.workers.collective_timeout_s) as device,
        _lease_of_rank_0(config),
        sigterm_interrupts() as interrupts,
    ):
        resume_from = from_rank_0(lambda: resolve_resume(RunFolder.of(config).checkpoints, resume))
        return run_training(config, resume_from=resume_from, device=device, hooks=RunHooks(interrupts=interrupts))


@contextlib.contextmanager
def _lease_of_rank_0(config: TrainConfig) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        from_rank_0(lambda: stack.enter_context(hold_lease(RunFolder.of(config).uri, f"training run {config.name}")))
        yield


@contextlib.contextmanager
def process_group(*, use_gpu: bool, timeout_s: float = HANG_TIMEOUT_S) -> Iterator[torch.device]:
    """Uses an existing group, the launcher's, or a group of one.

    Args:
        timeout_s: maximum seconds of a collective.
    """
    timeout = timedelta(seconds=timeout_s)
    backend = "nccl" if use_gpu else "gloo"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(torch_device(str(device)))
    if dist.is_initialized():
        yield device
        return
    with tempfile.TemporaryDirectory(prefix="timeviper-rendezvous-") as folder, contextlib.ExitStack() as stack:
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            if "LOCAL_RANK" not in os.environ:  # DeepSpeed needs it; other libraries take it for a launcher's
                os.environ["LOCAL_RANK"] = "0"
                stack.callback(os.environ.pop, "LOCAL_RANK", None)
            where = f"file://{Path(folder) / 'group'}"
            dist.init_process_group(backend, init_method=where, rank=0, world_size=1, timeout=timeout)
        try:
            yield device
        finally:
            _destroy_group()


def _destroy_group() -> None:
    comm = sys.modules.get("deepspeed.comm")
    if comm is not None and comm.is_initialized():
        comm.destroy_process_group()  # DeepSpeed keeps groups of its own, and would use them in the next one
    else:
        dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 on success, 1 on failure, 143 after SIGTERM."""
    parser = argparse.ArgumentParser(description="Train without Ray: one process per rank.")
    parser.add_argument("--config", required=True)
    parser.add_argument("--resume", default="auto", help="auto, never, or the URI of a checkpoint")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parsed = parser.parse_args(arguments)
    setup_logging(logging.WARNING)
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("timeviper_platform").setLevel(logging.INFO)
    try:
        report = train_local(load_config(TrainConfig, parsed.config, parsed.overrides), resume=parsed.resume)
    except StoppedError as error:
        logger.warning("%s", error)
        return 128 + signal.SIGTERM  # the shell's convention
    except Exception as error:  # user errors are one line, all others are raised again
        if (message := user_error(error)) is None:
            raise
        logger.error("%s", message)
        return 1
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
