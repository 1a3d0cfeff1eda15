"""Commit records: the INDEX rows of committed data files."""

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
from timeviper_platform.data.store.layout import COMMIT_WAY_OUT, COMMITS_FOLDER, DATA_FOLDER, damage_named

logger = logging.getLogger(__name__)

NUM_READERS = 16

STATUS_RANK = {"ok": 0, "partial": 1, "error": 2}
"""The lowest rank wins."""

_REPLACES = b"timeviper.replaces"
"""JSON list of data files."""


class CommitLog:
    """Commit records of the store at `uri`. Every call reads the storage."""

    read_ahead = 128
    """Records in memory; one of 32 full segments takes 40 KB."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def names(self) -> Iterator[str]:
        """Sorted names of committed data files."""
        return self._names(COMMITS_FOLDER)

    def data_files(self) -> Iterator[str]:
        """Sorted names of all data files."""
        return self._names(DATA_FOLDER)

    def read(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        uri = storage.join_uri(self.uri, COMMITS_FOLDER, name)
        data = storage.read_bytes(uri)
        with damage_named(uri, COMMIT_WAY_OUT):
            file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
            return file.read(columns=columns, use_threads=False)

    def records(self, columns: Sequence[str] | None = None) -> Iterator[tuple[str, pa.Table]]:
        """Yields (name, record), sorted by name."""
        with ThreadPoolExecutor(NUM_READERS) as pool:
            for page in pages(self.names(), self.read_ahead):
                yield from zip(page, pool.map(lambda name: self.read(name, columns), page), strict=True)

    def current_records(self, columns: Sequence[str] | None = None) -> Iterator[tuple[str, pa.Table]]:
        """Yields records that no other record replaces. Reads all twice."""
        replaced = {name for _, record in self.records(columns=[]) for name in replaced_files(record)}
        return ((name, record) for name, record in self.records(columns) if name not in replaced)

    def write(self, name: str, rows: pa.Table, replaces: Sequence[str] = ()) -> None:
        """Commits the data file `name` and replaces others in the same write."""
        metadata = schemas.INDEX.metadata | ({_REPLACES: json.dumps(list(replaces)).encode()} if replaces else {})
        write_table(storage.join_uri(self.uri, COMMITS_FOLDER, name), rows.replace_schema_metadata(metadata))

    def has_data_file(self, name: str) -> bool:
        return storage.exists(storage.join_uri(self.uri, DATA_FOLDER, name))

    def lost(self) -> Iterator[str]:
        """Names of records without a data file."""
        for name in _only_in_first(self.names(), self.data_files()):
            if not self.has_data_file(name):  # written during the listing
                yield name

    def remove_lost(self) -> int:
        lost = list(self.lost())
        for name in lost:
            logger.warning("%s: %s is committed but has no data file; its segments count as not done", self.uri, name)
            storage.remove(storage.join_uri(self.uri, COMMITS_FOLDER, name))
        return len(lost)

    def uncommitted(self) -> Iterator[str]:
        """Names of data files without a record."""
        for name in _only_in_first(self.data_files(), self.names()):
            if not storage.exists(storage.join_uri(self.uri, COMMITS_FOLDER, name)):
                yield name

    def _names(self, folder: str) -> Iterator[str]:
        names = names_in(storage.join_uri(self.uri, folder))
        return (name for name in names if name.endswith(".parquet") and not name.startswith("."))


def _only_in_first(first: Iterator[str], second: Iterator[str]) -> Iterator[str]:
    other = next(second, None)
    for name in first:
        while other is not None and other < name:
            other = next(second, None)
        if other != name:
            yield name


def replaced_files(record: pa.Table) -> list[str]:
    return list(json.loads((record.schema.metadata or {}).get(_REPLACES, "[]")))


def write_table(uri: str, table: pa.Table) -> None:
    storage.write_atomic(uri, lambda file: pq.write_table(table, file, compression="zstd", write_page_checksum=True))


def best_rows(committed: pa.Table) -> pa.Table:
    """Returns one row per segment_id: a repaired segment replaces its error."""
    best: dict[str, tuple[int, int]] = {}
    pairs = zip(committed["segment_id"].to_pylist(), committed["status"].to_pylist(), strict=True)
    for row, (segment_id, status) in enumerate(pairs):
        if segment_id not in best or STATUS_RANK[status] < best[segment_id][0]:
            best[segment_id] = (STATUS_RANK[status], row)
    if len(best) == committed.num_rows:
        return committed
    return committed.take(pa.array(sorted(row for _, row in best.values()), pa.int64()))


def files_digest(names: Iterable[str]) -> bytes:
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest().encode()


def num_feature_bytes(rows: pa.Table) -> int:
    frames, tokens, dim = (rows[name].cast(pa.int64()) for name in ("num_frames", "num_tokens_per_frame", "dim"))
    return 2 * (pc.sum(pc.multiply(pc.multiply(frames, tokens), dim)).as_py() or 0)
