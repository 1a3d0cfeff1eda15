"""The rows of a mixture's SAMPLES files: small ones in memory, large ones in one file that all ranks of a machine map.

Knows Parquet, Arrow and the SAMPLES schema; not what a row says, nor tokens, stores or ranks.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from timeviper_platform.common import schemas, storage

MAX_KEPT_BYTES = 64 << 20
"""of Parquet files that each process keeps for itself; their rows take several times as much"""

ROWS_PER_BATCH = 1 << 16

KEPT_SECONDS = 7 * 24 * 3600.0
"""that a written mixture waits for the next run"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpectedSamples:
    """What a source is said to hold of one kind; a dry run counts with it until the files are there."""

    num_samples: int
    num_frames: int = 0
    """of a sample, as the phase thins them"""
    num_text_tokens: int = 0
    """of a sample; all of them count as labelled"""

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.num_frames < 0 or self.num_text_tokens < 1:
            raise ValueError(
                f"expected: {self.num_samples = } and {self.num_text_tokens = } must be at least 1,"
                f" {self.num_frames = } at least 0"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One part of a mixture."""

    uri: str
    """a Parquet file of SAMPLES rows, or a folder of them"""
    weight: float = 1.0
    """how often an epoch shows each row, times the row's own weight: 2 = twice, 0.25 = a seeded quarter of the rows"""
    expected: tuple[ExpectedSamples, ...] = ()
    """by kind; training itself never looks at it"""

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"{self.weight = } of {self.uri} must be a number of times, at least 0")


class SampleRows:
    """The rows of a mixture, in the order of its sources.

    Args:
        table: SAMPLES rows; may be mapped from a file.
        weights: (num_rows,) how often an epoch shows each row.
        digest: hash of the files and weights that they come from.
    """

    def __init__(self, table: pa.Table, weights: np.ndarray, digest: str) -> None:
        self._table = table
        self.weights = weights
        self.digest = digest

    @classmethod
    def read(cls, sources: Sequence[SourceConfig]) -> SampleRows:
        """The rows of every source.

        Files of more than MAX_KEPT_BYTES together are written once into one uncompressed file of this machine, which
        its processes map: the text of millions of samples is in memory once, and only as far as there is room for it.

        Raises:
            ValueError: when a file is missing, is not a SAMPLES file, or there is no row at all.
            RuntimeError: when a file changes while it is read.
        """
        files = [_File(uri, source.weight) for source in sources for uri in _source_files(source.uri)]
        contents, digest = _read_all(files)
        table = _mapped(files, digest) if contents is None else pa.concat_tables(map(_rows, files, contents))
        if not table.num_rows:
            raise ValueError(f"the samples {[source.uri for source in sources]} hold no rows")
        return cls(table, table["weight"].to_numpy(), digest)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.block(row, 1)[0]

    def block(self, start: int, count: int) -> list[dict[str, Any]]:
        """`count` rows from `start` on, fewer at the end."""
        values: list[dict[str, Any]] = self._table.slice(start, count).to_pylist()
        return values

    def sample_ids(self, numbers: np.ndarray) -> list[str]:
        """The ids of the rows with these numbers, which ascend and lie near each other."""
        first = int(numbers[0])
        ids = self._table["sample_id"].slice(first, int(numbers[-1]) - first + 1).to_pylist()
        return [ids[number - first] for number in numbers.tolist()]


def missing_sources(sources: Sequence[SourceConfig]) -> list[str]:
    """URIs of the sources that have no files."""
    return [source.uri for source in sources if not _existing_files(source.uri)]


def _source_files(uri: str) -> list[str]:
    files = _existing_files(uri)
    if not files:
        raise ValueError(f"there are no samples at {uri!r}; name a Parquet file of SAMPLES rows or a folder of them")
    return files


def _existing_files(uri: str) -> list[str]:
    if uri.endswith(".parquet"):
        return [uri] if storage.exists(uri) else []
    return storage.list_files(uri, ".parquet")


class _File(NamedTuple):
    """A Parquet file of one source."""

    uri: str
    weight: float
    """its source's"""


def _read_all(files: Sequence[_File]) -> tuple[list[bytes] | None, str]:
    """What the files hold, None when that is too much to keep; and the hash of it and of the weights."""
    contents: list[bytes] | None = []
    num_bytes, digest = 0, hashlib.sha256()
    for file in files:
        data = storage.read_bytes(file.uri)
        _add(digest, file, data)
        num_bytes += len(data)
        if num_bytes > MAX_KEPT_BYTES:
            contents = None
        if contents is not None:
            contents.append(data)
    return contents, digest.hexdigest()


def _add(digest: Any, file: _File, data: bytes) -> None:
    digest.update(f"{hashlib.sha256(data).hexdigest()} {file.weight!r}\n".encode())


def _rows(file: _File, data: bytes) -> pa.Table:
    """SAMPLES rows whose weight is their own times the source's."""
    try:
        table = pq.read_table(pa.BufferReader(data))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file.uri} is not a Parquet file: {error}") from error
    schemas.check_version(table.schema, schemas.SAMPLES, source=file.uri)
    table = table.select(schemas.SAMPLES.names).cast(schemas.SAMPLES)
    weights = pc.multiply(table["weight"].fill_null(1.0), file.weight)
    return table.set_column(table.schema.get_field_index("weight"), schemas.SAMPLES.field("weight"), weights)


def _mapped(files: Sequence[_File], digest: str) -> pa.Table:
    """The rows of all files, mapped from one file; the first process of this machine to come here writes it."""
    folder = Path(tempfile.gettempdir(), f"timeviper-samples-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} is another user's; set TMPDIR to a folder of your own")
    target = folder / f"{digest}.arrow"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the others wait here
        if not target.exists():
            _remove_old(folder)
            partial = target.with_suffix(".partial")
            _write_mapped(files, digest, partial)
            partial.replace(target)
        os.utime(target)
    with pa.memory_map(str(target)) as source:
        return pa.ipc.open_file(source).read_all()


def _write_mapped(files: Sequence[_File], digest: str, target: Path) -> None:
    """One source file in memory at a time."""
    again = hashlib.sha256()
    with pa.ipc.new_file(str(target), schemas.SAMPLES) as writer:
        for file in files:
            data = storage.read_bytes(file.uri)
            _add(again, file, data)
            writer.write_table(_rows(file, data), max_chunksize=ROWS_PER_BATCH)
    if again.hexdigest() != digest:
        target.unlink()
        raise RuntimeError(f"one of {[file.uri for file in files]} has changed while it was read; start again")


def _remove_old(folder: Path) -> None:
    """Mixtures that nobody has opened for KEPT_SECONDS; who has one mapped keeps it."""
    for path in folder.glob("*.arrow"):
        if time.time() - path.stat().st_mtime > KEPT_SECONDS:
            path.unlink()
