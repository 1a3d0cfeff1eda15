"""A private Ray cluster of two nodes on this machine whose processes a test may kill.

The head has room for one worker, the second node for the others. Only processes of these two nodes are killed, by id.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from timeviper_platform.common.ray_cluster import free_port, local_cluster

PORTS = ("dashboard-agent-grpc-port", "dashboard-agent-listen-port", "node-manager-port", "object-manager-port")


class TwoNodes:
    """Both nodes; `environment` connects a child process to them."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self._second = self._start()

    def kill(self, victim: str) -> bool:
        """SIGKILLs the second node's raylet, or a worker of the step with this name; returns False if there is none.

        Ray restarts a dead worker; a dead node is replaced here.
        """
        if victim != "second node":
            return self._kill(self.worker(victim))
        is_killed = self._kill(self._raylet())
        self.end()
        self._second = self._start()
        return is_killed

    def end(self) -> None:
        """Kills the second node's process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._second.pid, signal.SIGKILL)  # the group is its own
        self._second.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        return start_node(self.environment, num_cpus=2)

    def _raylet(self) -> psutil.Process | None:
        """The second node's raylet, waiting until it has started."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if found := _below(self._second.pid, lambda process: process.name() == "raylet"):
                return found[0]
            time.sleep(0.05)
        return None

    def worker(self, step: str) -> psutil.Process | None:
        """A worker of either node that is running the step."""
        found = (_below(raylet.pid, lambda process: step in _title(process)) for raylet in self._raylets())
        return next((processes[0] for processes in found if processes), None)

    def _raylets(self) -> list[psutil.Process]:
        """Raylets with the cluster's port. Ray replaces the address 127.0.0.1 by the machine's own."""
        port = self.environment["RAY_ADDRESS"].rpartition(":")[2]
        address = re.compile(rf"--gcs-address=[0-9.]+:{port}(\s|$)")
        raylets = (process for process in psutil.process_iter(["name"]) if process.info["name"] == "raylet")
        return [process for process in raylets if address.search(_title(process))]

    @staticmethod
    def _kill(process: psutil.Process | None) -> bool:
        if process is None:
            return False
        try:
            process.send_signal(signal.SIGKILL)
            process.wait(timeout=30)
        except psutil.NoSuchProcess:
            return False
        return True


def start_node(environment: dict[str, str], *, num_cpus: int) -> subprocess.Popen[bytes]:
    """Starts another node of a cluster on this machine, in a process group of its own."""
    command = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--node-ip-address=127.0.0.1"]
    command += [f"--address={environment['RAY_ADDRESS']}", f"--num-cpus={num_cpus}", "--object-store-memory=200000000"]
    command += [f"--{name}={free_port()}" for name in PORTS]
    return subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


@contextlib.contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    """Runs the cluster in a context. Dead nodes are detected within seconds."""
    quick = {"RAY_health_check_period_ms": "1000", "RAY_health_check_initial_delay_ms": "1000"}
    with local_cluster(num_cpus=1, object_store_bytes=200_000_000, environment=quick) as environment:
        nodes = TwoNodes(environment)
        try:
            yield nodes
        finally:
            nodes.end()


def _below(pid: int, predicate: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    try:
        return [process for process in psutil.Process(pid).children(recursive=True) if predicate(process)]
    except psutil.NoSuchProcess:  # it ended meanwhile
        return []


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""
