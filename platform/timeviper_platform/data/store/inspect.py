"""Summarises a store without reading features."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from timeviper_platform.common import storage
from timeviper_platform.common.hash_table import HashTable
from timeviper_platform.common.listing import sizes_in
from timeviper_platform.data.encode.recipe import older_recipe
from timeviper_platform.data.store.audit import Outcomes, count_reasons, medium_status
from timeviper_platform.data.store.commits import CommitLog, files_digest, num_feature_bytes
from timeviper_platform.data.store.index_writer import index_tables, read_files_digest
from timeviper_platform.data.store.layout import DATA_FOLDER, REJECTS_FILE, damage_named, read_header


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreSummary:
    media: Outcomes
    """indexed media, without those that planning rejected"""
    segments: Outcomes
    """segments of the current versions"""
    segments_superseded: int
    frames: int
    bytes: int
    """feature bytes of the current versions"""
    file_bytes: int
    """size of all data files"""
    files: int
    is_indexed: bool
    """False if a run was killed or is active"""
    recipe_hash: str
    recipe: dict[str, Any]
    reasons: dict[str, dict[str, int]]
    """error stage -> error type -> media of the last run that are partial or rejected"""

    def lines(self) -> list[str]:
        reasons = [f"{n} {kind} ({stage})" for stage, kinds in self.reasons.items() for kind, n in kinds.items()]
        return [
            f"media      {self.media.parts()}",
            f"segments   {self.segments.parts()}; superseded: {self.segments_superseded}",
            f"frames     {self.frames}, {self.bytes / 1e6:.1f} MB of features",
            f"files      {self.files}, {self.file_bytes / 1e6:.1f} MB"
            + ("" if self.is_indexed else "; the index is outdated: run the job again"),
            f"reasons    {', '.join(reasons) or 'none'}",
            f"recipe     {self.recipe_hash}",
            *([f"older      {note}"] if (note := older_recipe(self.recipe)) else []),
            *(f"  {line}" for line in json.dumps(self.recipe, indent=2).splitlines()),
        ]


def inspect_store(uri: str) -> StoreSummary:
    """Summarises the store at `uri`; raises ValueError if there is none."""
    header = read_header(uri)
    segments, files, with_rows = HashTable(), set(), []
    for name, record in CommitLog(uri).current_records(["segment_id"]):
        files.add(name)
        if record.num_rows:
            with_rows.append(name)
            ids = record["segment_id"].to_pylist()
            keys = np.array([xxhash.xxh64_intdigest(segment_id.encode()) for segment_id in ids], np.uint64)
            segments.add(keys, keys)
    outcomes = Outcomes()
    frames = num_bytes = 0

    def rows() -> Iterator[tuple[str, str]]:
        nonlocal outcomes, frames, num_bytes
        for table in index_tables(uri, ["media_id", "status", "num_frames", "num_tokens_per_frame", "dim"]):
            frames += pc.sum(table["num_frames"]).as_py() or 0
            num_bytes += num_feature_bytes(table)
            statuses = table["status"].to_pylist()
            outcomes += Outcomes.of(statuses)
            yield from zip(table["media_id"].to_pylist(), statuses, strict=True)

    groups = groupby(rows(), key=itemgetter(0))
    media = Outcomes.of(medium_status({status for _, status in group}) for _, group in groups)
    digest = read_files_digest(uri)
    return StoreSummary(
        media=media,
        segments=outcomes,
        segments_superseded=len(segments) - outcomes.planned if digest is not None else 0,
        frames=frames,
        bytes=num_bytes,
        file_bytes=sum(size for name, size in sizes_in(storage.join_uri(uri, DATA_FOLDER)) if name in files),
        files=len(files),
        is_indexed=digest == files_digest(with_rows),
        recipe_hash=header["recipe_hash"],
        recipe=header["recipe"],
        reasons=_read_reasons(uri),
    )


def _read_reasons(uri: str) -> dict[str, dict[str, int]]:
    path = storage.join_uri(uri, REJECTS_FILE)
    if not storage.exists(path):
        return {}
    with damage_named(path, "run jobs/preprocess.py again, which rewrites it"):
        return count_reasons(pq.ParquetFile(pa.BufferReader(storage.read_bytes(path))).read())
