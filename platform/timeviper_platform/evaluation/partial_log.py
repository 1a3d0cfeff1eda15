"""Rows of an unfinished evaluation, a file per batch below OUTPUT.partial, so that a killed run can continue."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from timeviper_platform.common import storage
from timeviper_platform.common.lease import hold_lease


@contextlib.contextmanager
def only_writer_of(output: str) -> Iterator[None]:
    """Holds a lease on the report `output` and the files beside it inside the block.

    Raises:
        LeaseHeldError: if another job holds it.
    """
    folder = _folder_of(output)
    try:
        with hold_lease(folder, "jobs/evaluate.py"):
            yield
    finally:
        _remove_empty(folder)


class PartialLog:
    """
    Args:
        output: JSON report of the evaluation.
        run_hash: identifies what determines a row; rows of another run are not read.
        schema: of the rows.
    """

    def __init__(self, output: str, run_hash: str, schema: pa.Schema) -> None:
        self._root = _folder_of(output)
        self._folder = storage.join_uri(self._root, run_hash)
        self._schema = schema
        self._num_files = 0

    def read(self) -> list[dict[str, Any]]:
        """Returns the rows of earlier runs."""
        files = storage.files_in(self._folder, ".parquet")
        self._num_files = 1 + max((int(uri.rpartition("/")[2].split(".")[0]) for uri in files), default=-1)
        return [row for uri in files for row in _read_table(uri).to_pylist()]

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        uri = storage.join_uri(self._folder, f"{self._num_files:06d}.parquet")
        write_rows(uri, rows, self._schema)
        self._num_files += 1

    def remove(self) -> None:
        """Removes the rows of every run."""
        for folder in storage.folders_in(self._root):
            storage.remove(folder)
        _remove_empty(self._root)


def _folder_of(output: str) -> str:
    return f"{output.removesuffix('.json')}.partial"


def _remove_empty(folder: str) -> None:
    if storage.is_local(folder):
        with contextlib.suppress(OSError):  # not empty
            Path(storage.split_uri(folder)[1]).rmdir()


def write_rows(uri: str, rows: Sequence[dict[str, Any]], schema: pa.Schema) -> None:
    table = pa.Table.from_pylist(list(rows), schema=schema)
    storage.write_atomic(uri, lambda file: pq.write_table(table, file))


def _read_table(uri: str) -> Any:
    with storage.open_file(uri) as file:
        return pq.read_table(file)
