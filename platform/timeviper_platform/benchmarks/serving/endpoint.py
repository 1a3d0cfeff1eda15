"""Random weights, a feature store and an encoder, and the serve job on a private Ray."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from transformers import SiglipVisionConfig, SiglipVisionModel

from timeviper_model.config import TINY, TimeViperConfig
from timeviper_model.weights.weights_folder import save_pretrained
from timeviper_platform.benchmarks.model.models import make_model
from timeviper_platform.common.job import job_command
from timeviper_platform.common.ray_cluster import free_port, local_cluster
from timeviper_platform.data.encode.frame_encoder import FrameEncoder, VisionTowerConfig
from timeviper_platform.data.store.writer import write_store
from timeviper_platform.data.synthetic.encoder import save_encoder
from timeviper_platform.data.synthetic.tokenizer import train_tokenizer

MODEL = "timeviper"
ENGINE = "engine"
REPLICA = "ray::ServeReplica:timeviper:"
"""Start of the process title of a replica, before its deployment's name."""
ENCODE_BATCH_FRAMES = 32
NUM_SLOTS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingFolders:
    root: Path
    encoder: VisionTowerConfig

    @property
    def weights(self) -> str:
        return str(self.root / "weights")

    @property
    def store(self) -> str:
        return str(self.root / "store")


def make_folders(
    root: Path,
    config: TimeViperConfig = TINY,
    *,
    media: Mapping[str, int],
    encoder_layers: int = 3,
    image_size: int = 64,
) -> ServingFolders:
    """Writes random weights, a random encoder, and a store; `media` gives the random frames of each id."""
    tower = SiglipVisionConfig(
        hidden_size=config.vision.hidden_size,
        intermediate_size=4 * config.vision.hidden_size,
        num_hidden_layers=encoder_layers,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=16,
        vision_use_head=False,
    )
    torch.manual_seed(0)
    save_encoder(SiglipVisionModel(tower).eval(), root / "encoder")
    encoder = VisionTowerConfig(
        model=str(root / "encoder"),
        num_tokens_per_frame=config.vision.num_tokens_per_frame,
        merge_heads=4,
        encode_batch_frames=ENCODE_BATCH_FRAMES,
    )
    built = FrameEncoder(encoder)
    config = replace(config, vision=replace(config.vision, merge_heads=4))
    texts = ["What happens in the video?", "A red circle, then a blue square."]
    tokenizer = train_tokenizer(texts, min(512, config.text.vocab_size))
    model = make_model(config)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.all_special_ids] = 0.0  # greedy answers then have their full length
    save_pretrained(model, root / "weights", tokenizer=tokenizer)
    sizes = built.num_tokens_per_frame, built.dim
    write_store(
        str(root / "store"),
        {name: torch.randn(num_frames, *sizes) for name, num_frames in media.items()},
        recipe=built.recipe,
    )
    return ServingFolders(root=root, encoder=encoder)


def serve_values(folders: ServingFolders, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `args` of the application; `sections` are merged over them."""
    encoder = folders.encoder
    values: dict[str, Any] = {
        "weights": folders.weights,
        "gateway": {
            "model_name": MODEL,
            "media_root": str(folders.root / "media"),
            "default_temperature": 0.0,
            "max_tokens": 1024,
            "max_upload_bytes": 2**30,
            "request_timeout_s": 1200.0,
        },
        "features": {
            "feature_store": folders.store,
            "encoder": {
                "model": encoder.model,
                "num_tokens_per_frame": encoder.num_tokens_per_frame,
                "merge_heads": encoder.merge_heads,
                "encode_batch_frames": encoder.encode_batch_frames,
            },
            "max_frames": 16_384,
            "num_threads": 1,
            "sandbox": {"deadline_s": 600.0},
        },
        "engine": {
            "num_threads": 1,
            "engine": {"num_slots": NUM_SLOTS, "max_prompt_tokens": 2**18, "kv_cache_bytes": 2**31},
        },
        "deployments": {name: {"num_cpus": 0.1} for name in ("gateway", "features", "engine")},
    }
    for name, section in sections.items():
        values[name] = _merged(values[name], section)
    return values


def _merged(values: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for key, value in over.items():
        merged[key] = _merged(merged.get(key, {}), value) if isinstance(value, Mapping) else value
    return merged


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    url: str

    def replicas(self, deployment: str) -> list[psutil.Process]:
        """Returns the replicas of a deployment, oldest first."""
        found = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if " ".join(process.cmdline()).startswith(REPLICA + deployment):
                    found.append(process)
        return sorted(found, key=lambda process: process.create_time())

    def resident_bytes(self) -> int:
        """Memory of the first replica of every deployment."""
        names = ("gateway", "features", ENGINE)
        return sum(self.replicas(name)[0].memory_info().rss for name in names)

    def cpu_seconds(self) -> float:
        """CPU time of every process of the endpoint, its Ray and ended children included."""
        total = 0.0
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
        return total


@contextlib.contextmanager
def serving_endpoint(values: Mapping[str, Any], *, environment: Mapping[str, str] | None = None) -> Iterator[Endpoint]:
    """Runs the serve job until the context ends.

    Args:
        environment: variables of Ray and the job.

    Raises:
        RuntimeError: when it does not start, with the end of its output.
    """
    port = free_port()
    application = {
        "name": "timeviper",
        "route_prefix": "/",
        "import_path": "timeviper_platform.serving.app:build",
        "args": dict(values),
    }
    with (
        tempfile.TemporaryDirectory(prefix="timeviper-serving-") as folder,
        local_cluster(num_cpus=os.cpu_count() or 2, with_dashboard=False, environment=environment) as variables,
    ):
        file, log = Path(folder, "serve.yaml"), Path(folder, "serve.log")
        file.write_text(yaml.safe_dump({"proxy_location": "HeadOnly", "applications": [application]}))
        command = job_command("serve", "--config", str(file), "--port", str(port))
        with log.open("w") as errors:
            process = subprocess.Popen(
                command,
                env={**os.environ, **(environment or {}), **variables},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        try:
            assert process.stdout is not None
            if not process.stdout.readline().startswith("ready:"):
                raise RuntimeError(f"the endpoint did not start:\n{log.read_text()[-3000:]}")
            yield Endpoint(url=f"http://127.0.0.1:{port}")
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.communicate(timeout=90)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
