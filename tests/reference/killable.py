"""A preprocessing run in a child process that a test may kill."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess

from reference import fork_server
from timeviper_platform.data.preprocess.config import PreprocessConfig
from timeviper_platform.data.preprocess.run import run_in_process, run_preprocess


def run(config: PreprocessConfig, environment: Mapping[str, str]) -> None:
    """Runs in this process."""
    os.environ.update(environment)
    run_preprocess(config, run=run_in_process)


def start(config: PreprocessConfig, environment: Mapping[str, str] | None = None) -> BaseProcess:
    """Forks a run. `environment`: changes of this test."""
    process = fork_server.context().Process(target=run, args=(config, environment or {}))
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
