"""Merges small data files of a store while readers continue; no job may write."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from timeviper_platform.common import storage
from timeviper_platform.common.lease import hold_lease
from timeviper_platform.common.schemas import INDEX
from timeviper_platform.data.store.commits import CommitLog, best_rows, files_digest, num_feature_bytes
from timeviper_platform.data.store.index import ROW_GROUP_ROWS
from timeviper_platform.data.store.index_writer import index_tables, read_files_digest
from timeviper_platform.data.store.layout import DATA_FOLDER
from timeviper_platform.data.store.row_groups import open_data_file
from timeviper_platform.data.store.sorted_runs import SortedRuns, merge_runs
from timeviper_platform.data.store.writer import ROW_GROUP_BYTES, Row, StoreWriter, features_fault

logger = logging.getLogger(__name__)

DEFAULT_FILE_BYTES = 256 << 20

_LIVE_NAMES = ("file", "row_group", "row_in_group", "num_frames", "num_tokens_per_frame", "dim")
_LIVE = pa.schema([INDEX.field(name) for name in _LIVE_NAMES])
_COMMITTED = pa.schema([INDEX.field(name) for name in ("media_id", "segment_id", "status", *_LIVE_NAMES)])


@dataclass(frozen=True, kw_only=True, slots=True)
class CompactReport:
    files_before: int
    files_after: int
    files_written: int
    rows_copied: int
    rows_dropped: int
    """superseded versions, and errors that a later run repaired"""
    bytes_copied: int
    """bytes of copied features"""

    def lines(self) -> list[str]:
        return [
            f"files      {self.files_before} before, {self.files_after} after; written: {self.files_written}",
            f"rows       {self.rows_copied} copied ({self.bytes_copied / 1e6:.1f} MB), {self.rows_dropped} superseded",
        ]


@dataclass(frozen=True, slots=True)
class _Source:
    name: str
    first_media_id: str
    num_rows: int
    num_live: int
    num_bytes: int
    """bytes of live features"""
    live: np.ndarray | None
    """(num_live, 2) ascending row_group, row_in_group; None = all rows"""

    @property
    def num_dropped(self) -> int:
        return self.num_rows - self.num_live


def compact(
    uri: str,
    *,
    file_bytes: int = DEFAULT_FILE_BYTES,
    row_group_bytes: int = ROW_GROUP_BYTES,
    index_row_group_rows: int = ROW_GROUP_ROWS,
) -> CompactReport:
    """Merges data files with less than half of `file_bytes` of features into files of up to `file_bytes`.

    Can be killed and repeated: one commit replaces all sources of a merged file.

    Raises:
        ValueError: if there is no store at `uri`.
        LeaseHeldError: if a job writes to the store.
        RuntimeError: if a row is damaged.
    """
    if file_bytes < 1 or row_group_bytes < 1:
        raise ValueError(f"{file_bytes = } and {row_group_bytes = } must be at least 1")
    store = StoreWriter.open(uri, row_group_bytes=row_group_bytes, index_row_group_rows=index_row_group_rows)
    with hold_lease(uri, "jobs/store.py compact"):
        return _compact(store, uri, file_bytes)


def _compact(store: StoreWriter, uri: str, file_bytes: int) -> CompactReport:
    store.settle()
    with tempfile.TemporaryDirectory(prefix="timeviper-compact-") as folder:
        sources = _sources(store.commits, Path(folder))
    groups = _groups(sources, file_bytes)
    for number, group in enumerate(groups, start=1):
        names = [source.name for source in group]
        name = hashlib.sha256("\n".join(["compact", *names]).encode()).hexdigest()[:32]
        rows = (row for source in group for row in _rows(uri, source))
        store.write_file(name, rows, replaces=names)
        logger.info("merged %d data files into %s (%d of %d)", len(names), name, number, len(groups))
    store.settle()
    merged = [source for group in groups for source in group]
    return CompactReport(
        files_before=len(sources),
        files_after=sum(1 for _ in store.commits.names()),
        files_written=len(groups),
        rows_copied=sum(source.num_live for source in merged),
        rows_dropped=sum(source.num_dropped for source in merged),
        bytes_copied=sum(source.num_bytes for source in merged),
    )


def _sources(commits: CommitLog, folder: Path) -> list[_Source]:
    files = []
    for name, record in commits.records(["media_id"]):
        files.append((name, pc.min(record["media_id"]).as_py() or "", record.num_rows))
    live = SortedRuns(folder / "live", _LIVE, "file")
    for table in _live_rows(commits, [name for name, _, num_rows in files if num_rows], folder):
        live.add(table)
    of_files = _by_file(live)
    name, rows = next(of_files, ("", live.empty))
    sources = []
    for file, first, num_rows in files:
        own = live.empty
        if name == file:
            own = rows
            name, rows = next(of_files, ("", live.empty))
        locations = None if own.num_rows == num_rows else _locations(own)
        sources.append(_Source(file, first, num_rows, own.num_rows, num_feature_bytes(own), locations))
    return sorted(sources, key=lambda source: (source.first_media_id, source.name))


def _live_rows(commits: CommitLog, with_rows: Sequence[str], folder: Path) -> Iterator[pa.Table]:
    """Yields the index's rows or, if it is outdated, the best row of each segment."""
    if read_files_digest(commits.uri) == files_digest(with_rows):
        yield from index_tables(commits.uri, _LIVE.names)
        return
    committed = SortedRuns(folder / "committed", _COMMITTED, "media_id")
    for _, record in commits.records():
        committed.add(record)
    for (rows,) in merge_runs([committed], "media_id"):
        yield best_rows(rows)


