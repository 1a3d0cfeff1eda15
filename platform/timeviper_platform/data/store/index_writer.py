"""Builds the index from commit records, a plan and the previous index.

Sorts on local disk (0.5 KB per segment), so memory does not grow with the store.
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
from timeviper_platform.data.store.commits import CommitLog, best_rows, files_digest, replaced_files
from timeviper_platform.data.store.index import ROW_GROUP_ROWS
from timeviper_platform.data.store.layout import INDEX_FILE, INDEX_WAY_OUT, damage_named
from timeviper_platform.data.store.sorted_runs import SortedRuns, merge_runs

FILES_KEY = b"timeviper.indexed"
"""`files_digest` of the indexed data files."""

_PLANNED_NAMES = (
    "media_id", "source_version", "segment_id", "uri", "status", "error_stage", "error_type", "error_message",
)  # fmt: skip
_PLANNED = pa.schema([field for field in PLAN if field.name in _PLANNED_NAMES])
_VERSIONS = pa.schema([INDEX.field("media_id"), INDEX.field("source_version")])


class MediaRows(NamedTuple):
    index: pa.Table
    """current INDEX rows, sorted by (media_id, segment_index)"""
    committed: pa.Table
    """INDEX rows of all records that are not replaced"""
    planned: pa.Table
    """some columns of the PLAN rows"""


def write_index(
    uri: str, current_versions: Mapping[str, str] | None = None, *, row_group_rows: int = ROW_GROUP_ROWS
) -> None:
    """Indexes one source_version per medium: that of `current_versions`, else that of the previous index."""
    media = current_versions or {}
    names = {"media_id": list(media), "source_version": list(media.values()), "status": ["planned"] * len(media)}
    missing = {name: [""] * len(media) for name in _PLANNED.names if name not in names}
    planned = pa.table({**names, **missing}).select(_PLANNED.names).cast(_PLANNED)
    merge_index(uri, [planned], row_group_rows=row_group_rows)


def merge_index(
    uri: str,
    planned: Iterable[pa.Table],
    visit: Callable[[MediaRows], None] | None = None,
    *,
    row_group_rows: int = ROW_GROUP_ROWS,
) -> None:
    """Writes the index with one source_version per medium: the planned, else the indexed, else the first committed.

    Args:
        planned: PLAN rows in the order of the plan.
        visit: called with all rows of a few media at a time, sorted by media_id.
    """
    with tempfile.TemporaryDirectory(prefix="timeviper-index-") as folder:
        runs = {
            "committed": SortedRuns(Path(folder, "committed"), INDEX, "media_id"),
            "planned": SortedRuns(Path(folder, "planned"), _PLANNED, "media_id"),
            "indexed": SortedRuns(Path(folder, "indexed"), _VERSIONS, "media_id"),
        }
        files, replaced = _sort_commits(CommitLog(uri), runs["committed"])
        for table in planned:
            runs["planned"].add(table)
        for table in index_tables(uri, _VERSIONS.names):
            runs["indexed"].add(table)
        stale = pa.array(sorted(replaced & files), pa.string())
        schema = INDEX.with_metadata(INDEX.metadata | {FILES_KEY: files_digest(files - replaced)})

        def blocks() -> Iterator[pa.Table]:
            for committed, of_plan, indexed in merge_runs(list(runs.values()), "media_id"):
                if len(stale):
                    committed = committed.filter(pc.invert(pc.is_in(committed["file"], stale)))
                rows = MediaRows(_current_rows(committed, of_plan, indexed), committed, of_plan)
                if visit is not None:
                    visit(rows)
                yield rows.index

        path = storage.join_uri(uri, INDEX_FILE)
        storage.write_atomic(path, lambda file: _write(file, blocks(), schema, row_group_rows))


def _sort_commits(commits: CommitLog, runs: SortedRuns) -> tuple[set[str], set[str]]:
    commits.remove_lost()
    files, replaced = set(), set()
    for name, record in commits.records():
        runs.add(record.replace_schema_metadata(INDEX.metadata))
        replaced.update(replaced_files(record))
        if record.num_rows:
            files.add(name)
    return files, replaced


def index_tables(uri: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yields columns of the existing index in batches."""
    path = storage.join_uri(uri, INDEX_FILE)
    if not storage.exists(path):
        return
    with damage_named(path, INDEX_WAY_OUT), open_file(path) as opened:
        file: Any = pq.ParquetFile(opened, page_checksum_verification=True)
        for batch in file.iter_batches(ROW_GROUP_ROWS, columns=list(columns), use_threads=False):
            yield pa.Table.from_batches([batch])


def read_files_digest(uri: str) -> bytes | None:
    path = storage.join_uri(uri, INDEX_FILE)
    if not storage.exists(path):
        return None
    with damage_named(path, INDEX_WAY_OUT), open_file(path) as file:
        return bytes((pq.read_schema(file).metadata or {}).get(FILES_KEY, b""))


def _current_rows(committed: pa.Table, planned: pa.Table, indexed: pa.Table) -> pa.Table:
    found = list(_versions(committed))
    versions = {**dict(reversed(found)), **dict(_versions(indexed))}
    versions |= dict(_versions(planned.filter(pc.equal(planned["status"], "planned"))))
    is_current = [versions[media_id] == source_version for media_id, source_version in found]
    rows = committed if all(is_current) else committed.filter(pa.array(is_current, pa.bool_()))
    return best_rows(rows).sort_by([("media_id", "ascending"), ("segment_index", "ascending")])


def _versions(table: pa.Table) -> Iterator[tuple[str, str]]:
    return zip(table["media_id"].to_pylist(), table["source_version"].to_pylist(), strict=True)


def _write(file: IO[bytes], tables: Iterable[pa.Table], schema: pa.Schema, row_group_rows: int) -> None:
    with pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
        rest = schema.empty_table()
        for table in tables:
            rest = pa.concat_tables([rest, table.cast(schema)])
            if full := rest.num_rows - rest.num_rows % row_group_rows:
                writer.write_table(rest.slice(0, full), row_group_size=row_group_rows)
                rest = rest.slice(full).combine_chunks()  # frees the written rows
        if rest.num_rows:
            writer.write_table(rest, row_group_size=row_group_rows)
