"""Synthetic feature stores, written without a job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import torch
import xxhash

from timeviper_platform.common.schemas import INDEX
from timeviper_platform.data.store.commits import CommitLog
from timeviper_platform.data.store.writer import StoreWriter, features_bytes

RECIPE = {"encoder": {"weights_hash": "abc", "layer": -2}, "sampling": {"fps": 1.0}}


def segment_row(media_id: str, index: int, num_segments: int, features: torch.Tensor, **changes: Any) -> dict[str, Any]:
    """A FEATURES row whose frame k was sampled at 64 * index + k seconds."""
    num_frames = len(features)
    times = [64.0 * index + k for k in range(num_frames)]
    data = features_bytes(features)
    return {
        "segment_id": f"{media_id}-{index}",
        "media_id": media_id,
        "source_version": "v1",
        "segment_index": index,
        "num_segments": num_segments,
        "uri": f"/{media_id}.mp4",
        "modality": "video",
        "sha256": f"sha-{media_id}",
        "duration_seconds": 64.0 * num_segments,
        "frame_times_seconds": times,
        "frame_pts_seconds": [time - 0.01 for time in times],
        "num_frames": num_frames,
        "num_tokens_per_frame": features.shape[1],
        "dim": features.shape[2],
        "dtype": "bfloat16",
        "status": "ok",
        "frames_missing": 0,
        "features_xxh64": xxhash.xxh64_intdigest(data),
        "features": data,
    } | changes


def error_row(media_id: str, error_type: str = "not_found", **changes: Any) -> dict[str, Any]:
    """A FEATURES row in error."""
    failed = {
        "status": "error",
        "error_stage": "decode_video",
        "error_type": error_type,
        "error_message": "synthetic",
        "features_xxh64": None,
        "features": None,
        "num_frames": 0,
        "frame_times_seconds": [],
        "frame_pts_seconds": [],
    }
    return segment_row(media_id, 0, 1, torch.zeros(1, 2, 4)) | failed | changes


def write_files(
    uri: str,
    files: dict[str, Sequence[dict[str, Any]]],
    *,
    index: bool = True,
    recipe: Mapping[str, Any] | None = None,
) -> None:
    """Writes data files (name -> rows) and the index."""
    writer = StoreWriter.create(uri, RECIPE if recipe is None else recipe)
    for name, rows in files.items():
        writer.write_file(name, rows)
    if index:
        writer.write_index({row["media_id"]: row["source_version"] for f in files.values() for row in f})


def read_committed(uri: str) -> pa.Table:
    """INDEX rows of the current commit records, sorted by file name."""
    tables = [record.replace_schema_metadata(INDEX.metadata) for _, record in CommitLog(uri).current_records()]
    return pa.concat_tables([INDEX.empty_table(), *tables])
