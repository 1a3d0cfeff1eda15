"""The `store` suite: opening a store of a million segments, random against sequential reads, and bytes on disk.

Knows how to make an index of any size and a store of random features. The index has full segments of 64 frames.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from timeviper_platform import schemas
from timeviper_platform.data.features import FeatureStore
from timeviper_platform.data.index_writer import write_index
from timeviper_platform.data.store_index import ROW_GROUP_ROWS, StoreIndex
from timeviper_platform.data.store_writer import create_store, features_bytes, write_file
from timeviper_platform.measure import Row, compare

COMMAND = "python jobs/benchmark.py store"
NUM_SEGMENTS = 1_000_000
SEGMENTS_PER_MEDIUM = 5
FRAMES_PER_SEGMENT = 64
OPENINGS = 5


def store_suite(num_segments: int = NUM_SEGMENTS, num_media: int = 40) -> list[Row]:
    """Rows for an index of `num_segments` and a store of `num_media` films of 5 minutes at 16 x 1152."""
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "index.parquet"
        write_made_index(index, num_segments)
        openings = [_open_elsewhere(index) for _ in range(OPENINGS)]
        index.unlink()
        ratio, noise, overhead = _read_ratio(folder, num_media)
    values: list[tuple[str, float, str, str | None]] = [
        (f"opening a store of {num_segments} segments", float(np.median([o.seconds for o in openings])), "s", "<= 1"),
        ("its CPU time", float(np.median([o.cpu_seconds for o in openings])), "s", None),
        ("memory that takes, at most", max(o.peak_bytes for o in openings) / 1e6, "MB", "<= 300"),
        (f"random reads against sequential ones (noise {noise:.0%})", ratio, "x", ">= 0.8"),
        ("bytes of a store against its features", overhead, "x", "<= 1.01"),
    ]
    return [Row(name=name, value=value, unit=unit, bar=bar, command=COMMAND) for name, value, unit, bar in values]


def write_made_index(path: Path, num_segments: int) -> None:
    """An index of full segments, five a medium, with frame times as a 25 fps film has them."""
    random = np.random.default_rng(0)
    with pq.ParquetWriter(path, schemas.INDEX, compression="zstd", write_page_checksum=True) as writer:
        for start in range(0, num_segments, 32 * ROW_GROUP_ROWS):
            numbers = np.arange(start, min(num_segments, start + 32 * ROW_GROUP_ROWS))
            writer.write_table(_made_rows(numbers, random), row_group_size=ROW_GROUP_ROWS)


def _made_rows(numbers: np.ndarray, random: np.random.Generator) -> pa.Table:
    places = numbers % SEGMENTS_PER_MEDIUM
    times = (places[:, None] * FRAMES_PER_SEGMENT + np.arange(FRAMES_PER_SEGMENT)).astype(np.float64)
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
        "segment_index": pa.array(places.astype(np.int32)),
        "frame_times_seconds": pa.ListArray.from_arrays(offsets, pa.array(times.ravel())),
        "frame_pts_seconds": pa.ListArray.from_arrays(offsets, pa.array((times - random.random() * 0.04).ravel())),
    }
    for field in schemas.INDEX:
        if field.name not in columns:
            is_number = pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
            filler = pa.array(np.full(len(numbers), FRAMES_PER_SEGMENT)) if is_number else pa.nulls(len(numbers))
            columns[field.name] = filler.cast(field.type)
    return pa.table(columns, schema=schemas.INDEX)


class Opening(NamedTuple):
    """What opening an index cost."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    """by which this process's memory grew, at most"""


def _open_elsewhere(index: Path) -> Opening:
    """In a process of its own, its imports left out."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(open_measured, (str(index),))


def open_measured(index: str) -> Opening:
    """Opens the index and finds a medium in its middle."""
    pa.compute.equal(pa.array([1]), 1)  # loads Arrow's functions
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before = _status_bytes("VmRSS")
    started, cpu_started = time.perf_counter(), time.process_time()
    opened = StoreIndex.open(index)
    opened.rows_of(opened.media_ids[len(opened.media_ids) // 2])
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return Opening(seconds, cpu_seconds, _status_bytes("VmHWM") - before)


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def _read_ratio(folder: str, num_media: int) -> tuple[float, float, float]:
    """Speed of reading all media in random order over in stored order, its noise, and bytes on disk over ideal."""
    uri = f"{folder}/store"
    features = features_bytes(torch.randn(FRAMES_PER_SEGMENT, 16, 1152))
    in_order = [f"m{number:06d}" for number in range(num_media)]
    rows = (_row(media_id, place, features) for media_id in in_order for place in range(SEGMENTS_PER_MEDIUM))
    write_file(uri, "made", rows, recipe_digest=create_store(uri, {"made": True}))
    write_index(uri)
    shuffled = [in_order[place] for place in np.random.default_rng(0).permutation(num_media)]

    def read(order: list[str]) -> None:
        store = FeatureStore.open(uri)
        for media_id in order:
            store.read(media_id)

    result = compare(lambda: read(shuffled), lambda: read(in_order), repeats=5)
    stored = sum(path.stat().st_size for path in Path(uri).rglob("*.parquet"))
    return result.speedup, result.noise, stored / (num_media * SEGMENTS_PER_MEDIUM * len(features))


def _row(media_id: str, place: int, features: bytes) -> dict[str, Any]:
    times = [float(place * FRAMES_PER_SEGMENT + frame) for frame in range(FRAMES_PER_SEGMENT)]
    return {
        "segment_id": f"{media_id}-{place}",
        "media_id": media_id,
        "source_version": "made",
        "segment_index": place,
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
