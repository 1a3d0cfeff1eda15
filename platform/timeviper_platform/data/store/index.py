"""Reads the index. Ids, counts and locations stay in memory, the rest (1 KB per segment) is decoded on demand."""

from __future__ import annotations

import tempfile
import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from timeviper_platform.common import schemas, storage
from timeviper_platform.data.store.layout import INDEX_WAY_OUT, damage_named

ROW_GROUP_ROWS = 2048
"""Rows decoded together: 2 MB of frame times, 3 ms."""

DETAILS_CACHE_BYTES = 64 << 20

MAX_LOOKUPS = 4096
"""Maximum cached positions of media."""

Modality = Literal["video", "image"]

_COUNTS = ("num_frames", "num_tokens_per_frame", "dim", "duration_seconds", "row_group", "row_in_group")
_WORDS = ["file", "modality", "status"]
_DETAILS = ["segment_id", "uri", "sha256", "frame_times_seconds", "frame_pts_seconds"]


class RowLocation(NamedTuple):
    file: str
    row_group: int
    row_in_group: int


class SortedStrings(Sequence[str]):
    def __init__(self, values: pa.Array) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [str(value) for value in self._values[index].to_pylist()]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return str(self._values[index % len(self)].as_py())

    def __contains__(self, value: object) -> bool:
        return isinstance(value, str) and self.position(value) is not None

    def position(self, value: str) -> int | None:
        position = bisect_left(self, value)
        return position if position < len(self) and self[position] == value else None


