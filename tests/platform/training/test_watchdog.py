"""A hanging rank is named: two processes, one of which is stopped or asleep."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from timeviper_platform.common.ray_cluster import free_port
from timeviper_platform.training.watchdog import HANG_EXIT_CODE

RANK = """
import os, signal, sys, time
import torch
import torch.distributed as dist
from timeviper_platform.common.logs import setup_logging
from timeviper_platform.common.ray_cluster import free_port
from timeviper_platform.training.watchdog import Watchdog

setup_logging()
rank = int(sys.argv[1])
store = dist.TCPStore("127.0.0.1", int(sys.argv[3]), 2, is_master=rank == 0)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
with Watchdog(float(sys.argv[4])) as watchdog:
    for step in range(1, 6):
        watchdog.mark(step, "reading")
        if rank == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGSTOP) if sys.argv[2] == "stopped" else time.sleep(1000)
        watchdog.mark(step, "computing")
        dist.all_reduce(torch.ones(1))
"""


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        pytest.param("stopped", "no sign of life from rank 1: the process is stopped", marks=pytest.mark.slow),
        ("asleep", "the others wait for rank 1 at step 3, reading"),
    ],
)
def test_the_rank_that_the_others_wait_for_is_named(tmp_path: Path, kind: str, message: str) -> None:
    port = str(free_port())
    ranks = []
    for rank in (0, 1):
        with (tmp_path / f"rank-{rank}.log").open("wb") as log:
            command = [sys.executable, "-c", RANK, str(rank), kind, port, "3"]
            ranks.append(subprocess.Popen(command, stdout=log, stderr=log))
    try:
        code = ranks[0].wait(timeout=120)
    finally:
        for process in ranks:
            process.send_signal(signal.SIGKILL)
            process.wait()
    logs = (tmp_path / "rank-0.log").read_text() + (tmp_path / "rank-1.log").read_text()
    assert message in logs
    assert code == HANG_EXIT_CODE or "Connection closed" in logs  # the watchdog of rank 1 was faster