def _by_file(live: SortedRuns) -> Iterator[tuple[str, pa.Table]]:
    for (rows,) in merge_runs([live], "file"):
        start = 0
        for entry in pc.value_counts(rows["file"]).to_pylist():
            yield entry["values"], rows.slice(start, entry["counts"])
            start += entry["counts"]


def _locations(rows: pa.Table) -> np.ndarray:
    rows = rows.sort_by([("row_group", "ascending"), ("row_in_group", "ascending")])
    return np.stack([rows["row_group"].to_numpy(), rows["row_in_group"].to_numpy()], axis=1)


def _groups(sources: Sequence[_Source], file_bytes: int) -> list[list[_Source]]:
    """Returns groups of small files to merge, and single small files with rows to drop."""
    groups: list[list[_Source]] = [[]]
    num_bytes = 0
    for source in sources:
        if 2 * source.num_bytes >= file_bytes:
            continue
        if num_bytes + source.num_bytes > file_bytes:
            groups.append([])
            num_bytes = 0
        groups[-1].append(source)
        num_bytes += source.num_bytes
    return [group for group in groups if len(group) > 1 or any(source.num_dropped for source in group)]


def _rows(uri: str, source: _Source) -> Iterator[Row]:
    path = storage.join_uri(uri, DATA_FOLDER, source.name)
    advice = "run `jobs/store.py verify` to list every bad row"
    try:
        opened = open_data_file(path, verify_pages=False)  # `features_fault` names the row
    except (OSError, pa.ArrowInvalid) as error:
        raise RuntimeError(f"{path} cannot be opened: {error}; {advice}") from error
    with opened as file:
        for number in range(file.metadata.num_row_groups):
            kept = None if source.live is None else source.live[source.live[:, 0] == number, 1]
            if kept is not None and not len(kept):
                continue
            rows = file.read_row_group(number, use_threads=False)
            for row in (rows if kept is None else rows.take(pa.array(kept))).to_pylist():
                fault = features_fault(row, row["features"])
                if fault is not None:
                    raise RuntimeError(
                        f"{path}: row group {number}: segment {row['segment_id']} of medium {row['media_id']}: {fault};"
                        f" {advice}"
                    )
                yield row
