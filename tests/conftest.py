"""What all tests share: the path to tests/reference, no network, and one local Ray cluster for the marked ones."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
sys.path.insert(0, str(TESTS))

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("OMP_NUM_THREADS", "2")

_LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")


@pytest.fixture(autouse=True)
def _loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that opens a connection to another machine fails, whether or not that machine would answer."""
    connect = socket.socket.connect
    own_addresses = {item[4][0] for item in _own_addresses()}

    def guarded(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else ""
        if isinstance(host, str) and host and not host.startswith(_LOOPBACK) and host not in own_addresses:
            raise RuntimeError(f"a test tried to connect to {address}: only loopback is allowed")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


def _own_addresses() -> list[tuple[object, ...]]:
    with contextlib.suppress(OSError):
        return list(socket.getaddrinfo(socket.gethostname(), None))
    return []


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """One Ray for the whole run, with token authentication on; yields the environment a client needs."""
    ports = {name: str(free_port()) for name in ("gcs", "dashboard", "client", "agent_grpc", "agent_http", "metrics")}
    # Ray's sockets have path limits, so its folder is short
    folder = Path(f"/tmp/tv-ray-{os.getpid()}")
    token = tmp_path_factory.mktemp("ray") / "token"
    token.write_text("test-token-for-a-loopback-cluster-only-0123456789abcdef")
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ADDRESS": f"127.0.0.1:{ports['gcs']}",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports['dashboard']}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    command += [f"--port={ports['gcs']}", f"--dashboard-port={ports['dashboard']}", "--num-cpus=4"]
    command += [f"--ray-client-server-port={ports['client']}", f"--dashboard-agent-grpc-port={ports['agent_grpc']}"]
    command += [f"--dashboard-agent-listen-port={ports['agent_http']}", f"--metrics-export-port={ports['metrics']}"]
    command += [f"--temp-dir={folder}", "--object-store-memory=1000000000", "--disable-usage-stats"]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")}
    log = tmp_path_factory.mktemp("ray-log") / "ray.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env={**inherited, **environment}, stdout=output, stderr=output, start_new_session=True
        )
        try:
            _wait_for_port(int(ports["gcs"]), process, log)
            _wait_for_port(int(ports["dashboard"]), process, log)
            yield environment
        finally:
            _stop(process)


@pytest.fixture
def ray_address(ray_cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The shared cluster's address; RAY_ADDRESS and the token are set for this test, `ray.init()` finds it."""
    for name, value in ray_cluster.items():
        monkeypatch.setenv(name, value)
    yield ray_cluster["RAY_ADDRESS"]
    import ray

    ray.shutdown()


def _wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return
        time.sleep(0.2)
    raise RuntimeError(f"Ray did not listen on port {port}:\n{log.read_text()[-2000:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the cluster's own session of processes: `ray start --block` ends its children on SIGTERM."""
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=15)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
