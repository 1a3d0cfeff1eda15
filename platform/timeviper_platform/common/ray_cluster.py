"""One private Ray on this machine, for the demo and the tests: own ports, own folder, token on, ended by its own id.

Knows how to start `ray start --head --block`, wait for it and end exactly what it started. Other Rays on the
machine are neither seen nor touched.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

PORTS = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-grpc-port", "dashboard-agent-listen-port")

START_SECONDS = 120.0
"""that Ray may take; a few on a quiet machine"""

STARTED = "Ray runtime started."
"""what `ray start` says when its node is registered: before that, drivers find an address and no node"""


def free_port() -> int:
    """A port of the loopback address on which nothing listens now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def make_token(folder: Path) -> Path:
    """A new token in a file of `folder` that only its owner can read."""
    token_file = folder / "token"
    token_file.touch(mode=0o600)
    token_file.write_text(secrets.token_hex(32))
    return token_file


@contextlib.contextmanager
def local_cluster(
    *,
    num_cpus: int,
    object_store_bytes: int = 1_000_000_000,
    with_dashboard: bool = True,
    token_file: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[dict[str, str]]:
    """A running cluster; yields the environment variables that let a child process use it.

    Args:
        num_cpus: logical CPUs that tasks may claim.
        object_store_bytes: size of the shared-memory store.
        with_dashboard: what jobs are submitted to, and what brings workers' output to drivers; both take some
            hundredths of a core even when nobody looks.
        token_file: a file with the cluster's token; None makes one that lives as long as the cluster.
        environment: more variables for Ray's own processes.

    Raises:
        RuntimeError: when Ray does not come up, with the end of its log.
    """
    # Unix sockets limit a path to 107 bytes and Ray adds about 70: hence not below the project's folder
    folder = Path(tempfile.mkdtemp(prefix="tv-ray-", dir="/tmp"))
    token_file = token_file or make_token(folder)
    ports = {name: free_port() for name in PORTS}
    programs = Path(sys.executable).parent
    variables = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_ADDRESS": f"127.0.0.1:{ports['port']}",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports['dashboard-port']}",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's timing of its own event loops, which nobody reads, is a tenth of what its idle processes take
        "RAY_event_stats": "0",
        # glibc gives large blocks back at once and faults their pages in again at every training step; keep them
        "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
        "MALLOC_TRIM_THRESHOLD_": str(8 * 2**30),
        # at the end there is nobody left to drain requests for
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        # Serve kills a proxy that needs longer to start, and on a busy machine its imports alone do
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
    }
    command = [str(programs / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    command += [f"--include-dashboard={with_dashboard}", f"--include-log-monitor={with_dashboard}"]
    command += [f"--num-cpus={num_cpus}", f"--object-store-memory={object_store_bytes}", f"--temp-dir={folder}/ray"]
    log = folder / "start.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **(environment or {}), **variables},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        _wait_until(lambda: STARTED in log.read_text(errors="replace"), "has not started its node", process, log)
        if with_dashboard:
            port = ports["dashboard-port"]
            _wait_until(lambda: _listens(port), f"does not listen on port {port}", process, log)
        yield variables
    finally:
        _end(process)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until(
    is_true: Callable[[], bool],
    fault: str,
    process: subprocess.Popen[bytes],
    log: Path,
    timeout_s: float = START_SECONDS,
) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        if is_true():
            return
        time.sleep(0.2)
    raise RuntimeError(f"Ray {fault}; the end of its log:\n{log.read_text(errors='replace')[-2000:]}")


def _listens(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return True
    except OSError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM lets `ray start --block` end its children; what is left of its session is then killed."""
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def ray_session() -> Iterator[None]:
    """A connection to the Ray of RAY_ADDRESS (`ray job submit` sets it), else to one started here and ended here."""
    if has_cluster():
        with _connection():
            yield
        return
    with local_cluster(num_cpus=os.cpu_count() or 2, with_dashboard=False, token_file=_token_file()) as variables:
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)  # before `import ray`, which reads the authentication mode once
        try:
            with _connection():
                yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


@functools.cache
def _token_file() -> Path:
    """One token for every Ray that this process starts: Ray reads its own once a process."""
    folder = Path(tempfile.mkdtemp(prefix="tv-token-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return make_token(folder)


@contextmanager
def _connection() -> Iterator[None]:
    import ray

    if ray.is_initialized():
        yield
        return
    ray.init(log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def has_cluster() -> bool:
    """True when this process is connected to a Ray, or told where one is."""
    return bool(os.environ.get("RAY_ADDRESS")) or ("ray" in sys.modules and sys.modules["ray"].is_initialized())
