"""Addresses of media inside other files.

shard.tar#offset=1536&size=20480            a member of a tar
shard.parquet#column=jpg&row_group=0&row=5  a cell of a binary column, or of a struct's field (image.bytes)
                                    &item=2 in a list of them
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
_CELL = re.compile(
    r"^(?P<uri>.+)#column=(?P<column>[^&#]+)&row_group=(?P<row_group>\d+)&row=(?P<row>\d+)(&item=(?P<item>\d+))?$"
)


class RangeLocation(NamedTuple):
    """Bytes [offset, offset + size) of a file."""

    uri: str
    offset: int
    size: int

    def address(self) -> str:
        return f"{self.uri}#offset={self.offset}&size={self.size}"

    def version_text(self) -> str:
        return f"{self.offset}-{self.size}"


class CellLocation(NamedTuple):
    uri: str
    column: str
    row_group: int
    row: int
    """Row within the row group."""
    item: int | None = None
    """Position in a list."""

    def address(self) -> str:
        item = "" if self.item is None else f"&item={self.item}"
        return f"{self.uri}#column={quote(self.column)}&row_group={self.row_group}&row={self.row}{item}"

    def version_text(self) -> str:
        return f"{self.column}-{self.row_group}-{self.row}" + ("" if self.item is None else f"-{self.item}")


def parse_location(uri: str) -> RangeLocation | CellLocation | None:
    """Returns None for a whole file."""
    if found := _RANGE.match(uri):
        return RangeLocation(found["uri"], int(found["offset"]), int(found["size"]))
    if found := _CELL.match(uri):
        item = None if found["item"] is None else int(found["item"])
        return CellLocation(found["uri"], unquote(found["column"]), int(found["row_group"]), int(found["row"]), item)
    return None


def open_location(location: RangeLocation | CellLocation) -> Any:
    """Opens a seekable file over `location`. Raises OSError when the file lacks it."""
    if isinstance(location, RangeLocation):
        return io.BufferedReader(_RangeFile(open_file(location.uri), location.offset, location.size))
    try:
        with _CELLS_LOCK:  # else every thread that misses would read the row group
            values, field = _read_cells(location.uri, location.column, location.row_group)
        value = values[location.row]
        if location.item is not None:
            value = value[location.item]
        if field is not None:
            value = value[field]
        return io.BytesIO(value.as_py() or b"")
    except (pa.ArrowException, LookupError, TypeError) as error:  # not the file that was planned
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
def _read_cells(uri: str, column: str, row_group: int) -> tuple[Any, str | None]:
    """Returns the column's cells, and the field of a struct that holds the bytes."""
    with open_file(uri) as file:
        parquet = pq.ParquetFile(file)
        name, _, field = column.rpartition(".")
        is_field = bool(name) and column not in parquet.schema_arrow.names
        # a list's field has other names between, such as images.list.element.bytes
        is_list = is_field and not pa.types.is_struct(parquet.schema_arrow.field(name).type)
        table = parquet.read_row_group(row_group, columns=[name if is_list else column])
    return table.column(0), field if is_field else None
