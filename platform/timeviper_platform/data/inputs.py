"""What a job is pointed at to pages of distinct media items: the one place that tells the kinds of input apart.

manifest.parquet | .jsonl | .csv   its rows; a Parquet file without uri or url but with bytes: its values
folder, prefix                     every image, video and tar below it
glob                               what matches: media, tars, and Parquet files as above
a file                             itself
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from timeviper_platform import storage
from timeviper_platform.data.hash_table import HashTable
from timeviper_platform.data.listing import FileEntry, list_files, pages
from timeviper_platform.data.manifest import (
    MANIFEST_SUFFIXES,
    MediaItem,
    absolute,
    media_id_of,
    read_manifest,
)
from timeviper_platform.data.media import MEDIA_SUFFIXES
from timeviper_platform.data.parts import open_file
from timeviper_platform.data.shards import bytes_column, cell_items, tar_items

PAGE_ROWS = 8192
"""Items at hand at once: a few MB of them; a page is also one task of probing on a cluster."""

TAR_SUFFIX = ".tar"


def read_pages(source: str, page_rows: int = PAGE_ROWS) -> Iterator[list[MediaItem]]:
    """The media that `source` names, at most `page_rows` at a time, each once.

    Raises:
        ValueError: when there is nothing at `source`, a manifest's row is wrong, or one media_id stands for two media.
    """
    distinct = _DistinctItems(source)
    num_items = 0
    for page in _pages(source, page_rows):
        num_items += len(page)
        if fresh := distinct.of(page):
            yield fresh
    if not num_items:
        if source.endswith(MANIFEST_SUFFIXES) and not _is_glob(source):
            raise ValueError(f"{source}: the manifest has no rows")
        searched = ", ".join((*MEDIA_SUFFIXES, TAR_SUFFIX))
        raise ValueError(f"no medium matches {source!r}; a folder is searched for {searched}, a glob takes any name")


def _pages(source: str, page_rows: int) -> Iterator[list[MediaItem]]:
    if source.endswith(MANIFEST_SUFFIXES) and not _is_glob(source):
        return _table_pages(FileEntry(absolute(source), None), absolute(source).rpartition("/")[0], page_rows)
    root, files = list_files(source)
    if not _is_glob(source) and storage.split_uri(source)[0].isdir(storage.split_uri(source)[1]):
        files = (file for file in files if file.uri.lower().endswith((*MEDIA_SUFFIXES, TAR_SUFFIX)))
    tables_and_items = (_of_file(file, root, page_rows) for file in files)
    return pages(chain.from_iterable(tables_and_items), page_rows)


def _of_file(file: FileEntry, root: str, page_rows: int) -> Iterator[MediaItem]:
    if file.uri.endswith(TAR_SUFFIX):
        return tar_items(file.uri, root, file.version)
    if file.uri.endswith(MANIFEST_SUFFIXES):
        return chain.from_iterable(_table_pages(file, root, page_rows))
    return iter([MediaItem(file.uri, media_id_of(file.uri, root), version=file.version)])


def _table_pages(file: FileEntry, root: str, page_rows: int) -> Iterator[list[MediaItem]]:
    if file.uri.endswith(".parquet") and storage.exists(file.uri):
        try:
            with open_file(file.uri) as opened:
                schema = pq.ParquetFile(opened).schema_arrow
        except pa.ArrowInvalid as error:
            raise ValueError(f"{file.uri} is no readable manifest: {error}") from error
        column = bytes_column(schema) if "uri" not in schema.names else None
        if column is not None:
            return pages(cell_items(file.uri, root, column, file.version), page_rows)
    return read_manifest(file.uri, page_rows)


def _is_glob(source: str) -> bool:
    return any(letter in source for letter in "*?[")


class _DistinctItems:
    """Leaves repeated items out, over all pages, in 16 bytes an item."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._seen = HashTable()  # hash of media_id -> hash of the item

    def of(self, page: Sequence[MediaItem]) -> list[MediaItem]:
        """The items of a page that no earlier one had.

        Raises:
            ValueError: when one media_id stands for two media.
        """
        by_id: dict[str, MediaItem] = {}
        clashes = [item.media_id for item in page if by_id.setdefault(item.media_id, item) != item]
        items = list(by_id.values())
        ids = np.array([xxhash.xxh3_64_intdigest(item.media_id.encode()) for item in items], dtype=np.uint64)
        values = np.array([xxhash.xxh3_64_intdigest(_text(item).encode()) for item in items], dtype=np.uint64)
        found, before = self._seen.find(ids)
        clashes += [items[place].media_id for place in np.flatnonzero(found & (before != values))]
        if clashes:
            raise ValueError(f"{self._source}: {_listed(clashes)} stand for more than one medium")
        self._seen.add(ids[~found], values[~found])
        return [items[place] for place in np.flatnonzero(~found)]


def _text(item: MediaItem) -> str:
    return f"{item.uri}\n{item.start_seconds}\n{item.end_seconds}"


def _listed(names: Sequence[str], limit: int = 5) -> str:
    distinct = list(dict.fromkeys(names))
    more = f" and {len(distinct) - limit} more" if len(distinct) > limit else ""
    return "media_id " + ", ".join(repr(name) for name in distinct[:limit]) + more
