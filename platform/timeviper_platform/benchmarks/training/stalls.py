"""Row groups `checkpoint` and `data`: share of a run spent waiting for checkpoints and for features.

Runs train without Ray in their own process. Features come from local disk, and from an S3 server on loopback.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from timeviper_platform.benchmarks.measure import Row
from timeviper_platform.benchmarks.training.s3_server import BUCKET, s3_server
from timeviper_platform.benchmarks.training.synthetic_corpus import (
    DEMO,
    SyntheticCorpus,
    make_films,
    make_mixture,
    run_values,
    training_command,
)
from timeviper_platform.common import storage
from timeviper_platform.common.config import parse_config
from timeviper_platform.data.synthetic.corpus import CorpusConfig
from timeviper_platform.training.config import TrainConfig
from timeviper_platform.training.metrics.writer import read_metrics
from timeviper_platform.training.run import RunFolder

CHECKPOINT_COMMAND = "python jobs/benchmark.py training --only checkpoint"
DATA_COMMAND = "python jobs/benchmark.py training --only data"
SAVE_EVERY = 50

RunJob = Callable[[Path, Mapping[str, str]], None]
"""Runs the training of a YAML file with additional environment variables."""


def run_apart(config: Path, environment: Mapping[str, str]) -> None:
    """Raises RuntimeError if training fails."""
    result = subprocess.run(
        training_command(config), env={**os.environ, **environment}, stdout=subprocess.DEVNULL, check=False
    )
    if result.returncode:
        raise RuntimeError(f"the training of {config} ended with {result.returncode}; its log is above")


def checkpoint_rows(
    config: CorpusConfig = DEMO, *, num_saves: int = 5, every: int = SAVE_EVERY, run: RunJob = run_apart
) -> list[Row]:
    """Share of time lost to saving every 50 steps; median over saves."""
    with tempfile.TemporaryDirectory(prefix="timeviper-benchmark-") as folder:
        corpus = make_mixture(Path(folder), config)
        values = run_values(corpus, {"steps": every * num_saves}, checkpoint={"every_steps": every, "keep": 2})
        metrics = run_and_read(corpus, values, run)
    return checkpoint_stall_rows(metrics, every)


def checkpoint_stall_rows(metrics: Sequence[Mapping[str, Any]], every: int) -> list[Row]:
    """Median share and seconds of saving, over whole intervals of `every` steps."""
    shares, stalls = [], []
    for start in range(0, len(metrics), every):
        interval = metrics[start : start + every]
        stall_s = sum(row["checkpoint_stall_s"] for row in interval)
        stalls.append(stall_s)
        shares.append(stall_s / (stall_s + sum(row["seconds"] for row in interval)))
    step_ms = 1000 * statistics.median(row["seconds"] for row in metrics)
    name = f"share of time lost to checkpoints, saving every {every} steps of {step_ms:.0f} ms"
    return [
        Row(name=name, value=100 * statistics.median(shares), unit="%", bar="<= 2", command=CHECKPOINT_COMMAND),
        Row(name="one save", value=statistics.median(stalls), unit="s", command=CHECKPOINT_COMMAND),
    ]


def data_rows(
    *, num_steps: int = 40, num_films: int = 24, num_frames: int = 256, dim: int = 1152, run: RunJob = run_apart
) -> list[Row]:
    """Share of time waiting for features larger than the cache, from disk and from S3."""
    with tempfile.TemporaryDirectory(prefix="timeviper-benchmark-") as folder:
        corpus = make_films(Path(folder), num_films=num_films, num_frames=num_frames, dim=dim)
        film_bytes = 2 * num_frames * 16 * dim
        phase = {
            "steps": num_steps,
            "packing": {"max_tokens": 16 * num_frames + 100, "max_frames": num_frames},
            "packs_per_step": 1,
        }
        # two films in the cache and four read ahead, so that repeated reads are real
        loader = {"prefetch_bytes": 4 * film_bytes, "cache_bytes": 2 * film_bytes}
        local = run_and_read(corpus, run_values(corpus, phase, name="local", loader=loader), run)
        with s3_server() as environment:
            uri = f"s3://{BUCKET}/features"
            upload(corpus.store, uri, environment)
            values = run_values(corpus, phase, name="s3", loader=loader, feature_store=uri)
            remote = run_and_read(corpus, values, run, environment)
    label = f"{film_bytes / 1e6:.1f} MB of features a step of"
    return [
        *data_stall_rows(local, f"from the local disk, {label}", "<= 2"),
        *data_stall_rows(remote, f"from S3 on loopback, {label}", "<= 5"),
    ]


def run_and_read(
    corpus: SyntheticCorpus, values: dict[str, Any], run: RunJob, environment: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    config = parse_config(TrainConfig, values)
    file = corpus.folder / f"{config.name}.yaml"
    file.write_text(yaml.safe_dump(values))
    run(file, environment or {})
    return read_metrics(RunFolder.of(config).uri)


def upload(folder: str, uri: str, environment: Mapping[str, str]) -> None:
    """Copies a local folder to the S3 server of `environment`."""
    import s3fs

    filesystem = s3fs.S3FileSystem(
        key=environment["AWS_ACCESS_KEY_ID"],
        secret=environment["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        skip_instance_cache=True,
    )
    filesystem.put(f"{folder}/", storage.split_uri(uri)[1] + "/", recursive=True)


def data_stall_rows(metrics: Sequence[Mapping[str, Any]], name: str, bar: str) -> list[Row]:
    """Excludes the first step, which waits for the first read."""
    first, *others = metrics
    waited_s = sum(row["data_wait_share"] * row["seconds"] for row in others)
    share = waited_s / sum(row["seconds"] for row in others)
    step_ms = 1000 * statistics.median(row["seconds"] for row in others)
    first_s = first["data_wait_share"] * first["seconds"]
    name, end = f"waiting for data {name} {step_ms:.0f} ms", name.split(",")[0]
    return [
        Row(name=name, value=100 * share, unit="%", bar=bar, command=DATA_COMMAND),
        Row(name=f"the first step's wait, {end}", value=first_s, unit="s", command=DATA_COMMAND),
    ]
