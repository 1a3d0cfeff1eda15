"""Costs of the driver for very many media: finalizing a run, a dry run, and upkeep of a store.

Commit records, plans and manifests are synthetic, with five full segments per medium. Each action runs in its own
process at two sizes, to show its growth.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from timeviper_platform.benchmarks.measure import Measure, Row, cost_elsewhere
from timeviper_platform.benchmarks.store.open_and_read import (
    COMMAND,
    FRAMES_PER_SEGMENT,
    SEGMENTS_PER_MEDIUM,
    synthetic_index_tables,
)
from timeviper_platform.common.schemas import INDEX, MANIFEST, PLAN
from timeviper_platform.data.encode.frame_encoder import VisionTowerConfig
from timeviper_platform.data.preprocess.config import PreprocessConfig
from timeviper_platform.data.preprocess.estimate import estimate
from timeviper_platform.data.preprocess.finalize import finalize_store
from timeviper_platform.data.store.compact import compact
from timeviper_platform.data.store.inspect import inspect_store
from timeviper_platform.data.store.layout import read_plan_file
from timeviper_platform.data.store.verify import verify_store
from timeviper_platform.data.store.writer import StoreWriter
from timeviper_platform.data.synthetic.encoder import save_encoder

NUM_SEGMENTS = 1_000_000
NUM_MEDIA = 1_000_000
NUM_UPKEEP_SEGMENTS = 24_000
SEGMENTS_PER_SMALL_FILE = 8
SEGMENTS_PER_FILE = 128
"""8192 frames: a data file of 302 MB at 16 x 1152."""


def finalize_rows(num_segments: int = NUM_SEGMENTS, measure: Measure = cost_elsewhere) -> list[Row]:
    """Cost of finalizing a quarter of `num_segments`, and all."""
    command = f"{COMMAND} --only finalize"
    costs = []
    for count in (num_segments // 4, num_segments):
        with tempfile.TemporaryDirectory() as folder:
            write_synthetic_run(folder, count)
            costs.append(measure(finalize_synthetic_run, folder, count))
    name = f"index, rejects and audit of {num_segments} segments"
    small, large = costs
    per_segment = max(0, large.peak_bytes - small.peak_bytes) / (num_segments - num_segments // 4)
    extrapolated = (large.peak_bytes + per_segment * 9 * num_segments) / 1e6
    return [
        Row(name=name, value=large.seconds, unit="s", command=command),
        Row(name=f"{name}: CPU time", value=large.cpu_seconds, unit="s", command=command),
        Row(name=f"{name}: peak memory", value=large.peak_bytes / 1e6, unit="MB", bar="<= 2000", command=command),
        Row(
            name=f"{name}: peak memory with a quarter of them", value=small.peak_bytes / 1e6, unit="MB", command=command
        ),
        Row(
            name=f"{name}: peak memory extrapolated to ten times as many",
            value=extrapolated,
            unit="MB",
            bar="<= 2000",
            command=command,
        ),
    ]


def upkeep_rows(num_segments: int = NUM_UPKEEP_SEGMENTS, measure: Measure = cost_elsewhere) -> list[Row]:
    """Cost of inspect, verify and compact for a quarter of `num_segments`, and all."""
    command = f"{COMMAND} --only upkeep"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        stores = {count: f"{folder}/{count}" for count in (num_segments // 4, num_segments)}
        for count, store in stores.items():
            write_small_store(store, count)
        for action in (inspect_store, verify_store, compact_small_files):
            small, large = (measure(action, store) for store in stores.values())
            name = f"{action.__name__} of a store of {num_segments} segments"
            rows += [
                Row(name=name, value=large.seconds, unit="s", command=command),
                Row(name=f"{name}: peak memory", value=large.peak_bytes / 1e6, unit="MB", command=command),
                Row(
                    name=f"{name}: peak memory with a quarter of them",
                    value=small.peak_bytes / 1e6,
                    unit="MB",
                    command=command,
                ),
            ]
    return rows


def dry_run_rows(num_media: int = NUM_MEDIA, measure: Measure = cost_elsewhere) -> list[Row]:
    command = f"{COMMAND} --only dryrun"
    with tempfile.TemporaryDirectory() as folder:
        write_synthetic_manifest(Path(folder, "manifest.parquet"), num_media)
        write_small_encoder(Path(folder, "encoder"))
        cost = measure(dry_run, folder, num_media)
    name = f"dry run of a manifest of {num_media} films of 5 minutes"
    return [
        Row(name=name, value=cost.seconds, unit="s", bar="<= 600", command=command),
        Row(name=f"{name}: peak memory", value=cost.peak_bytes / 1e6, unit="MB", bar="<= 2000", command=command),
    ]


def write_synthetic_run(store: str, num_segments: int) -> None:
    """Writes commit records and a plan in different orders, with empty data files."""
    StoreWriter.create(store, {"synthetic": True})
    for name in ("commits", "data", "plan"):
        Path(store, name).mkdir()
    order = np.random.default_rng(1)
    for number, table in enumerate(synthetic_index_tables(num_segments)):
        planned = [table[name] if name in table.column_names else pa.nulls(len(table), PLAN.field(name).type)
                   for name in PLAN.names]  # fmt: skip
        plan = pa.table(planned, names=PLAN.names)
        status = pa.array(["planned"] * len(table))
        plan = plan.set_column(PLAN.names.index("status"), "status", status).cast(PLAN)
        pq.write_table(plan, Path(store, "plan", f"part-{number:06d}.parquet"), compression="zstd")
        for start in order.permutation(range(0, len(table), SEGMENTS_PER_FILE)):
            name = f"{order.bytes(16).hex()}.parquet"
            rows = table.slice(start, SEGMENTS_PER_FILE)
            rows = rows.set_column(INDEX.names.index("file"), INDEX.field("file"), pa.array([name] * len(rows)))
            pq.write_table(rows, Path(store, "commits", name), compression="zstd", write_page_checksum=True)
            Path(store, "data", name).touch()


def finalize_synthetic_run(store: str, num_segments: int) -> None:
    """Raises RuntimeError if the counts are wrong."""
    totals = finalize_store(store, _plan_tables(store))
    counts = totals.audit.segments
    if counts.planned != num_segments or counts.ok != num_segments:
        raise RuntimeError(f"{num_segments} segments were written, the audit found {counts}")


def _plan_tables(store: str) -> Iterator[pa.Table]:
    return (read_plan_file(str(part)) for part in sorted(Path(store, "plan").iterdir()))


def write_small_store(store: str, num_segments: int) -> None:
    """Writes full segments with one feature value per frame, eight segments per file."""
    writer = StoreWriter.create(store, {"synthetic": True})
    for table in synthetic_index_tables(num_segments):
        for start in range(0, len(table), SEGMENTS_PER_SMALL_FILE):
            rows = table.slice(start, SEGMENTS_PER_SMALL_FILE).to_pylist()
            sizes = {"num_tokens_per_frame": 1, "dim": 1, "features": bytes(2 * FRAMES_PER_SEGMENT)}
            rows = [{**row, **sizes, "features_xxh64": None} for row in rows]
            writer.write_file(rows[0]["segment_id"], rows)
    writer.write_index()


def compact_small_files(store: str) -> None:
    compact(store, file_bytes=SEGMENTS_PER_FILE * 2 * FRAMES_PER_SEGMENT)


def write_synthetic_manifest(path: Path, num_media: int) -> None:
    names = (
        "uri",
        "media_id",
        "size",
        "etag",
        "modality",
        "duration_seconds",
        "source_fps",
        "width",
        "height",
        "codec",
    )
    values = (50_000_000, "synthetic", "video", 64.0 * SEGMENTS_PER_MEDIUM, 25.0, 1280, 720, "h264")
    with pq.ParquetWriter(path, pa.schema([MANIFEST.field(name) for name in names])) as writer:
        for start in range(0, num_media, 100_000):
            numbers = range(start, min(num_media, start + 100_000))
            ids = [f"{number:032x}" for number in numbers]
            uris = [f"/nowhere/{name}.mp4" for name in ids]
            columns = [uris, ids, *([value] * len(ids) for value in values)]
            writer.write_table(pa.table(columns, schema=writer.schema))


def dry_run(folder: str, num_media: int) -> None:
    """Raises RuntimeError if the counts are wrong."""
    encoder = VisionTowerConfig(model=f"{folder}/encoder", num_tokens_per_frame=4, merge_heads=4, encode_batch_frames=8)
    config = PreprocessConfig(input=f"{folder}/manifest.parquet", feature_store=f"{folder}/store", encoder=encoder)
    found = estimate(config)
    if (found.media, found.segments_missing) != (num_media, num_media * SEGMENTS_PER_MEDIUM):
        raise RuntimeError(f"{num_media} media were written, the dry run found {found}")


def write_small_encoder(folder: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    save_encoder(SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=64, patch_size=16)), folder)
