"""The plan of a whole input: pages of media to PLAN tables in plan/*.parquet, compared with what is committed.

Knows counts, the anti-join and how a stored plan is read again, all in memory that does not grow with the input (but
for 16 bytes an item and a committed segment). How a medium becomes rows is in segments.py; what an input is, inputs.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from timeviper_platform.data.store.commits import iter_commits, lost_records, write_table
from timeviper_platform.data.store.layout import PLAN_FOLDER, read_part

PlanPages = Callable[[Iterable[list[Medium]], PlanSpec], Iterator[pa.Table]]
"""Pages of items to PLAN tables, in order: `plan_here`, or `plan_on_ray` of graph.py."""


@dataclass(slots=True)
class PlanCounts:
    """What an input asks for, and what of it is missing."""

    media: int = 0
    segments: int = 0
    frames: int = 0
    segments_missing: int = 0
    frames_missing: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    """media by error type"""

    def add(self, table: pa.Table, is_missing: np.ndarray) -> None:
        """Takes note of PLAN rows, of which some segments are not committed."""
        is_error = np.asarray(pc.equal(table["status"], "error"))
        samples = table["num_frames"].fill_null(0).to_numpy()
        first = table["segment_index"].fill_null(0).to_numpy() == 0
        self.media += int(first.sum())
        self.segments += int((~is_error).sum())
        self.frames += int(samples.sum())
        self.segments_missing += int(is_missing.sum())
        self.frames_missing += int(samples[is_missing].sum())
        self.errors.update(table.filter(pa.array(is_error))["error_type"].to_pylist())


class StoredSegments(Sequence[Segment]):
    """Segments of a stored plan, read when asked for; going through them holds one part in memory."""

    def __init__(self, parts: Sequence[str], count: int, finished: HashTable | None = None) -> None:
        self._parts = parts
        self._count = count
        self._finished = finished

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Segment]:
        for part in self._parts:
            table = read_part(part)
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
    """A plan that is written down."""

    parts: list[str]
    """its Parquet files, in order"""
    counts: PlanCounts
    finished: HashTable

    @property
    def num_media(self) -> int:
        """Media in the input."""
        return self.counts.media

    @property
    def segments(self) -> StoredSegments:
        """All of them."""
        return StoredSegments(self.parts, self.counts.segments)

    @property
    def missing(self) -> StoredSegments:
        """Those that are not committed."""
        return StoredSegments(self.parts, self.counts.segments_missing, self.finished)

    def tables(self) -> Iterator[pa.Table]:
        """PLAN rows of all media, those in error among them, a part at a time."""
        return (read_part(part) for part in self.parts)


def write_plan(store: str, tables: Iterable[pa.Table], finished: HashTable) -> Plan:
    """Writes plan/part-*.parquet in the store, in place of an earlier plan."""
    folder = storage.join_uri(store, PLAN_FOLDER)
    storage.remove(folder)
    counts, parts = PlanCounts(), []
    for number, table in enumerate(tables):
        counts.add(table, missing_rows(table, finished))
        parts.append(storage.join_uri(folder, f"part-{number:06d}.parquet"))
        write_table(parts[-1], table)
    return Plan(parts, counts, finished)


def plan_here(pages: Iterable[list[Medium]], spec: PlanSpec) -> Iterator[pa.Table]:
    """Plans in this process, one page after the other; headers are read in its child, if so configured."""
    probes = spec.probe_source()
    for page in pages:
        yield from plan_page(page, spec, probes)


def finished_segments(store: str, retry_errors: Iterable[str] = ()) -> HashTable:
    """Committed segments that need no work: all but those whose error was the world's, or is to be tried again."""
    finished, lost = HashTable(), set(lost_records(store))
    kinds = pa.array(sorted({*RETRYABLE, *retry_errors}), pa.string())
    for name, table in iter_commits(store, ["segment_id", "status", "error_type"]):
        if name in lost:
            continue
        again = pc.is_in(table["error_type"], kinds)
        done = table.filter(pc.invert(pc.and_(pc.equal(table["status"], "error"), again)))
        finished.add(*_halves(done["segment_id"]))
    return finished


def missing_rows(table: pa.Table, finished: HashTable) -> np.ndarray:
    """(rows,) bool: PLAN rows that are segments and not committed."""
    planned = np.asarray(pc.equal(table["status"], "planned"))
    keys, values = _halves(table["segment_id"].filter(pa.array(planned)))
    found, before = finished.find(keys)
    planned[planned] = ~(found & (before == values))
    return planned


def _halves(segment_ids: Any) -> tuple[np.ndarray, np.ndarray]:
    """Ids of 32 hex digits as two uint64 each: the key, and the value that tells equal keys apart."""
    pairs = np.frombuffer(bytes.fromhex("".join(segment_ids.to_pylist())), dtype=">u8").reshape(-1, 2)
    return pairs[:, 0].astype(np.uint64), pairs[:, 1].astype(np.uint64)
