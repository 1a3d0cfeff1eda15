"""Opening a store of a million segments, random and sequential reads, and bytes on disk."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from timeviper_platform.benchmarks.measure import Comparison, Measure, Row, compare, cost_elsewhere
from timeviper_platform.common import schemas
from timeviper_platform.data.store.index import ROW_GROUP_ROWS, StoreIndex
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.data.store.writer import StoreWriter, features_bytes

COMMAND = "python jobs/benchmark.py store"
NUM_SEGMENTS = 1_000_000
SEGMENTS_PER_MEDIUM = 5
FRAMES_PER_SEGMENT = 64
CLIP_SECONDS = 64.0
CACHE_BYTES = 128 << 20
REPEATS = 7


def opening_rows(num_segments: int = NUM_SEGMENTS, measure: Measure = cost_elsewhere) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "index.parquet"
        write_synthetic_index(index, num_segments)
        costs = [measure(open_and_find, str(index)) for _ in range(REPEATS)]
    command = f"{COMMAND} --only opening"
    seconds, cpu_seconds = (statistics.median(values) for values in list(zip(*costs, strict=True))[:2])
    peak = max(cost.peak_bytes for cost in costs) / 1e6
    name = f"opening a store of {num_segments} segments"
    return [
        Row(name=name, value=seconds, unit="s", bar="<= 1", command=command),
        Row(name=f"{name}: CPU time", value=cpu_seconds, unit="s", command=command),
        Row(name=f"{name}: peak memory", value=peak, unit="MB", bar="<= 300", command=command),
    ]


def reading_rows(num_media: int = 40) -> list[Row]:
    """Random against sequential reads of `num_media` films of 5 minutes at 16 x 1152, and their bytes."""
    command = f"{COMMAND} --only reading"
    with tempfile.TemporaryDirectory() as folder:
        uri = f"{folder}/store"
        write_synthetic_store(uri, num_media)
        os.sync()  # otherwise the kernel writes half a gigabyte back while reads are timed
        stored = sum(path.stat().st_size for path in Path(uri).rglob("*.parquet"))
        films = compare_reads(uri, seconds=None)
        clips = compare_reads(uri, seconds=CLIP_SECONDS)
    ideal = num_media * SEGMENTS_PER_MEDIUM * FRAMES_PER_SEGMENT * 16 * 1152 * 2
    texts = (
        (films, "random reads against sequential ones, whole films of 5 minutes"),
        (clips, f"random reads against sequential ones, clips of {CLIP_SECONDS} s in films of 5 minutes"),
    )
    return [
        *(
            Row(name=f"{text} (noise {reads.noise:.0%})", value=reads.speedup, unit="x", bar=">= 0.8", command=command)
            for reads, text in texts
        ),
        Row(
            name="bytes of a store against its features", value=stored / ideal, unit="x", bar="<= 1.01", command=command
        ),
    ]


def write_synthetic_index(path: Path, num_segments: int) -> None:
    """Writes an index of full segments, five per medium, with the frame times of a 25 fps film."""
    with pq.ParquetWriter(path, schemas.INDEX, compression="zstd", write_page_checksum=True) as writer:
        for table in synthetic_index_tables(num_segments):
            writer.write_table(table, row_group_size=ROW_GROUP_ROWS)


def synthetic_index_tables(num_segments: int) -> Iterator[pa.Table]:
    """Index rows, 65536 at a time."""
    random = np.random.default_rng(0)
    for start in range(0, num_segments, 32 * ROW_GROUP_ROWS):
        yield _synthetic_rows(np.arange(start, min(num_segments, start + 32 * ROW_GROUP_ROWS)), random)


def _synthetic_rows(numbers: np.ndarray, random: np.random.Generator) -> pa.Table:
    indices = numbers % SEGMENTS_PER_MEDIUM
    times = (indices[:, None] * FRAMES_PER_SEGMENT + np.arange(FRAMES_PER_SEGMENT)).astype(np.float64)
    offsets = pa.array(np.arange(len(numbers) + 1, dtype=np.int32) * FRAMES_PER_SEGMENT)
    media = [f"{number:032x}" for number in numbers // SEGMENTS_PER_MEDIUM]
    columns = {
        "media_id": pa.array(media),
        "segment_id": pa.array([random.bytes(16).hex() for _ in numbers]),
        "uri": pa.array([f"s3://bucket/videos/{name}.mp4" for name in media]),
        "sha256": pa.array([name + name for name in media]),
        "source_version": pa.array(media),
        "file": pa.array([f"{number // 400:032x}.parquet" for number in numbers]),
        "status": pa.array(["ok"] * len(numbers)),
        "modality": pa.array(["video"] * len(numbers)),
        "segment_index": pa.array(indices.astype(np.int32)),
        "frame_times_seconds": pa.ListArray.from_arrays(offsets, pa.array(times.ravel())),
        "frame_pts_seconds": pa.ListArray.from_arrays(offsets, pa.array((times - random.random() * 0.04).ravel())),
    }
    for field in schemas.INDEX:
        if field.name not in columns:
            is_number = pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
            filler = pa.array(np.full(len(numbers), FRAMES_PER_SEGMENT)) if is_number else pa.nulls(len(numbers))
            columns[field.name] = filler.cast(field.type)
    return pa.table(columns, schema=schemas.INDEX)


def open_and_find(index: str) -> None:
    opened = StoreIndex.open(index)
    opened.rows_of(opened.media_ids[len(opened.media_ids) // 2])


def write_synthetic_store(uri: str, num_media: int) -> None:
    """Writes films of five full segments with equal features into one file."""
    features = features_bytes(torch.randn(FRAMES_PER_SEGMENT, 16, 1152))
    names = [f"m{number:06d}" for number in range(num_media)]
    rows = (_row(media_id, index, features) for media_id in names for index in range(SEGMENTS_PER_MEDIUM))
    store = StoreWriter.create(uri, {"synthetic": True})
    store.write_file("synthetic", rows)
    store.write_index()


def compare_reads(uri: str, seconds: float | None) -> Comparison:
    """Reads every clip of `seconds` of every medium (None: whole media) in random, then in stored order, in turn.

    Each pass opens a new reader, whose cache is smaller than the data of a pass.
    """
    with_bounds: list[tuple[str, float | None, float | None]] = []
    for media_id in FeatureStore.open(uri).media_ids:
        if seconds is None:
            with_bounds.append((media_id, None, None))
        else:
            count = int(SEGMENTS_PER_MEDIUM * FRAMES_PER_SEGMENT // seconds)
            with_bounds += [(media_id, index * seconds, (index + 1) * seconds) for index in range(count)]
    shuffled = [with_bounds[index] for index in np.random.default_rng(0).permutation(len(with_bounds))]

    def read(order: list[tuple[str, float | None, float | None]]) -> None:
        store = FeatureStore.open(uri, cache_bytes=CACHE_BYTES)
        for media_id, start, end in order:
            store.read(media_id, store.info(media_id).select(start_seconds=start, end_seconds=end))

    return compare(lambda: read(shuffled), lambda: read(with_bounds), repeats=REPEATS)


def _row(media_id: str, index: int, features: bytes) -> dict[str, Any]:
    times = [float(index * FRAMES_PER_SEGMENT + frame) for frame in range(FRAMES_PER_SEGMENT)]
    return {
        "segment_id": f"{media_id}-{index}",
        "media_id": media_id,
        "source_version": "synthetic",
        "segment_index": index,
        "num_segments": SEGMENTS_PER_MEDIUM,
        "modality": "video",
        "duration_seconds": float(SEGMENTS_PER_MEDIUM * FRAMES_PER_SEGMENT),
        "frame_times_seconds": times,
        "frame_pts_seconds": times,
        "num_frames": FRAMES_PER_SEGMENT,
        "num_tokens_per_frame": 16,
        "dim": 1152,
        "dtype": "bfloat16",
        "status": "ok",
        "frames_missing": 0,
        "features": features,
    }
