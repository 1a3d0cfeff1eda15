"""External merge sort. DuckDB takes half the CPU time but 1.4 GB instead of 0.3 GB for a million index rows.

for left, right in merge_runs([left_runs, right_runs], "media_id"):
    ...  # ascending ranges of media_id; all rows of a media_id are in one pair
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc


class SortedRuns:
    """Rows added in any order; the sort is stable.

    Args:
        folder: created here, removed by the caller.
        schema: the columns to keep.
        key: a string column without nulls.
    """

    run_bytes = 64 << 20
    """Size of a run; sorting copies it twice."""
    batch_rows = 1024
    """Rows read together: 1.3 MB of full index rows."""

    def __init__(self, folder: Path, schema: pa.Schema, key: str) -> None:
        folder.mkdir(parents=True)
        self._folder, self._schema, self._key = folder, schema, key
        self._pending: list[pa.Table] = []
        self._pending_bytes = 0
        self._paths: list[Path] = []

    def add(self, table: pa.Table) -> None:
        if table.num_rows:
            self._pending.append(table.select(self._schema.names).cast(self._schema))
            self._pending_bytes += table.nbytes
        if self._pending_bytes >= self.run_bytes:
            self._spill()

    def runs(self) -> list[Iterator[pa.Table]]:
        self._spill()
        return [_batches(path) for path in self._paths]

    @property
    def empty(self) -> pa.Table:
        return self._schema.empty_table()

    def _spill(self) -> None:
        if not self._pending:
            return
        run = pa.concat_tables(self._pending).combine_chunks()
        self._pending, self._pending_bytes = [], 0
        run = run.take(pc.sort_indices(run, [(self._key, "ascending")]))
        self._paths.append(self._folder / f"{len(self._paths):06d}.arrow")
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with pa.OSFile(str(self._paths[-1]), "wb") as file, pa.ipc.new_stream(file, run.schema, options=options) as out:
            out.write_table(run, max_chunksize=self.batch_rows)


def merge_runs(kinds: Sequence[SortedRuns], key: str) -> Iterator[tuple[pa.Table, ...]]:
    """Yields one sorted table per input for ascending ranges of the key.

    All rows of one key must fit in memory.
    """
    cursors = [[_Cursor(run, key) for run in kind.runs()] for kind in kinds]
    every = [cursor for of_kind in cursors for cursor in of_kind]
    while True:
        for cursor in every:
            if not cursor.num_rows:
                cursor.load()
        unfinished = [cursor.last for cursor in every if not cursor.is_done]
        bound = min(unfinished) if unfinished else None  # all rows below it are loaded
        block = tuple(
            _sorted([cursor.take_below(bound) for cursor in of_kind if cursor.num_rows], key) or kind.empty
            for kind, of_kind in zip(kinds, cursors, strict=True)
        )
        if any(table.num_rows for table in block):
            yield block
        elif bound is None:
            return
        else:
            for cursor in every:
                if not cursor.is_done and cursor.last == bound:
                    cursor.load()


def _batches(path: Path) -> Iterator[pa.Table]:
    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as stream:
        for batch in stream:
            yield pa.Table.from_batches([batch])


def _sorted(tables: Sequence[pa.Table], key: str) -> pa.Table | None:
    tables = [table for table in tables if table.num_rows]
    if not tables:
        return None
    rows = pa.concat_tables(tables).combine_chunks()
    return rows.take(pc.sort_indices(rows, [(key, "ascending")])) if len(tables) > 1 else rows


class _Cursor:
    def __init__(self, batches: Iterator[pa.Table], key: str) -> None:
        self._batches, self._key = batches, key
        self._loaded: pa.Table | None = None
        self._first = ""
        self.num_rows = 0
        self.last = ""
        """greatest loaded key"""
        self.is_done = False
        """True when the whole run is loaded"""

    def load(self) -> None:
        batch = next(self._batches, None)
        if batch is None:
            self.is_done = True
            return
        self._hold(batch if self._loaded is None else pa.concat_tables([self._loaded, batch]))

    def take_below(self, bound: str | None) -> pa.Table:
        """Removes and returns the rows below `bound`; None = all."""
        assert self._loaded is not None
        if bound is None:
            count = self.num_rows
        elif self._first >= bound:
            count = 0
        else:
            count = pc.sum(pc.less(self._loaded[self._key], bound)).as_py()
        taken = self._loaded.slice(0, count)
        if count:
            self._hold(self._loaded.slice(count))
        return taken

    def _hold(self, rows: pa.Table) -> None:
        self.num_rows = rows.num_rows
        self._loaded = rows if self.num_rows else None
        if self._loaded is not None:
            keys = rows[self._key]
            self._first, self.last = str(keys[0].as_py()), str(keys[-1].as_py())
