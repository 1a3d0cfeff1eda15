"""Connects to a Ray cluster, or starts a private one with its own ports, folder and token."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PORTS = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-grpc-port", "dashboard-agent-listen-port")

START_SECONDS = 120.0

STARTED = "Ray runtime started."
"""Printed by `ray start` once its node is registered."""

TIMED_OUT = "timed out during startup"
"""Printed by `ray start` after 30 s."""

START_ATTEMPTS = 2


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def make_token(folder: Path) -> Path:
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
    ray_program: Path | None = None,
    autoscaling: Callable[[str], Mapping[str, object]] | None = None,
) -> Iterator[dict[str, str]]:
    """Runs a cluster; yields the environment variables by which child processes connect.

    Args:
        with_dashboard: needed by `ray job submit`, and for workers' output in drivers.
        token_file: None = a new token.
        ray_program: None = `ray` of this Python environment.
        autoscaling: maps the cluster's address to the configuration of Ray's autoscaler (cloud launcher's format).

    Raises:
        RuntimeError: when Ray does not start, with the end of its log.
    """
    # Unix sockets limit a path to 107 bytes; Ray takes about 70
    folder = Path(tempfile.mkdtemp(prefix="tv-ray-", dir="/tmp"))
    token_file = token_file or make_token(folder)
    ports = {name: free_port() for name in PORTS}
    ray_program = ray_program or Path(sys.executable).parent / "ray"
    variables = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_ADDRESS": f"127.0.0.1:{ports['port']}",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports['dashboard-port']}",
        "RAY_USAGE_STATS_ENABLED": "0",
        # timing event loops takes a tenth of Ray's idle CPU time
        "RAY_event_stats": "0",
        # glibc would return large blocks and fault their pages in again every step
        "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
        "MALLOC_TRIM_THRESHOLD_": str(8 * 2**30),
        # no requests are left to drain
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        # a busy machine's imports exceed the default
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "PATH": f"{ray_program.parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = [str(ray_program), "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    command += [f"--include-dashboard={with_dashboard}", f"--include-log-monitor={with_dashboard}"]
    command += [f"--num-cpus={num_cpus}", f"--object-store-memory={object_store_bytes}", f"--temp-dir={folder}/ray"]
    if autoscaling is not None:
        configuration = folder / "autoscaling.json"
        configuration.write_text(json.dumps(autoscaling(variables["RAY_ADDRESS"])))
        command += [f"--autoscaling-config={configuration}"]
    log = folder / "start.log"
    process: subprocess.Popen[bytes] | None = None
    try:
        process = _start(command, {**os.environ, **(environment or {}), **variables}, log)
        if with_dashboard:
            port = ports["dashboard-port"]
            _wait_until(lambda: _listens(port), f"does not listen on port {port}", process, log)
        yield variables
    finally:
        if process is not None:
            _end(process)
        shutil.rmtree(folder, ignore_errors=True)


def _start(command: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Starts a node, a second time if Ray's fixed 30 s were too short for a busy machine."""
    for attempt in range(START_ATTEMPTS):
        with log.open("wb") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            _wait_until(lambda: STARTED in log.read_text(errors="replace"), "has not started its node", process, log)
            return process
        except BaseException:  # the node must not outlive an interrupt
            _end(process)
            if attempt + 1 == START_ATTEMPTS or TIMED_OUT not in log.read_text(errors="replace"):
                raise
    raise AssertionError("the last attempt returns or raises")


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
    """`ray start` ends its children on SIGTERM."""
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def connect(*, log_to_driver: bool = False, **options: Any) -> Iterator[None]:
    """Connects to the Ray of RAY_ADDRESS, else to a private one that ends with the context.

    Leaves an existing connection open. `options` go to `ray.init`.
    """
    if has_cluster():
        with _connection(log_to_driver=log_to_driver, **options):
            yield
        return
    if "ray" in sys.modules and os.environ.get("RAY_AUTH_MODE") != "token":
        # too late for a token: Ray reads the authentication mode at import
        with _connection(address="local", log_to_driver=log_to_driver, **options):
            yield
        return
    num_cpus = os.cpu_count() or 2
    with local_cluster(num_cpus=num_cpus, with_dashboard=log_to_driver, token_file=_token_file()) as variables:
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            with _connection(log_to_driver=log_to_driver, **options):
                yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


@functools.cache
def _token_file() -> Path:
    """One token per process, because Ray reads it once."""
    folder = Path(tempfile.mkdtemp(prefix="tv-token-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return make_token(folder)


@contextmanager
def _connection(**options: Any) -> Iterator[None]:
    import ray  # reads the authentication mode of the environment once, when it is imported

    if ray.is_initialized():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    ray.init(**options)
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # Ray replaced it
    try:
        yield
    finally:
        ray.shutdown()


def has_cluster() -> bool:
    """Returns whether a Ray is connected or named by RAY_ADDRESS."""
    return bool(os.environ.get("RAY_ADDRESS")) or ("ray" in sys.modules and sys.modules["ray"].is_initialized())


def has_autoscaler() -> bool:
    """Returns whether nodes may be added on demand: by KubeRay, Anyscale or `ray up`. Ray has no API for this."""
    managed = ("KUBERAY_CRD_VER", "KUBERAY_GEN_RAY_START_CMD", "ANYSCALE_CLUSTER_ID")
    return any(name in os.environ for name in managed) or Path("~/ray_bootstrap_config.yaml").expanduser().exists()
