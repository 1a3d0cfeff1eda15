"""Fixtures of all tests: no network beyond loopback, one local Ray cluster, an S3 server."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from timeviper_platform.common.ray_cluster import local_cluster, make_token

sys.path.insert(0, str(Path(__file__).parent))

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
if "PYTEST_XDIST_WORKER" in os.environ:  # overrides the controller's: threads that spin for a shared core are slow
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
# Ray's own value, 15, leaves its workers almost no time beside other tests
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
# before any test module imports Ray, which reads the mode at import and the token at its first connection
_TOKEN_FOLDER = tempfile.TemporaryDirectory(prefix="tv-token-")
_TOKEN_FILE = make_token(Path(_TOKEN_FOLDER.name))
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN_PATH"] = str(_TOKEN_FILE)

# the same examples in every run
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

OTHER_TESTS_NICENESS = 5
"""A third of the time of processes at 0 that compute, too."""

_LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs files with cluster tests first: they take longest, and under `-n` two processes run them all."""
    items.sort(key=lambda item: _ORDER.index(_cluster(item.path)))  # stable: the order inside a file stays


def pytest_make_parametrize_id(val: object) -> str | None:
    """Names long bytes by their number: a file's time inside them would differ between the processes of a run."""
    return f"{len(val)}_bytes" if isinstance(val, bytes) and len(val) > 20 else None


@pytest.hookimpl(optionalhook=True)  # pytest -p no:xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Under `-n`, keeps a file's tests in one process: all files that share a Ray, and all with Rays of their own.

    More than one Ray beside the shared one are too slow for Ray's timeouts on two cores.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return _cluster(config.rootpath / file) or file

    return ByFile(config, log)


_ORDER = ["own Rays", "shared Ray", None]


@functools.cache
def _cluster(file: Path) -> str | None:
    """What its cluster tests use; None without such tests."""
    text = file.read_text()
    if "pytest.mark.cluster" not in text:
        return None
    return "shared Ray" if "ray_cluster:" in text or "ray_address:" in text else "own Rays"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Under `-n`, gives cluster tests the larger share of the cores: the processes that run them end last."""
    if "PYTEST_XDIST_WORKER" in os.environ and _cluster(item.path) is None and os.nice(0) < OTHER_TESTS_NICENESS:
        os.nice(OTHER_TESTS_NICENESS - os.nice(0))


@pytest.fixture(autouse=True)
def _loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that connects to another machine."""
    connect = socket.socket.connect
    own_addresses = _own_addresses()

    def guarded(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else ""
        if isinstance(host, str) and host and not host.startswith(_LOOPBACK) and host not in own_addresses:
            raise RuntimeError(f"a test tried to connect to {address}: only loopback is allowed")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def _no_handler_of_an_earlier_test() -> Iterator[None]:
    """A job's logging writes to the standard error of its own test, which is closed afterwards."""
    yield
    for handler in logging.root.handlers[:]:
        if type(handler) is logging.StreamHandler:
            logging.root.removeHandler(handler)


def _own_addresses() -> set[str]:
    with contextlib.suppress(OSError):
        return {str(item[4][0]) for item in socket.getaddrinfo(socket.gethostname(), None)}
    return set()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[dict[str, str]]:
    """One Ray for the session, with token authentication; yields the environment that a client needs."""
    with local_cluster(num_cpus=4, token_file=_TOKEN_FILE) as environment:
        yield environment


@pytest.fixture
def ray_address(ray_cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The shared cluster's address, also in RAY_ADDRESS for `ray.init()`."""
    for name, value in ray_cluster.items():
        monkeypatch.setenv(name, value)
    yield ray_cluster["RAY_ADDRESS"]
    import ray

    ray.shutdown()


@pytest.fixture
def s3_bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An S3 server on loopback with an empty bucket named `bucket`; yields its file system."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (
        ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required"),
    ):
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    filesystem = s3fs.S3FileSystem()
    filesystem.mkdir("bucket")
    yield filesystem
    filesystem.rm("bucket", recursive=True)  # moto's buckets outlive its server
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()
