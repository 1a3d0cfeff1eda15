"""A preprocessing run in a child process that a test may kill."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess

from timeviper_platform.data.preprocess.config import PreprocessConfig
from timeviper_platform.data.preprocess.run import run_in_process, run_preprocess


def run(config: PreprocessConfig, environment: Mapping[str, str]) -> None:
    """Runs in this process."""
    os.environ.update(environment)
    run_preprocess(config, run=run_in_process)


def start(config: PreprocessConfig, environment: Mapping[str, str] | None = None) -> BaseProcess:
    """Forks a run from a server that has imported everything, because imports take longer than the work.

    The server keeps the environment of the first test that used it; `environment` holds this test's changes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["reference.killable", "transformers.models.siglip.modeling_siglip"])
    process = context.Process(target=run, args=(config, environment or {}))
    process.start()
    return process


def kill_after(process: BaseProcess, is_due: Callable[[], bool], seconds: float) -> bool:
    """SIGKILLs the process `seconds` after `is_due` returns True; returns False if it had ended before."""
    while process.is_alive() and not is_due():
        time.sleep(0.002)
    time.sleep(seconds)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL
