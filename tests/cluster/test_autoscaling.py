"""A run on a cluster that has no node, gets two and gives them back, by Ray's own autoscaler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID as HEAD

from reference.synthetic_media import make_encoder, make_video
from reference.synthetic_store import read_committed
from timeviper_platform.common.ray_cluster import local_cluster

ROOT = Path(__file__).resolve().parents[2]
NUM_CLIPS = 40


def fake_provider(address: str) -> dict[str, Any]:
    """At most two nodes of one CPU, which leave after six idle seconds."""
    return {
        "cluster_name": "fake",
        "provider": {
            "type": "external",  # as Ray's wheel lacks the default values of "fake_multinode"
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": address,
            "head_node_id": HEAD,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "max_workers": 2,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 100.0,
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {"CPU": 1, "object_store_memory": 150_000_000},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 2,
            },
        },
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "cluster_synced_files": [],
        "rsync_exclude": [],
        "rsync_filter": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }


def num_worker_nodes(environment: dict[str, str], timeout_s: float = 180.0) -> int:
    """Nodes that are alive, without the head. Asks again while a busy machine does not answer."""
    token = Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    request = urllib.request.Request(
        f"{environment['RAY_API_SERVER_ADDRESS']}/api/v0/nodes", headers={"Authorization": f"Bearer {token}"}
    )
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                nodes = json.load(answer)["data"]["result"]["result"]
            break
        except OSError:  # also a timeout, and an answer of 5xx
            if time.monotonic() > deadline:
                raise
    return sum(node["state"] == "ALIVE" and not node["is_head_node"] for node in nodes)


def wait_until(is_true: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_cluster_grows_from_no_node_to_two_and_shrinks_again(tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    for number in range(NUM_CLIPS):
        make_video(tmp_path / "media" / f"clip{number:02d}.mp4", range(16))
    values = {
        "input": str(tmp_path / "media"),
        "feature_store": str(tmp_path / "store"),
        "encoder": {"model": str(make_encoder(tmp_path / "encoder")), "num_tokens_per_frame": 4, "merge_heads": 4},
        "execution": {
            "mode": "fused",
            "min_workers": 2,
            "num_workers": 2,
            "cpus_per_worker": 0.9,
            "frames_per_file": 1,
        },
    }
    (tmp_path / "preprocess.yaml").write_text(yaml.safe_dump(values))
    fake = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_raylet_start_wait_time_s": "120",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
    }
    log = tmp_path / "job.log"
    with local_cluster(
        num_cpus=0, object_store_bytes=150_000_000, environment=fake, autoscaling=fake_provider
    ) as environment:
        assert num_worker_nodes(environment) == 0
        with log.open("wb") as output:
            job = subprocess.Popen(
                [sys.executable, str(ROOT / "jobs" / "preprocess.py"), "--config", str(tmp_path / "preprocess.yaml")],
                env={**os.environ, **environment},
                stdout=output,
                stderr=output,
            )
        most = 0
        while job.poll() is None:
            most = max(most, num_worker_nodes(environment))
            time.sleep(0.2)
        assert job.returncode == 0, log.read_text()[-4000:]
        assert most == 2
        wait_until(lambda: num_worker_nodes(environment) == 0, 120)
    ids = read_committed(str(tmp_path / "store"))["segment_id"].to_pylist()
    assert len(ids) == len(set(ids)) == NUM_CLIPS
