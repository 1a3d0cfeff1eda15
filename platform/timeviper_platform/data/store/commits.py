"""The commit records of a feature store: which data files count, and the INDEX rows of each.

Knows where records lie, that each has a data file, that one may name others that it replaces, and which of several
rows of a segment counts. Reads many at a time, for on an object store each is a request. Does not know what is in data
files, nor the index.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from timeviper_platform.common import schemas, storage
from timeviper_platform.common.listing import names_in, pages
from timeviper_platform.data.store.layout import COMMITS_FOLDER, DATA_FOLDER

logger = logging.getLogger(__name__)

READERS = 16
"""Requests at a time; they wait, they do not work."""

READ_AHEAD = 128
"""Records in memory at a time; one of 32 full segments is 40 KB."""

RANK = {"ok": 0, "partial": 1, "error": 2}
"""Of a row's status: the lowest of a segment counts."""

_REPLACES = b"timeviper.replaces"
"""In a commit record's metadata: a JSON list of the data files whose rows it holds now."""


def iter_commits(uri: str, columns: Sequence[str] | None = None) -> Iterator[tuple[str, pa.Table]]:
    """Every commit record by the name of its data file, in sorted order, those that others replace among them."""
    with ThreadPoolExecutor(READERS) as pool:
        for page in pages(committed_files(uri), READ_AHEAD):
            yield from zip(page, pool.map(lambda name: read_commit(uri, name, columns), page), strict=True)


def lost_records(uri: str) -> Iterator[str]:
    """Names of commit records whose data file is not there: their segments are not done.

    A worker that outlives its run leaves one when the next run has cleared away its file in the moment before.
    """
    for name in _only_in_first(committed_files(uri), data_files(uri)):
        if not has_data_file(uri, name):  # it may have come while the folders were listed
            yield name


def remove_lost(uri: str) -> int:
    """Removes commit records without a data file, so that their segments are done again; returns how many."""
    lost = list(lost_records(uri))
    for name in lost:
        logger.warning("%s: %s is committed but has no data file; its segments count as not done", uri, name)
        storage.remove(storage.join_uri(uri, COMMITS_FOLDER, name))
    return len(lost)


def uncommitted_files(uri: str) -> Iterator[str]:
    """Names of data files without a commit record."""
    for name in _only_in_first(data_files(uri), committed_files(uri)):
        if not storage.exists(storage.join_uri(uri, COMMITS_FOLDER, name)):
            yield name


def has_data_file(uri: str, name: str) -> bool:
    """True when what the commit record of this name says can be there."""
    return storage.exists(storage.join_uri(uri, DATA_FOLDER, name))


def committed_files(uri: str) -> Iterator[str]:
    """Names of data files with a commit record, in sorted order."""
    return _names(uri, COMMITS_FOLDER)


def data_files(uri: str) -> Iterator[str]:
    """Names of data files that are there, in sorted order."""
    return _names(uri, DATA_FOLDER)


def _names(uri: str, folder: str) -> Iterator[str]:
    """Whole files' names in a folder of the store, in sorted order."""
    names = names_in(storage.join_uri(uri, folder))
    return (name for name in names if name.endswith(".parquet") and not name.startswith("."))


def _only_in_first(first: Iterator[str], second: Iterator[str]) -> Iterator[str]:
    """Of two sorted sequences; neither is held."""
    other = next(second, None)
    for name in first:
        while other is not None and other < name:
            other = next(second, None)
        if other != name:
            yield name


def read_commit(uri: str, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The commit record of the data file `name`, its own metadata included."""
    data = storage.read_bytes(storage.join_uri(uri, COMMITS_FOLDER, name))
    return pq.ParquetFile(pa.BufferReader(data)).read(columns=columns, use_threads=False)


def replaced_by(record: pa.Table) -> list[str]:
    """The data files whose rows a commit record holds now."""
    return list(json.loads((record.schema.metadata or {}).get(_REPLACES, "[]")))


def iter_counted(uri: str, columns: Sequence[str] | None = None) -> Iterator[tuple[str, pa.Table]]:
    """`iter_commits` without those that others replace; reads every record twice: the last may replace the first."""
    replaced = {name for _, record in iter_commits(uri, columns=[]) for name in replaced_by(record)}
    return ((name, record) for name, record in iter_commits(uri, columns) if name not in replaced)


def write_commit(uri: str, file_name: str, rows: pa.Table, replaces: Sequence[str] = ()) -> None:
    """Makes a data file count, and those that it replaces stop to, in one write."""
    metadata = schemas.INDEX.metadata | ({_REPLACES: json.dumps(list(replaces)).encode()} if replaces else {})
    write_table(storage.join_uri(uri, COMMITS_FOLDER, file_name), rows.replace_schema_metadata(metadata))


def write_table(uri: str, table: pa.Table) -> None:
    """Writes a small table, all or nothing."""
    storage.write_atomic(uri, lambda file: pq.write_table(table, file, compression="zstd", write_page_checksum=True))


def best_rows(committed: pa.Table) -> pa.Table:
    """One row a segment_id: ok before partial before error, so that a repaired segment replaces its error."""
    best: dict[str, tuple[int, int]] = {}
    pairs = zip(committed["segment_id"].to_pylist(), committed["status"].to_pylist(), strict=True)
    for number, (segment_id, status) in enumerate(pairs):
        if segment_id not in best or RANK[status] < best[segment_id][0]:
            best[segment_id] = (RANK[status], number)
    if len(best) == committed.num_rows:
        return committed
    return committed.take(pa.array(sorted(number for _, number in best.values()), pa.int64()))


def indexed_digest(names: Iterable[str]) -> bytes:
    """Stands for the data files whose rows an index was made from."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest().encode()


def num_feature_bytes(rows: pa.Table) -> int:
    """Bytes of the features of INDEX rows."""
    frames, tokens, dim = (rows[name].cast(pa.int64()) for name in ("num_frames", "num_tokens_per_frame", "dim"))
    return 2 * (pc.sum(pc.multiply(pc.multiply(frames, tokens), dim)).as_py() or 0)