class StoreIndex:
    """INDEX rows sorted by (media_id, segment_index), without errors. Thread-safe."""

    def __init__(self, file: Any, details_cache_bytes: int = DETAILS_CACHE_BYTES) -> None:
        self._file = file
        self._details_cache_max = details_cache_bytes
        self._lock = threading.Lock()
        self._details_cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._details_bytes = 0
        self._by_sha256: tuple[SortedStrings, np.ndarray] | None = None
        self._by_uri: tuple[SortedStrings, np.ndarray] | None = None
        usable = pc.not_equal(_column(file, "status"), "error")
        self._numbers = np.flatnonzero(usable).astype(np.int32)
        """file position of each usable row"""
        self._counts = {name: _column(file, name).filter(usable).to_numpy() for name in _COUNTS}
        self._words = {name: _column(file, name).filter(usable) for name in ("file", "modality")}
        ids = _column(file, "media_id").filter(usable)
        starts = _first_rows(ids)
        self.media_ids = SortedStrings(ids.take(pa.array(starts)))
        self._position = lru_cache(maxsize=MAX_LOOKUPS)(self.media_ids.position)
        self._starts = np.append(starts, len(ids))
        sizes = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
        self._group_ends = np.cumsum(sizes)
        pa.default_memory_pool().release_unused()  # reading leaves as much memory unused as the columns take

    @classmethod
    def open(cls, uri: str, *, details_cache_bytes: int = DETAILS_CACHE_BYTES) -> StoreIndex:
        """Opens a snapshot; raises FileNotFoundError if there is no index."""
        with damage_named(uri, INDEX_WAY_OUT):
            file = _open_snapshot(uri)
            schemas.check_version(file.schema_arrow, schemas.INDEX, source=uri)
            return cls(file, details_cache_bytes)

    def __contains__(self, media_id: object) -> bool:
        return isinstance(media_id, str) and self._position(media_id) is not None

    def rows_of(self, media_id: str) -> range:
        """Raises KeyError if the medium has no rows."""
        position = self._position(media_id)
        if position is None:
            raise KeyError(media_id)
        return range(int(self._starts[position]), int(self._starts[position + 1]))

    def find(self, sha256: str) -> str | None:
        """Finds the whole medium with these bytes, unless it lacks segments."""
        with self._lock:
            if self._by_sha256 is None:
                self._by_sha256 = self._sorted_values("sha256")
        return self._media_id(self._by_sha256, sha256)

    def find_uri(self, uri: str) -> str | None:
        """Finds the whole medium at this address, unless it lacks segments."""
        with self._lock:
            if self._by_uri is None:
                self._by_uri = self._sorted_values("uri")
        return self._media_id(self._by_uri, uri)

    def _media_id(self, sorted_values: tuple[SortedStrings, np.ndarray], value: str) -> str | None:
        values, order = sorted_values
        position = values.position(value)
        return None if position is None else self.media_ids[int(order[position])]

    def _sorted_values(self, name: str) -> tuple[SortedStrings, np.ndarray]:
        """Values of a column for whole media, and the media's positions."""
        of_media = self._of_whole_media(name)
        order = pc.sort_indices(of_media).to_numpy()[: len(of_media) - of_media.null_count]  # nulls come last
        return SortedStrings(of_media.take(pa.array(order))), order

    def _of_whole_media(self, name: str) -> pa.Array:
        """A column's value for each medium; null for clips (their file is longer) and media with gaps."""
        first = pa.array(self._numbers[self._starts[:-1]])
        values, versions, segments = (
            _column(self._file, column).take(first) for column in (name, "source_version", "num_segments")
        )
        is_whole = pc.invert(pc.match_substring(versions, schemas.CLIP_MARK))
        has_all = pc.equal(segments, pa.array(np.diff(self._starts)))
        return pc.if_else(pc.and_(is_whole, has_all), values, None)

    def location(self, row: int) -> RowLocation:
        file = str(self._words["file"][row].as_py())
        return RowLocation(file, int(self._counts["row_group"][row]), int(self._counts["row_in_group"][row]))

    def shape(self, row: int) -> tuple[int, int, int]:
        """(F, N, dim) of a row."""
        frames, tokens, dim = (self._counts[name][row] for name in ("num_frames", "num_tokens_per_frame", "dim"))
        return int(frames), int(tokens), int(dim)

    def num_frames(self, rows: range) -> np.ndarray:
        return self._counts["num_frames"][rows.start : rows.stop]

    def modality(self, row: int) -> Modality:
        return "image" if self._words["modality"][row].as_py() == "image" else "video"

    def duration_seconds(self, row: int) -> float:
        return float(self._counts["duration_seconds"][row])

    def text(self, name: str, row: int) -> str | None:
        """segment_id, uri or sha256 of a row."""
        table, index = self._details(row)
        value = table[name][index].as_py()
        return None if value is None else str(value)

    def seconds(self, name: str, rows: range) -> np.ndarray:
        """frame_times_seconds or frame_pts_seconds of consecutive rows, (F,) float64."""
        parts = [np.empty(0)]
        for row in rows:
            table, index = self._details(row)
            scalar = table[name][index]
            parts += [scalar.values.to_numpy()] if scalar.is_valid else []
        return np.concatenate(parts)

    def _details(self, row: int) -> tuple[pa.Table, int]:
        """The decoded row group of a row, and the row's position in it."""
        number = int(self._numbers[row])
        group = int(np.searchsorted(self._group_ends, number, side="right"))
        index = number - (int(self._group_ends[group - 1]) if group else 0)
        with self._lock:  # a ParquetFile is not thread-safe
            if group not in self._details_cache:
                table = self._file.read_row_group(group, columns=_DETAILS, use_threads=False)
                self._details_cache[group] = table
                self._details_bytes += table.nbytes
                while self._details_bytes > self._details_cache_max and len(self._details_cache) > 1:
                    self._details_bytes -= self._details_cache.popitem(last=False)[1].nbytes
            self._details_cache.move_to_end(group)
            return self._details_cache[group], index


def _open_snapshot(uri: str) -> Any:
    """Not memory-mapped: the kernel would map 64 KB around each of many small reads."""
    options: dict[str, Any] = {"read_dictionary": _WORDS, "page_checksum_verification": True}
    if storage.is_local(uri):
        return pq.ParquetFile(pa.OSFile(storage.split_uri(uri)[1]), **options)
    with tempfile.NamedTemporaryFile(prefix="timeviper-index-") as copy:
        storage.download(uri, Path(copy.name))
        return pq.ParquetFile(pa.OSFile(copy.name), **options)


def _column(file: Any, name: str) -> pa.Array:
    column = file.read(columns=[name])[name]
    return column.combine_chunks() if column.num_chunks else pa.array([], column.type)


def _first_rows(ids: pa.Array) -> np.ndarray:
    if len(ids) == 0:
        return np.empty(0, np.int64)
    changes = pc.not_equal(ids.slice(1), ids.slice(0, len(ids) - 1)).to_numpy(zero_copy_only=False)
    return np.concatenate([[0], np.flatnonzero(changes) + 1])
