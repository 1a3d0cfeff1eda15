"""Commit records, a plan and the index before -> the index, some media at a time.

    commit records  -+
    the plan        -+- sorted by media_id on local disk, merged -> all rows of a few media -> index.parquet
    the old index   -+                                              (and to whoever counts: finalize.py)

Knows which version of a medium is current: that of the plan, else that of the old index, else the first committed one.
Memory does not grow with the store. Needs room in the temporary folder: about 0.5 KB a segment of 64 frames.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from timeviper_platform.common import storage
from timeviper_platform.common.schemas import INDEX, PLAN
from timeviper_platform.common.storage import open_file
from timeviper_platform.data.store.commits import best_rows, indexed_digest, iter_commits, remove_lost, replaced_by
from timeviper_platform.data.store.index import ROW_GROUP_ROWS
from timeviper_platform.data.store.layout import INDEX_FILE
from timeviper_platform.data.store.sorted_runs import SortedRuns, merge_runs

INDEXED_KEY = b"timeviper.indexed"
"""In the index's metadata: `indexed_digest` of what it was made from."""

_PLANNED = pa.schema([PLAN.field(name) for name in PLAN.names if name in {
    "media_id", "source_version", "segment_id", "uri", "status", "error_stage", "error_type", "error_message",
}])  # fmt: skip
_VERSIONS = pa.schema([INDEX.field("media_id"), INDEX.field("source_version")])


class MediaRows(NamedTuple):
    """All that is known of a few media."""

    index: pa.Table
    """INDEX rows that count, in order of (media_id, segment_index)"""
    committed: pa.Table
    """INDEX rows of all commit records that are not replaced"""
    planned: pa.Table
    """PLAN rows, without some columns"""


def write_index(uri: str, current_versions: Mapping[str, str] | None = None) -> None:
    """Writes the index of what is committed: of each medium the rows of one source_version, sorted for reading.

    Args:
        uri: the store.
        current_versions: media_id -> source_version where it is known; others keep the version that the index had.
    """
    media = current_versions or {}
    names = {"media_id": list(media), "source_version": list(media.values()), "status": ["planned"] * len(media)}
    missing = {name: [""] * len(media) for name in _PLANNED.names if name not in names}
    merge_index(uri, [pa.table({**names, **missing}).select(_PLANNED.names).cast(_PLANNED)])


def merge_index(uri: str, planned: Iterable[pa.Table], visit: Callable[[MediaRows], None] | None = None) -> None:
    """Writes the index of what is committed, and shows everything to `visit` on the way.

    Args:
        uri: the store.
        planned: PLAN rows in the order of the plan; of a medium that is there twice the last version is current.
        visit: called with all media, some at a time, in order of media_id.
    """
    with tempfile.TemporaryDirectory(prefix="timeviper-index-") as folder:
        runs = {
            "committed": SortedRuns(Path(folder, "committed"), INDEX, "media_id"),
            "planned": SortedRuns(Path(folder, "planned"), _PLANNED, "media_id"),
            "indexed": SortedRuns(Path(folder, "indexed"), _VERSIONS, "media_id"),
        }
        files, replaced = _sort_commits(uri, runs["committed"])
        for table in planned:
            runs["planned"].add(table)
        for table in index_tables(uri, _VERSIONS.names):
            runs["indexed"].add(table)
        stale = pa.array(sorted(replaced & files), pa.string())
        schema = INDEX.with_metadata(INDEX.metadata | {INDEXED_KEY: indexed_digest(files - replaced)})

        def blocks() -> Iterator[pa.Table]:
            for committed, of_plan, indexed in merge_runs(list(runs.values()), "media_id"):
                if len(stale):
                    committed = committed.filter(pc.invert(pc.is_in(committed["file"], stale)))
                rows = MediaRows(_current_rows(committed, of_plan, indexed), committed, of_plan)
                if visit is not None:
                    visit(rows)
                yield rows.index

        storage.write_atomic(storage.join_uri(uri, INDEX_FILE), lambda file: _write(file, blocks(), schema))


def _sort_commits(uri: str, runs: SortedRuns) -> tuple[set[str], set[str]]:
    """Adds all commit records that have a data file; the files that have rows, and those that others replace."""
    remove_lost(uri)
    files, replaced = set(), set()
    for name, record in iter_commits(uri):
        runs.add(record.replace_schema_metadata(INDEX.metadata))
        replaced.update(replaced_by(record))
        if record.num_rows:
            files.add(name)
    return files, replaced


def index_tables(uri: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Columns of the index that is there now, in order and some rows at a time; nothing without an index."""
    path = storage.join_uri(uri, INDEX_FILE)
    if not storage.exists(path):
        return
    with open_file(path) as file:
        for batch in pq.ParquetFile(file).iter_batches(ROW_GROUP_ROWS, columns=list(columns), use_threads=False):
            yield pa.Table.from_batches([batch])


def read_indexed_digest(uri: str) -> bytes | None:
    """`indexed_digest` of what the index that is there now was made from; None without an index."""
    path = storage.join_uri(uri, INDEX_FILE)
    if not storage.exists(path):
        return None
    with open_file(path) as file:
        return bytes((pq.read_schema(file).metadata or {}).get(INDEXED_KEY, b""))


def _current_rows(committed: pa.Table, planned: pa.Table, indexed: pa.Table) -> pa.Table:
    found = list(_versions(committed))
    versions = {**dict(reversed(found)), **dict(_versions(indexed))}
    versions |= dict(_versions(planned.filter(pc.equal(planned["status"], "planned"))))
    is_current = [versions[media_id] == source_version for media_id, source_version in found]
    rows = committed if all(is_current) else committed.filter(pa.array(is_current, pa.bool_()))
    return best_rows(rows).sort_by([("media_id", "ascending"), ("segment_index", "ascending")])


def _versions(table: pa.Table) -> Iterator[tuple[str, str]]:
    return zip(table["media_id"].to_pylist(), table["source_version"].to_pylist(), strict=True)


def _write(file: IO[bytes], tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    """Tables to row groups of ROW_GROUP_ROWS, whatever their sizes."""
    with pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
        rest = schema.empty_table()
        for table in tables:
            rest = pa.concat_tables([rest, table.cast(schema)])
            if full := rest.num_rows - rest.num_rows % ROW_GROUP_ROWS:
                _write_rows(writer, rest.slice(0, full))
                rest = rest.slice(full).combine_chunks()  # lets go of what was written
        if rest.num_rows:
            _write_rows(writer, rest)


def _write_rows(writer: Any, rows: pa.Table) -> None:
    writer.write_table(rows, row_group_size=ROW_GROUP_ROWS)
