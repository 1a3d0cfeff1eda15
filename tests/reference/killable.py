"""A preprocessing run in a process of its own that a test may kill."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess

from timeviper_platform.data.preprocess.run import PreprocessConfig, run_in_process, run_preprocess


def run(config: PreprocessConfig, environment: Mapping[str, str]) -> None:
    """All in this process."""
    os.environ.update(environment)
    run_preprocess(config, run=run_in_process)


def start(config: PreprocessConfig, environment: Mapping[str, str] | None = None) -> BaseProcess:
    """The run, forked from a server that has imported everything: imports would take longer than the work.

    The server's own environment is that of the first test that needed it; a test's changes are given here.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["reference.killable", "transformers.models.siglip.modeling_siglip"])
    process = context.Process(target=run, args=(config, environment or {}))
    process.start()
    return process


def kill_after(process: BaseProcess, is_due: Callable[[], bool], seconds: float) -> bool:
    """SIGKILLs the process so long after `is_due` says yes; False when it had ended before."""
    while process.is_alive() and not is_due():
        time.sleep(0.002)
    time.sleep(seconds)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL
