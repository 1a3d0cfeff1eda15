"""Many small data files of a feature store to few of the configured size, while others read.

Knows which rows still count and copies them, checked, a row group at a time. One atomic write (a commit record that
names what it replaces) makes a merged file count and its sources stop to; `settle` does the rest. Killed at any moment,
the store holds every row once, and the next compaction or run of the job goes on. Readers that opened the store before
find moved rows by themselves. Not for use while a job writes to the store. Needs room for a second copy of the merged
files until it ends.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from timeviper_platform import storage
from timeviper_platform.data.commits import Commits, best_rows, num_feature_bytes, read_commits
from timeviper_platform.data.features import DATA_FOLDER, INDEX_FILE, read_header
from timeviper_platform.data.index_writer import INDEXED_KEY
from timeviper_platform.data.row_groups import open_data_file
from timeviper_platform.data.store_writer import Row, features_fault, settle, write_file

logger = logging.getLogger(__name__)

DEFAULT_FILE_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class CompactReport:
    """What a compaction did."""

    files_before: int
    files_after: int
    files_written: int
    rows_copied: int
    rows_dropped: int
    """superseded versions of media, and errors that a later run mended"""
    bytes_copied: int
    """of features"""

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"files      {self.files_before} before, {self.files_after} after; written: {self.files_written}",
            f"rows       {self.rows_copied} copied ({self.bytes_copied / 1e6:.1f} MB), {self.rows_dropped} superseded",
        ]


@dataclass(frozen=True, slots=True)
class _Source:
    """A data file and the rows of it that count."""

    name: str
    first_media_id: str
    live: list[tuple[int, int]]
    """(row_group, row_in_group), ascending"""
    num_dropped: int
    num_bytes: int
    """of the features of `live`"""


def compact(uri: str, *, file_bytes: int = DEFAULT_FILE_BYTES) -> CompactReport:
    """Merges data files with less than half of `file_bytes` of features into files of up to `file_bytes`.

    Raises:
        ValueError: when there is no store at `uri`, or `file_bytes` is not positive.
        RuntimeError: when a row to be copied is damaged, with its ids; what was merged before stays merged.
    """
    if file_bytes < 1:
        raise ValueError(f"{file_bytes = } must be at least 1")
    header = read_header(uri)
    if header is None:
        raise ValueError(f"no feature store at {uri!r}; run jobs/preprocess.py with output: {uri}")
    settle(uri)
    commits = read_commits(uri)
    groups = _groups(_sources(uri, commits), file_bytes)
    for number, group in enumerate(groups, start=1):
        names = [source.name for source in group]
        name = hashlib.sha256("\n".join(["compact", *names]).encode()).hexdigest()[:32]
        rows = (row for source in group for row in _rows(uri, source))
        write_file(uri, name, rows, recipe_digest=header["recipe_hash"], replaces=names)
        logger.info("merged %d data files into %s (%d of %d)", len(names), name, number, len(groups))
    settle(uri)
    merged = [source for group in groups for source in group]
    return CompactReport(
        files_before=len(commits.tables),
        files_after=len(read_commits(uri).tables),
        files_written=len(groups),
        rows_copied=sum(len(source.live) for source in merged),
        rows_dropped=sum(source.num_dropped for source in merged),
        bytes_copied=sum(source.num_bytes for source in merged),
    )


def live_rows(uri: str, commits: Commits) -> pa.Table:
    """The committed rows that count: the index's, or the best of each segment while commits are younger than it.

    Rows of another source_version can be told from rows not yet indexed only by an index of these very files.
    """
    path = storage.join_uri(uri, INDEX_FILE)
    if storage.exists(path):
        index = pq.ParquetFile(pa.BufferReader(storage.read_bytes(path)))
        if (index.schema_arrow.metadata or {}).get(INDEXED_KEY) == commits.digest():
            return index.read()
    return best_rows(commits.rows())


def _sources(uri: str, commits: Commits) -> list[_Source]:
    live = live_rows(uri, commits).sort_by([(name, "ascending") for name in ("file", "row_group", "row_in_group")])
    counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(live["file"]).to_pylist()}
    sources = []
    start = 0
    for name, table in commits.tables.items():  # in the order of their names, as `live` is
        mine = live.slice(start, counts.get(name, 0))
        start += mine.num_rows
        places = list(zip(mine["row_group"].to_pylist(), mine["row_in_group"].to_pylist(), strict=True))
        first = pc.min(table["media_id"]).as_py() or ""
        sources.append(_Source(name, first, places, table.num_rows - mine.num_rows, num_feature_bytes(mine)))
    return sorted(sources, key=lambda source: (source.first_media_id, source.name))


def _groups(sources: Sequence[_Source], file_bytes: int) -> list[list[_Source]]:
    """Small files in order, cut where a merged file is full; single files only when they hold rows to drop."""
    groups: list[list[_Source]] = [[]]
    for source in sources:
        if 2 * source.num_bytes >= file_bytes:
            continue
        if sum(other.num_bytes for other in groups[-1]) + source.num_bytes > file_bytes:
            groups.append([])
        groups[-1].append(source)
    return [group for group in groups if len(group) > 1 or any(source.num_dropped for source in group)]


def _rows(uri: str, source: _Source) -> Iterator[Row]:
    path = storage.join_uri(uri, DATA_FOLDER, source.name)
    with open_data_file(path) as file:
        for number in sorted({row_group for row_group, _ in source.live}):
            places = [place for row_group, place in source.live if row_group == number]
            for row in file.read_row_group(number, use_threads=False).take(pa.array(places)).to_pylist():
                fault = features_fault(row, row["features"])
                if fault is not None:
                    raise RuntimeError(
                        f"{path}: row group {number}: segment {row['segment_id']} of medium {row['media_id']}: {fault};"
                        " `jobs/store.py verify` lists every bad row and says what to do"
                    )
                yield row
