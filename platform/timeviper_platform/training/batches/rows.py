"""Reads the SAMPLES rows of a mixture into memory, or maps large ones from a file."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from timeviper_platform.common import schemas, storage
from timeviper_platform.common.machine_cache import machine_file

MAX_IN_MEMORY_BYTES = 64 << 20
"""Maximum Parquet bytes read into memory per process."""

ROWS_PER_BATCH = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpectedSamples:
    """Expected samples of one kind in a missing source, for dry runs."""

    num_samples: int
    num_frames: int = 0
    """Frames per sample, before the phase's max_frames."""
    num_text_tokens: int = 0
    """Text tokens per sample; all count as labelled."""

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.num_frames < 0 or self.num_text_tokens < 1:
            raise ValueError(
                f"expected: {self.num_samples = } and {self.num_text_tokens = } must be at least 1,"
                f" {self.num_frames = } at least 0"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    uri: str
    """Parquet file of SAMPLES rows, or a folder of such files."""
    weight: float = 1.0
    """Repeats per epoch, multiplied by each row's own weight; 0.25 draws a seeded quarter of the rows."""
    expected: tuple[ExpectedSamples, ...] = ()
    """Expected contents, for dry runs before the files exist."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"{self.weight = } of {self.uri} must be finite and at least 0")


class SampleRows:
    """Rows of a mixture, in the order of its sources.

    Args:
        weights: (num_rows,) repeats of each row per epoch.
    """

    def __init__(self, table: pa.Table, weights: np.ndarray, digest: str) -> None:
        self._table = table
        self.weights = weights
        self.digest = digest

    @classmethod
    def read(cls, sources: Sequence[SourceConfig], *, max_in_memory_bytes: int = MAX_IN_MEMORY_BYTES) -> SampleRows:
        """Reads the rows of every source.

        Above `max_in_memory_bytes`, all processes of this machine map one file.

        Raises:
            ValueError: when a file is missing or invalid, or there are no rows.
            RuntimeError: when a file changes while it is read.
        """
        files = [_SourceFile(uri, source.weight) for source in sources for uri in source_files(source.uri)]
        contents, digest = _read_all(files, max_in_memory_bytes)
        table = _mapped(files, digest) if contents is None else pa.concat_tables(map(_rows, files, contents))
        if not table.num_rows:
            raise ValueError(f"the samples {[source.uri for source in sources]} hold no rows")
        return cls(table, table["weight"].to_numpy(), digest)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.block(index, 1)[0]

    def block(self, start: int, count: int) -> list[dict[str, Any]]:
        values: list[dict[str, Any]] = self._table.slice(start, count).to_pylist()
        return values

    def has_kind(self, kind: str) -> bool:
        return pc.any(pc.equal(self._table["kind"], kind)).as_py() or False

    def sample_ids(self, indices: np.ndarray) -> list[str]:
        """Returns the ids at ascending `indices`, reading all rows in between."""
        first = int(indices[0])
        ids = self._table["sample_id"].slice(first, int(indices[-1]) - first + 1).to_pylist()
        return [ids[index - first] for index in indices.tolist()]


def missing_sources(sources: Sequence[SourceConfig]) -> list[str]:
    return [source.uri for source in sources if not _existing_files(source.uri)]


def source_files(uri: str) -> list[str]:
    files = _existing_files(uri)
    if not files:
        raise ValueError(f"there are no samples at {uri!r}; set a Parquet file of SAMPLES rows or a folder of them")
    return files


def _existing_files(uri: str) -> list[str]:
    if uri.endswith(".parquet"):
        return [uri] if storage.exists(uri) else []
    return storage.files_in(uri, ".parquet")


class _SourceFile(NamedTuple):
    uri: str
    weight: float


def _read_all(files: Sequence[_SourceFile], max_bytes: int) -> tuple[list[bytes] | None, str]:
    contents: list[bytes] | None = []
    num_bytes, digest = 0, hashlib.sha256()
    for file in files:
        data = storage.read_bytes(file.uri)
        _add(digest, file, data)
        num_bytes += len(data)
        if num_bytes > max_bytes:
            contents = None
        if contents is not None:
            contents.append(data)
    return contents, digest.hexdigest()


def _add(digest: Any, file: _SourceFile, data: bytes) -> None:
    digest.update(f"{hashlib.sha256(data).hexdigest()} {file.weight!r}\n".encode())


def _rows(file: _SourceFile, data: bytes) -> pa.Table:
    try:
        table = pq.read_table(pa.BufferReader(data))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file.uri} is not a Parquet file: {error}") from error
    schemas.check_version(table.schema, schemas.SAMPLES, source=file.uri)
    table = _with_kind(table).select(schemas.SAMPLES.names).cast(schemas.SAMPLES)
    weights = pc.multiply(table["weight"].fill_null(1.0), file.weight)
    return table.set_column(table.schema.get_field_index("weight"), schemas.SAMPLES.field("weight"), weights)


def _with_kind(table: pa.Table) -> pa.Table:
    """Adds the column that files of earlier releases lack."""
    return table if "kind" in table.column_names else table.append_column("kind", pa.nulls(len(table), pa.string()))


def _mapped(files: Sequence[_SourceFile], digest: str) -> pa.Table:
    target = machine_file("samples", f"{digest}.arrow", lambda path: _write_mapped(files, digest, path))
    with pa.memory_map(str(target)) as source:
        return _with_kind(pa.ipc.open_file(source).read_all())


def _write_mapped(files: Sequence[_SourceFile], digest: str, target: Path) -> None:
    written = hashlib.sha256()
    with pa.ipc.new_file(str(target), schemas.SAMPLES) as writer:
        for file in files:
            data = storage.read_bytes(file.uri)
            _add(written, file, data)
            writer.write_table(_rows(file, data), max_chunksize=ROWS_PER_BATCH)
    if written.hexdigest() != digest:
        target.unlink()
        raise RuntimeError(f"one of {[file.uri for file in files]} changed while it was read; start the run again")
