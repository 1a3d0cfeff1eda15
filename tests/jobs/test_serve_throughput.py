"""The serve job in Ray Serve's throughput mode, whose calls are by value unless their handle says otherwise."""

from __future__ import annotations

import base64
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from ray.util.state import list_objects

from reference.tiny_serving import make_serving_folders, write_video
from timeviper_platform.common.ray_cluster import free_port, local_cluster

ROOT = Path(__file__).resolve().parents[2]
THROUGHPUT = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1"}
pytestmark = [pytest.mark.slow, pytest.mark.cluster]


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The addresses of an endpoint that keeps no features, and of Ray's dashboard."""
    folders, port = make_serving_folders(tmp_path), free_port()
    overrides = [
        f"weights={folders.weights}",
        f"gateway.media_root={tmp_path / 'media'}",
        f"features.feature_store={folders.store}",
        f"features.encoder.model={folders.encoder.model}",
        "features.encoder.encode_batch_frames=4",
        "features.cache_bytes=1",
        "engine.engine.prefix_cache_bytes=0",
    ]
    config = ["--config", "ray_configs/tiny/serve.yaml", "--port", str(port)]
    token_file = Path(os.environ["RAY_AUTH_TOKEN_PATH"])  # Ray reads it once in this process
    with local_cluster(num_cpus=4, token_file=token_file, environment=THROUGHPUT) as cluster:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "jobs" / "serve.py"), *config, *overrides],
            env={**os.environ, **cluster, **THROUGHPUT},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("ready:")
            yield f"http://127.0.0.1:{port}", cluster["RAY_API_SERVER_ADDRESS"]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(90)


def test_large_media_are_read_and_their_features_freed(endpoint: tuple[str, str], tmp_path: Path) -> None:
    """By value, media above 4 MiB were a 500, and every upload's features stayed in the object store."""
    url, dashboard = endpoint
    video = write_video(tmp_path / "a.mp4", seconds=3).read_bytes()

    def ask(padding: int) -> None:
        data = base64.b64encode(video + bytes(padding)).decode()
        part: dict[str, Any] = {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{data}"}}
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]
        body = {"model": "timeviper-tiny", "messages": messages, "max_tokens": 4}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text

    def num_objects() -> int:
        found = list_objects(address=dashboard, limit=10_000, raise_on_missing_output=False)
        return len({entry.object_id for entry in found})

    ask(6 * 2**20)
    before = num_objects()
    for number in range(12):
        ask(number)
    assert num_objects() < before + 10
