"""The stored plan of a whole input, compared with the store's commits.

Memory grows only by 16 bytes per medium and per committed segment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from timeviper_platform.common import storage
from timeviper_platform.common.hash_table import HashTable
from timeviper_platform.data.media.container import RETRYABLE
from timeviper_platform.data.media.medium import Medium
from timeviper_platform.data.plan.segments import PlanSpec, Segment, plan_page, segments_of
from timeviper_platform.data.store.commits import CommitLog, write_table
from timeviper_platform.data.store.layout import PLAN_FOLDER, read_plan_file


@dataclass(slots=True)
class PlanCounts:
    """Totals of a plan, and of its uncommitted segments."""

    media: int = 0
    segments: int = 0
    frames: int = 0
    segments_missing: int = 0
    frames_missing: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    """Media in error by type."""
    joined_media: int = 0
    """Videos of several recordings, each with its own clock."""
    joined_parts: int = 0
    """Recordings in them."""

    def add(self, table: pa.Table, is_missing: np.ndarray) -> None:
        """Adds PLAN rows; `is_missing` (rows,) marks uncommitted segments."""
        is_error = np.asarray(pc.equal(table["status"], "error"))
        num_frames = table["num_frames"].fill_null(0).to_numpy()
        is_first = table["segment_index"].fill_null(0).to_numpy() == 0
        self.media += int(is_first.sum())
        parts = table["joined_parts"].fill_null(1).to_numpy()[is_first]
        self.joined_media += int((parts > 1).sum())
        self.joined_parts += int(parts[parts > 1].sum())
        self.segments += int((~is_error).sum())
        self.frames += int(num_frames.sum())
        self.segments_missing += int(is_missing.sum())
        self.frames_missing += int(num_frames[is_missing].sum())
        self.errors.update(table.filter(pa.array(is_error))["error_type"].to_pylist())


class StoredSegments(Sequence[Segment]):
    """Segments of a stored plan, read lazily, one file at a time."""

    def __init__(self, plan_files: Sequence[str], count: int, finished: HashTable | None = None) -> None:
        self._plan_files = plan_files
        self._count = count
        self._finished = finished

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Segment]:
        for plan_file in self._plan_files:
            table = read_plan_file(plan_file)
            if self._finished is not None:
                table = table.filter(pa.array(missing_rows(table, self._finished)))
            yield from segments_of(table)

    @overload
    def __getitem__(self, index: int) -> Segment: ...
    @overload
    def __getitem__(self, index: slice) -> list[Segment]: ...
    def __getitem__(self, index: int | slice) -> Segment | list[Segment]:
        return list(self)[index]


@dataclass(frozen=True)
class Plan:
    plan_files: list[str]
    counts: PlanCounts
    finished: HashTable
    """See `finished_segments`."""

    @property
    def segments(self) -> StoredSegments:
        return StoredSegments(self.plan_files, self.counts.segments)

    @property
    def missing(self) -> StoredSegments:
        """Uncommitted segments."""
        return StoredSegments(self.plan_files, self.counts.segments_missing, self.finished)

    def tables(self) -> Iterator[pa.Table]:
        """Yields PLAN rows, one table per file."""
        return (read_plan_file(plan_file) for plan_file in self.plan_files)


def write_plan(feature_store: str, tables: Iterable[pa.Table], finished: HashTable) -> Plan:
    """Writes plan/part-*.parquet, replacing earlier ones."""
    folder = storage.join_uri(feature_store, PLAN_FOLDER)
    storage.remove(folder)
    counts, plan_files = PlanCounts(), []
    for index, table in enumerate(tables):
        counts.add(table, missing_rows(table, finished))
        plan_files.append(storage.join_uri(folder, f"part-{index:06d}.parquet"))
        write_table(plan_files[-1], table)
    return Plan(plan_files, counts, finished)


def plan_here(pages: Iterable[list[Medium]], spec: PlanSpec) -> Iterator[pa.Table]:
    probes = spec.probe_source()
    for page in pages:
        yield from plan_page(page, spec, probes)


def finished_segments(feature_store: str, retry_errors: Iterable[str] = ()) -> HashTable:
    """Returns committed segments, except errors that are RETRYABLE or in `retry_errors`."""
    commits, finished = CommitLog(feature_store), HashTable()
    lost = set(commits.lost())
    retried_types = pa.array(sorted({*RETRYABLE, *retry_errors}), pa.string())
    for name, table in commits.records(["segment_id", "status", "error_type"]):
        if name in lost:
            continue
        is_retried = pc.and_(pc.equal(table["status"], "error"), pc.is_in(table["error_type"], retried_types))
        finished.add(*_keys_and_values(table.filter(pc.invert(is_retried))["segment_id"]))
    return finished


def missing_rows(table: pa.Table, finished: HashTable) -> np.ndarray:
    """Returns (rows,) bool: uncommitted segments among PLAN rows."""
    planned = np.asarray(pc.equal(table["status"], "planned"))
    keys, values = _keys_and_values(table["segment_id"].filter(pa.array(planned)))
    found, stored_values = finished.find(keys)
    planned[planned] = ~(found & (stored_values == values))
    return planned


def _keys_and_values(segment_ids: Any) -> tuple[np.ndarray, np.ndarray]:
    """Splits 32-digit hex ids into uint64 keys, and values that distinguish equal keys."""
    pairs = np.frombuffer(bytes.fromhex("".join(segment_ids.to_pylist())), dtype=">u8").reshape(-1, 2)
    return pairs[:, 0].astype(np.uint64), pairs[:, 1].astype(np.uint64)
