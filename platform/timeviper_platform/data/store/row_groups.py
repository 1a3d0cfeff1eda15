"""Reads row groups."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from timeviper_platform.common import storage

MAX_OPEN_FILES = 128
"""A footer takes 0.1-1 MB of memory, and two requests to an object store."""


@dataclass(slots=True)
class _DataFile:
    lock: threading.Lock = field(default_factory=threading.Lock)
    handle: Any = None


class RowGroups:
    """Bounded LRU caches of row groups and open data files. Thread-safe."""

    def __init__(self, folder: str, cache_bytes: int) -> None:
        self.cache_bytes = cache_bytes
        self._folder = folder
        self._files: OrderedDict[str, _DataFile] = OrderedDict()
        self._row_groups: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()

    def read(self, name: str, number: int, stop: int) -> Any:
        """Returns features as a large_binary array.

        The same read fetches following row groups below `stop`, up to a cached one.

        Raises:
            FileNotFoundError: if the file does not exist.
            RuntimeError: if it is damaged.
            StorageUnavailableError: if the storage keeps failing.
        """
        with self._lock:
            if (name, number) in self._row_groups:
                self._row_groups.move_to_end((name, number))
                return self._row_groups[name, number]
            missing = list(itertools.takewhile(lambda n: (name, n) not in self._row_groups, range(number, stop)))
        file = self._file(name)
        with file.lock:  # other files are read concurrently
            try:
                if file.handle is None:
                    uri = storage.join_uri(self._folder, name)
                    file.handle = storage.retrying(lambda: open_data_file(uri), uri)
                values = storage.retrying(
                    lambda: file.handle.read_row_groups(missing, columns=["features"], use_threads=False)["features"],
                    f"row group {number} of {name} in {self._folder}",
                )
            except FileNotFoundError:
                with self._lock:
                    self._files.pop(name, None)
                raise
            except storage.StorageUnavailableError:
                raise
            except (OSError, pa.ArrowException) as error:  # pyarrow raises both for damaged files
                raise RuntimeError(f"cannot read row group {number} of {name} in {self._folder}: {error}") from error
        first, parts = 0, []
        for group in missing:
            part = values.slice(first, file.handle.metadata.row_group(group).num_rows)
            first += len(part)
            parts.append(part.chunk(0) if part.num_chunks == 1 else part.combine_chunks())
        with self._lock:
            for group, part in zip(missing, parts, strict=True):
                self._keep((name, group), part)
        return parts[0]

    def _keep(self, key: tuple[str, int], values: Any) -> None:
        """The caller holds the lock."""
        if key not in self._row_groups:
            self._row_groups[key] = values
            self._cached_bytes += values.nbytes
        while self._cached_bytes > self.cache_bytes and len(self._row_groups) > 1:
            self._cached_bytes -= self._row_groups.popitem(last=False)[1].nbytes

    def _file(self, name: str) -> _DataFile:
        with self._lock:
            file = self._files.setdefault(name, _DataFile())
            self._files.move_to_end(name)
            while len(self._files) > MAX_OPEN_FILES:
                self._files.popitem(last=False)
            return file


def open_data_file(uri: str, *, verify_pages: bool = True) -> Any:
    """`verify_pages` checks what is read against its CRC, 0.3 ms per MB."""
    filesystem, path = storage.split_uri(uri)
    options: dict[str, Any] = {"page_checksum_verification": verify_pages}
    if storage.is_local(uri):
        return pq.ParquetFile(path, memory_map=True, **options)
    # a cache would only copy the one range read per row group
    return pq.ParquetFile(filesystem.open(path, "rb", cache_type="none"), pre_buffer=True, **options)


def value_buffer(values: Any, index: int) -> Any:
    """Returns one value without a copy, unlike `as_buffer` of a scalar."""
    _, offsets, data = values.buffers()
    begin, end = np.frombuffer(offsets, np.int64)[values.offset + index : values.offset + index + 2]
    return data.slice(int(begin), int(end - begin)) if end > begin else pa.py_buffer(b"")
