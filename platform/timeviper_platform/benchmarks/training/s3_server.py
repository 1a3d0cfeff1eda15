"""An S3 server on loopback in its own process. Needs moto, from the extra `dev`."""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
import time
from collections.abc import Iterator

from timeviper_platform.common.ray_cluster import free_port

BUCKET = "benchmark"
START_TIMEOUT_S = 60.0


@contextlib.contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """A server with an empty bucket; yields environment variables that direct s3:// URIs to it.

    Raises:
        RuntimeError: if moto is not installed or does not start.
    """
    if importlib.util.find_spec("moto") is None:
        raise RuntimeError("the S3 server of the benchmarks needs moto: pip install -c constraints.txt '.[dev]'")
    import s3fs

    port = free_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "benchmark",
        "AWS_SECRET_ACCESS_KEY": "benchmark",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    }
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        filesystem = s3fs.S3FileSystem(
            key="benchmark",
            secret="benchmark",
            endpoint_url=environment["AWS_ENDPOINT_URL"],
            skip_instance_cache=True,
        )
        _wait_until_up(filesystem, server)
        yield environment
    finally:
        server.terminate()
        server.wait()


def _wait_until_up(filesystem: object, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            filesystem.mkdir(BUCKET)  # type: ignore[attr-defined]  # s3fs has no types
            return
        except OSError as error:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"moto's S3 server does not answer (exit code {server.returncode})") from error
            time.sleep(0.2)
