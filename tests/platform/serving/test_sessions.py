"""The whole application on a Ray: questions about a video meet in one engine replica's cache."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import ray
import torch
from ray import serve

from reference.tiny_serving import CONFIG, make_serving_folders
from timeviper_platform.common.config import parse_config
from timeviper_platform.common.ray_cluster import free_port
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.data.store.writer import write_store
from timeviper_platform.serving.app import ServeConfig, build_application

VIDEOS = [f"video-{number}" for number in range(24)]
pytestmark = [pytest.mark.slow, pytest.mark.cluster]


def application(root: Path) -> Any:
    folders = make_serving_folders(root)
    features = {name: torch.randn(12, 4, CONFIG.vision.hidden_size) for name in VIDEOS}
    write_store(str(root / "videos"), features, recipe=FeatureStore.open(folders.store).recipe)
    two = {"min_replicas": 2, "max_replicas": 2}
    args = {
        "weights": folders.weights,
        "features": {"feature_store": str(root / "videos"), "num_threads": 1},
        "gateway": {"media_root": str(root / "media"), "default_max_tokens": 8, "max_tokens": 64},
        "engine": {"num_threads": 1, "engine": {"prefix_cache_bytes": 2**28, "max_new_tokens": 64}},
        "deployments": {
            "gateway": {"num_cpus": 0.1},
            "features": {"num_cpus": 0.1},
            "engine": {"num_cpus": 0.1, "autoscaling": two},
        },
    }
    return build_application(parse_config(ServeConfig, args, source="args"))


@pytest.fixture
def url(ray_address: str, tmp_path: Path) -> Iterator[str]:
    ray.init(address=ray_address, namespace="serve", logging_level="WARNING")
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(application(tmp_path), name="sessions", route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()


def test_second_questions_about_24_videos_are_read_from_the_cache_of_two_replicas(url: str) -> None:
    def cached_tokens(name: str, text: str) -> int:
        parts = [{"type": "video_url", "video_url": {"url": f"feature://{name}"}}, {"type": "text", "text": text}]
        body = {"model": "timeviper", "messages": [{"role": "user", "content": parts}], "max_tokens": 4}
        response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
        assert response.status_code == 200, response.text
        return int(response.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    for path in ("/health/ready", "/health/ready?deep=1"):
        assert httpx.get(url + path, timeout=60).json() == {"status": "ready", "features": True, "engine": True}
    order = random.Random(0)
    with ThreadPoolExecutor(4) as pool:
        first = list(pool.map(lambda name: cached_tokens(name, "What?"), order.sample(VIDEOS, len(VIDEOS))))
        second = list(pool.map(lambda name: cached_tokens(name, "Why then?"), order.sample(VIDEOS, len(VIDEOS))))
    assert first == [0] * len(VIDEOS)
    assert sum(count > 0 for count in second) >= 0.95 * len(VIDEOS)
