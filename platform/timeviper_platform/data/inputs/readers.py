"""Reads any input as pages of distinct media.

manifest.parquet | .jsonl | .ndjson | .json | .csv | .tsv, text also .gz
                   its rows; for Parquet with a bytes column instead of uri, its cells
folder, prefix     all images, videos and tars below it
glob               matching media, tars and tables
a file             itself
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from timeviper_platform.common import storage
from timeviper_platform.common.hash_table import HashTable
from timeviper_platform.common.listing import FileEntry, is_glob, list_files, pages
from timeviper_platform.common.storage import open_file
from timeviper_platform.data.inputs.archives import failed_downloads, leave_out, tar_media
from timeviper_platform.data.inputs.cells import cell_media, find_bytes_column
from timeviper_platform.data.inputs.manifest import absolute, is_utf8, read_manifest
from timeviper_platform.data.inputs.tables import DamagedTableError, TableError, is_table, raise_unreadable
from timeviper_platform.data.media.container import MEDIA_SUFFIXES, DecodeError, ErrorType, decode_errors, source_name
from timeviper_platform.data.media.medium import Medium, media_id_of

logger = logging.getLogger(__name__)

PAGE_ROWS = 8192
"""A few MB of media; one probing task on a cluster."""

TAR_SUFFIX = ".tar"


def read_pages(
    source: str, page_rows: int = PAGE_ROWS, *, bytes_column: str | None = None, left_out: Counter[str] | None = None
) -> Iterator[list[Medium]]:
    """Yields pages of at most `page_rows` distinct media.

    A file or row that cannot be read is a medium in error. `left_out` counts by suffix the files that folders and tars
    have besides media.

    Raises:
        ValueError: without any medium, or for a manifest as `source` that is missing, unreadable or has no uri.
    """
    distinct = _DistinctMedia()
    num_media = 0
    scan = _Scan(bytes_column, Counter() if left_out is None else left_out)
    for page in pages(scan.media(source), page_rows):
        num_media += len(page)
        if fresh := distinct.of(page):
            yield fresh
    if scan.left_out:
        logger.info("files left out because of their names: %s", count_text(scan.left_out))
    if not num_media:
        name = storage.shown_uri(source)
        if is_table(source) and not is_glob(source):
            raise ValueError(f"{name}: the manifest has no rows")
        searched = ", ".join((*MEDIA_SUFFIXES, TAR_SUFFIX))
        found = f" (found: {count_text(scan.left_out)})" if scan.left_out else ""
        raise ValueError(
            f"no medium matches {name!r}{found}; folders are searched for {searched}, globs match any name"
        )


def origin_of(media_id: str, source: str, bytes_column: str | None = None) -> str:
    """Returns manifest and row of a medium; "" unless `source` is a table."""
    if not is_table(source) or is_glob(source):
        return ""
    media = chain.from_iterable(read_pages(source, bytes_column=bytes_column))
    return next((medium.origin for medium in media if medium.media_id == media_id), "")


def count_text(left_out: Mapping[str, int]) -> str:
    counts = sorted((-count, suffix) for suffix, count in left_out.items())
    return ", ".join(f"{-count} {suffix}" for count, suffix in counts)


@dataclass(frozen=True, slots=True)
class _Scan:
    bytes_column: str | None
    left_out: Counter[str] = field(default_factory=Counter)

    def media(self, source: str) -> Iterator[Medium]:
        is_pattern = is_glob(source)
        is_folder = not is_pattern and storage.is_folder(source)
        if is_table(source) and not is_pattern and not is_folder:
            uri = absolute(source)
            return self._of_source(FileEntry(uri, None), uri.rpartition("/")[0])
        root, files = list_files(source)
        if is_folder:
            files = (file for file in files if file.fault is not None or self._is_taken(file.uri))
        return chain.from_iterable(self._of_file(file, root) for file in files)

    def _of_source(self, file: FileEntry, root: str) -> Iterator[Medium]:
        try:
            yield from self._of_table(file, root)
        except FileNotFoundError as error:
            name = storage.shown_uri(file.uri)
            raise ValueError(f"no manifest at {name!r}; fix `input`, or write the file first") from error

    def _is_taken(self, uri: str) -> bool:
        is_taken = uri.lower().endswith((*MEDIA_SUFFIXES, TAR_SUFFIX))
        if not is_taken:
            leave_out(self.left_out, uri)
        return is_taken

    def _of_file(self, file: FileEntry, root: str) -> Iterator[Medium]:
        own_id = media_id_of(file.uri, root)
        if file.fault is not None:
            yield Medium(file.uri, own_id, error=_fault_of(file.uri, file.fault))
        elif not is_utf8(file.uri):
            message = f"{source_name(file.uri)}: the name is not UTF-8; rename the file"
            yield Medium(file.uri, own_id, error=DecodeError("list", ErrorType.BAD_URI, message))
        elif file.uri.lower().endswith(TAR_SUFFIX):
            yield from _up_to_error(
                failed_downloads(file.uri, root), file.uri, media_id_of(f"{file.uri}#failures", root)
            )
            yield from _up_to_error(tar_media(file.uri, root, file.version, self.left_out), file.uri, own_id)
        elif is_table(file.uri):
            yield from _up_to_error(self._of_table(file, root), file.uri, own_id)
        else:
            yield Medium(file.uri, own_id, version=file.version)

    def _of_table(self, file: FileEntry, root: str) -> Iterator[Medium]:
        if file.uri.lower().endswith(".parquet"):
            with open_file(file.uri) as opened:
                schema = _schema(opened, file.uri)
            try:
                column = find_bytes_column(schema, self.bytes_column)
            except ValueError as error:
                message = f"{storage.shown_uri(file.uri)}: {error}"
                bad = DecodeError("list", ErrorType.BAD_ROW, message)
                yield Medium(file.uri, media_id_of(file.uri, root), error=bad)
                return
            if column is not None:
                yield from cell_media(file.uri, root, column, file.version)
                return
        yield from chain.from_iterable(read_manifest(file.uri, PAGE_ROWS))


def _schema(opened: object, uri: str) -> pa.Schema:
    try:
        return pq.ParquetFile(opened).schema_arrow
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # the storage's error
        raise_unreadable(uri, str(error), error)


def _up_to_error(media: Iterator[Medium], uri: str, own_id: str) -> Iterator[Medium]:
    """Ends with a medium in error where the rest of the file cannot be read."""
    try:
        with decode_errors("list", uri):
            try:
                yield from media
            except TableError as error:
                kind = ErrorType.CORRUPT_FILE if isinstance(error, DamagedTableError) else ErrorType.BAD_ROW
                raise DecodeError("list", kind, str(error)) from error
    except DecodeError as error:
        yield Medium(uri, own_id, error=DecodeError("list", error.error_type, error.message))


def _fault_of(folder: str, fault: OSError) -> DecodeError:
    try:
        with decode_errors("list", folder):
            raise fault
    except DecodeError as error:
        return error


class _DistinctMedia:
    """Drops repeated media, at 16 bytes per medium."""

    def __init__(self) -> None:
        self._seen = HashTable()  # hash of media_id -> hash of `_text`

    def of(self, page: Sequence[Medium]) -> list[Medium]:
        """Returns the new media of a page, in error if their media_id belongs to another."""
        fresh, clashes = self._split(page)
        return fresh + self._split([_clashing(medium) for medium in clashes])[0]

    def _split(self, page: Sequence[Medium]) -> tuple[list[Medium], list[Medium]]:
        """Returns new media, and those with another medium's media_id."""
        by_id: dict[str, Medium] = {}
        clashes = [
            medium
            for medium in page
            if (first := by_id.setdefault(medium.media_id, medium)) is not medium and _text(first) != _text(medium)
        ]
        media = list(by_id.values())
        ids = np.array([xxhash.xxh3_64_intdigest(medium.media_id.encode()) for medium in media], dtype=np.uint64)
        values = np.array(
            [xxhash.xxh3_64_intdigest(_text(medium).encode("utf-8", "surrogatepass")) for medium in media],
            dtype=np.uint64,
        )
        found, before = self._seen.find(ids)
        clashes += [media[index] for index in np.flatnonzero(found & (before != values))]
        self._seen.add(ids[~found], values[~found])
        return [media[index] for index in np.flatnonzero(~found)], clashes


def _clashing(medium: Medium) -> Medium:
    message = f"media_id {medium.media_id!r} names more than one medium: {source_name(medium.uri)} is not the first"
    own_id = media_id_of(f"{medium.media_id}={_text(medium)}", "")
    return replace(medium, media_id=own_id, error=medium.error or DecodeError("list", ErrorType.BAD_ROW, message))


def _text(medium: Medium) -> str:
    return f"{medium.uri}\n{medium.start_seconds}\n{medium.end_seconds}\n{medium.error or ''}"
