"""Addresses of media inside other files.

shard.tar#offset=1536&size=20480            a member of a tar
shard.parquet#column=jpg&row_group=0&row=5  a cell of a binary column, or of a struct's field (image.bytes)
"""

from __future__ import annotations

import errno
import io
import re
import threading
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.parquet as pq

from timeviper_platform.common.storage import open_file

CACHED_ROW_GROUPS = 2
"""Row groups kept for neighbouring cells."""

_RANGE = re.compile(r"^(?P<uri>.+)#offset=(?P<offset>\d+)&size=(?P<size>\d+)$")
_CELL = re.compile(r"^(?P<uri>.+)#column=(?P<column>[^&#]+)&row_group=(?P<row_group>\d+)&row=(?P<row>\d+)$")


class RangeLocation(NamedTuple):
    """Bytes [offset, offset + size) of a file."""

    uri: str
    offset: int
    size: int

    def address(self) -> str:
        return f"{self.uri}#offset={self.offset}&size={self.size}"


class CellLocation(NamedTuple):
    uri: str
    column: str
    row_group: int
    row: int
    """Row within the row group."""

    def address(self) -> str:
        return f"{self.uri}#column={quote(self.column)}&row_group={self.row_group}&row={self.row}"


def parse_location(uri: str) -> RangeLocation | CellLocation | None:
    """Returns None for a whole file."""
    if found := _RANGE.match(uri):
        return RangeLocation(found["uri"], int(found["offset"]), int(found["size"]))
    if found := _CELL.match(uri):
        return CellLocation(found["uri"], unquote(found["column"]), int(found["row_group"]), int(found["row"]))
    return None


def open_location(location: RangeLocation | CellLocation) -> Any:
    """Opens a seekable file over `location`. Raises OSError when the file lacks it."""
    if isinstance(location, RangeLocation):
        return io.BufferedReader(_RangeFile(open_file(location.uri), location.offset, location.size))
    try:
        with _CELLS_LOCK:  # else every thread that misses would read the row group
            values = _read_cells(location.uri, location.column, location.row_group)
        return io.BytesIO(values[location.row].as_py() or b"")
    except (pa.ArrowException, KeyError, IndexError) as error:  # not the file that was planned
        raise OSError(errno.EIO, f"no such cell, or the file is damaged: {error}", location.uri) from error


class _RangeFile(io.RawIOBase):
    def __init__(self, file: Any, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._position = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._position))
        self._file.seek(self._offset + self._position)
        data = self._file.read(count)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


_CELLS_LOCK = threading.Lock()


@lru_cache(maxsize=CACHED_ROW_GROUPS)
def _read_cells(uri: str, column: str, row_group: int) -> Any:
    with open_file(uri) as file:
        table = pq.ParquetFile(file).read_row_group(row_group, columns=[column])
    values = table.column(0)
    name, _, field = column.partition(".")
    return values.combine_chunks().field(field) if field and table.column_names == [name] else values
