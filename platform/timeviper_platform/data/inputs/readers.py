"""Reads any input as pages of distinct media.

manifest.parquet | .jsonl | .csv   its rows; for Parquet with a bytes column instead of uri, its cells
folder, prefix                     all images, videos and tars below it
glob                               matching media, tars and Parquet files
a file                             itself
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from timeviper_platform.common import storage
from timeviper_platform.common.hash_table import HashTable
from timeviper_platform.common.listing import FileEntry, is_glob, list_files, pages
from timeviper_platform.common.storage import open_file
from timeviper_platform.data.inputs.archives import bytes_column, cell_media, tar_media
from timeviper_platform.data.inputs.manifest import MANIFEST_SUFFIXES, absolute, is_utf8, read_manifest
from timeviper_platform.data.media.container import MEDIA_SUFFIXES, DecodeError, ErrorType, source_name
from timeviper_platform.data.media.medium import Medium, media_id_of

PAGE_ROWS = 8192
"""A few MB of media; one probing task on a cluster."""

TAR_SUFFIX = ".tar"


def read_pages(source: str, page_rows: int = PAGE_ROWS) -> Iterator[list[Medium]]:
    """Yields pages of at most `page_rows` distinct media. Raises ValueError when there are none."""
    distinct = _DistinctMedia()
    num_media = 0
    for page in _pages(source, page_rows):
        num_media += len(page)
        if fresh := distinct.of(page):
            yield fresh
    if not num_media:
        name = storage.shown_uri(source)
        if _is_table(source) and not is_glob(source):
            raise ValueError(f"{name}: the manifest has no rows")
        searched = ", ".join((*MEDIA_SUFFIXES, TAR_SUFFIX))
        raise ValueError(f"no medium matches {name!r}; folders are searched for {searched}, globs match any name")


def _pages(source: str, page_rows: int) -> Iterator[list[Medium]]:
    is_pattern = is_glob(source)
    filesystem, path = storage.split_uri(source)
    is_folder = not is_pattern and filesystem.isdir(path)
    if _is_table(source) and not is_pattern and not is_folder:
        return _table_pages(FileEntry(absolute(source), None), absolute(source).rpartition("/")[0], page_rows)
    root, files = list_files(source)
    if is_folder:
        files = (file for file in files if file.uri.lower().endswith((*MEDIA_SUFFIXES, TAR_SUFFIX)))
    media = (_of_file(file, root, page_rows) for file in files)
    return pages(chain.from_iterable(media), page_rows)


def _of_file(file: FileEntry, root: str, page_rows: int) -> Iterator[Medium]:
    if not is_utf8(file.uri):
        message = f"{source_name(file.uri)}: the name is not UTF-8; rename the file"
        return iter(
            [Medium(file.uri, media_id_of(file.uri, root), error=DecodeError("list", ErrorType.BAD_URI, message))]
        )
    if file.uri.lower().endswith(TAR_SUFFIX):
        return tar_media(file.uri, root, file.version)
    if _is_table(file.uri):
        return chain.from_iterable(_table_pages(file, root, page_rows))
    return iter([Medium(file.uri, media_id_of(file.uri, root), version=file.version)])


def _table_pages(file: FileEntry, root: str, page_rows: int) -> Iterator[list[Medium]]:
    if file.uri.lower().endswith(".parquet") and storage.exists(file.uri):
        try:
            with open_file(file.uri) as opened:
                schema = pq.ParquetFile(opened).schema_arrow
        except pa.ArrowInvalid as error:
            raise ValueError(f"{file.uri} is not a readable manifest: {error}") from error
        column = bytes_column(schema) if "uri" not in schema.names else None
        if column is not None:
            return pages(cell_media(file.uri, root, column, file.version), page_rows)
    return read_manifest(file.uri, page_rows)


def _is_table(uri: str) -> bool:
    return uri.lower().endswith(MANIFEST_SUFFIXES)


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
