"""A medium that lies inside another file: its address, and a file object over it alone.

    shard.tar#offset=1536&size=20480            a member of a tar
    shard.parquet#column=jpg&row_group=0&row=5  a value of a binary column; column may be a struct's field, image.bytes

Knows addresses, byte ranges and Parquet cells. Does not list what is inside a file (shards.py), nor media.
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
"""A cell can only be read with its whole row group; items come in order, so neighbours find theirs at hand."""

_RANGE = re.compile(r"^(?P<uri>.+)#offset=(?P<offset>\d+)&size=(?P<size>\d+)$")
_CELL = re.compile(r"^(?P<uri>.+)#column=(?P<column>[^&#]+)&row_group=(?P<row_group>\d+)&row=(?P<row>\d+)$")


class RangeLocation(NamedTuple):
    """Bytes offset .. offset + size of a file."""

    uri: str
    offset: int
    size: int

    def address(self) -> str:
        """As it stands in a plan."""
        return f"{self.uri}#offset={self.offset}&size={self.size}"


class CellLocation(NamedTuple):
    """One value of a Parquet file."""

    uri: str
    column: str
    row_group: int
    row: int
    """within the row group"""

    def address(self) -> str:
        """As it stands in a plan."""
        return f"{self.uri}#column={quote(self.column)}&row_group={self.row_group}&row={self.row}"


def parse_location(uri: str) -> RangeLocation | CellLocation | None:
    """The part that `uri` addresses; None when it is a file of its own."""
    if found := _RANGE.match(uri):
        return RangeLocation(found["uri"], int(found["offset"]), int(found["size"]))
    if found := _CELL.match(uri):
        return CellLocation(found["uri"], unquote(found["column"]), int(found["row_group"]), int(found["row"]))
    return None


def open_location(part: RangeLocation | CellLocation) -> Any:
    """A seekable file object over the part alone.

    Raises:
        OSError: when the file is missing, damaged, or does not hold the part.
    """
    if isinstance(part, RangeLocation):
        return io.BufferedReader(_Range(open_file(part.uri), part.offset, part.size))
    try:
        with _CELLS_LOCK:  # sixteen threads that miss together would read the row group sixteen times
            values = _read_cells(part.uri, part.column, part.row_group)
        return io.BytesIO(values[part.row].as_py() or b"")
    except (pa.ArrowException, KeyError, IndexError) as error:  # the file is another one than was planned
        raise OSError(errno.EIO, f"no such value, or damaged: {error}", part.uri) from error


class _Range(io.RawIOBase):
    """A window on a file object, which it owns."""

    def __init__(self, file: Any, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._place = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, base + place)
        return self._place

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._size - self._place))
        self._file.seek(self._offset + self._place)
        data = self._file.read(wanted)
        buffer[: len(data)] = data
        self._place += len(data)
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
