"""A Ray whose nodes are as apart as machines: each sees a /tmp and processes of its own and can be killed whole.

A node is a raylet in a mount and a PID namespace (`unshare`), so it needs root on Linux. The head offers no CPUs, as on
a real cluster. What nodes share is the network, /dev/shm, and the folders of the code.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from timeviper_platform.common.ray_cluster import free_port, local_cluster, make_token

ROOT = Path(__file__).resolve().parents[2]
PORTS = ("dashboard-agent-grpc-port", "dashboard-agent-listen-port", "node-manager-port", "object-manager-port")
START_SECONDS = 120.0

_NAMESPACE = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child=KILL"]

_PRIVATE_TMP = """
set -e
mount -t tmpfs tmpfs /mnt
mkdir /mnt/tmp
mount --rbind /tmp /mnt/tmp
mount -t tmpfs -o mode=1777 tmpfs /tmp
while [ "$1" != -- ]; do
    case "$1" in /tmp/*) mkdir -p "$1"; mount --bind "/mnt$1" "$1";; esac
    shift
done
shift
exec "$@"
"""
"""Arguments: folders that stay visible below a new /tmp, `--`, the command."""


@functools.cache
def can_isolate() -> bool:
    """Whether this user may make namespaces with mounts."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    return subprocess.run([*_NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode == 0


class Node:
    """A machine of the cluster."""

    def __init__(self, environment: Mapping[str, str], *, num_cpus: float, log: Path) -> None:
        token = Path(environment["RAY_AUTH_TOKEN_PATH"]).parent
        command = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--node-ip-address=127.0.0.1"]
        command += [f"--address={environment['RAY_ADDRESS']}", f"--num-cpus={num_cpus:g}"]
        command += ["--object-store-memory=150000000", *(f"--{name}={free_port()}" for name in PORTS)]
        shared = {str(folder) for folder in (ROOT, sys.prefix, sys.base_prefix, token)}
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*_NAMESPACE, "bash", "-c", _PRIVATE_TMP, "node", *shared, "--", *command],
                cwd="/",
                env={**os.environ, **environment},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while "Ray runtime started." not in log.read_text(errors="replace"):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"the node does not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILLs every process of the node, as when a machine is lost."""
        self._process.kill()
        self._process.wait()


class Nodes:
    """The cluster. `environment` connects a child process to it."""

    def __init__(self, environment: Mapping[str, str], folder: Path) -> None:
        self.environment = dict(environment)
        self._folder = folder
        self._alive: list[Node] = []
        self._num_started = 0

    def add(self, *, num_cpus: float = 1) -> Node:
        self._num_started += 1
        log = self._folder / f"node{self._num_started}.log"
        self._alive.append(Node(self.environment, num_cpus=num_cpus, log=log))
        return self._alive[-1]

    def kill_one(self) -> None:
        """Kills the newest node."""
        self._alive.pop().kill()

    def kill_all(self) -> None:
        while self._alive:
            self.kill_one()


@contextlib.contextmanager
def isolated_nodes(
    folder: Path, num_nodes: int = 2, *, environment: Mapping[str, str], num_cpus: float = 1
) -> Iterator[Nodes]:
    """Runs a head without CPUs and `num_nodes` nodes; `environment` is set in all processes of Ray."""
    quick = {"RAY_health_check_period_ms": "1000", "RAY_health_check_initial_delay_ms": "1000"}
    quick["RAY_raylet_start_wait_time_s"] = f"{START_SECONDS:.0f}"  # Ray's 30 s are short where cores are shared
    (folder / "token").mkdir()
    token = make_token(folder / "token")
    settings = {**quick, **environment}
    with local_cluster(
        num_cpus=0, object_store_bytes=150_000_000, token_file=token, environment=settings
    ) as connection:
        nodes = Nodes({**settings, **connection}, folder)
        try:
            for _ in range(num_nodes):
                nodes.add(num_cpus=num_cpus)
            yield nodes
        finally:
            nodes.kill_all()
