"""Training ranks in processes, as a launcher starts them, for tests that kill them."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml

from reference import (
    counted_files,  # noqa: F401 - registers counted://
    fork_server,
)
from timeviper_model import timeviper
from timeviper_model.config import PRESETS
from timeviper_platform.common.ray_cluster import free_port
from timeviper_platform.training import local

TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Ranks:
    """One attempt at a run."""

    processes: list[BaseProcess]
    log: Path

    def kill(self, *ranks: int) -> None:
        """Sends SIGKILL to these ranks, or to all."""
        for rank in ranks or range(len(self.processes)):
            self.processes[rank].kill()

    def wait_until(self, is_due: Callable[[], bool]) -> None:
        """Waits until `is_due` returns True; fails if a rank ends before."""
        deadline = time.monotonic() + TIMEOUT_S
        while not is_due():
            assert all(process.is_alive() for process in self.processes), self.tail()
            assert time.monotonic() < deadline, self.tail()
            time.sleep(0.02)

    def wait(self) -> list[int | None]:
        """Waits for the exit codes; kills the ranks and fails after TIMEOUT_S."""
        deadline = time.monotonic() + TIMEOUT_S
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        if any(process.is_alive() for process in self.processes):
            self.kill()
            raise AssertionError(f"ranks hang:\n{self.tail()}")
        return [process.exitcode for process in self.processes]

    def finish(self) -> None:
        """Waits until every rank has succeeded."""
        assert self.wait() == [0] * len(self.processes), self.tail()

    def tail(self) -> str:
        """The end of the ranks' output."""
        return self.log.read_text()[-3000:]


def start_ranks(
    values: dict[str, Any],
    folder: Path,
    *,
    world_size: int = 2,
    environment: Mapping[str, str] | None = None,
    homes: Sequence[Path] | None = None,
    logit_rows: int | None = None,
) -> Ranks:
    """Starts `world_size` processes that train `values` and write their output to a log in `folder`.

    Args:
        homes: the home folder of each rank, so that `~` is a path that only one of them sees.
        logit_rows: rows of logits at once, as many as a large vocabulary would leave.
    """
    path, log = folder / f"{values['name']}.yaml", folder / f"{values['name']}.log"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    port = free_port()
    processes: list[BaseProcess] = []
    for rank in range(world_size):
        variables = {
            **(environment or {}),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            **({} if homes is None else {"HOME": str(homes[rank])}),
        }
        process = fork_server.context().Process(target=_run, args=(str(path), str(log), variables, logit_rows))
        process.start()
        processes.append(process)
    return Ranks(processes, log)


def _run(config: str, log: str, variables: dict[str, str], logit_rows: int | None) -> None:
    os.environ.update(variables)
    tempfile.tempdir = variables.get("TMPDIR")
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if logit_rows is not None:
        timeviper.LOGITS_ELEMENTS = logit_rows * PRESETS["tiny"].text.vocab_size
    sys.exit(local.main(["--config", config]))
