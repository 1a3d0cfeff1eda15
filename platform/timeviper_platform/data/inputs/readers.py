"""What a job is pointed at to pages of distinct media items: the one place that tells the kinds of input apart.

manifest.parquet | .jsonl | .csv   its rows; a Parquet file without uri or url but with bytes: its values
folder, prefix                     every image, video and tar below it
glob                               what matches: media, tars, and Parquet files as above
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
from timeviper_platform.data.inputs.archives import bytes_column, cell_items, tar_items
from timeviper_platform.data.inputs.manifest import MANIFEST_SUFFIXES, absolute, is_text, read_manifest
from timeviper_platform.data.media.container import MEDIA_SUFFIXES, DecodeError, ErrorType, source_name
from timeviper_platform.data.media.medium import Medium, media_id_of

PAGE_ROWS = 8192
"""Items at hand at once: a few MB of them; a page is also one task of probing on a cluster."""

TAR_SUFFIX = ".tar"


def read_pages(source: str, page_rows: int = PAGE_ROWS) -> Iterator[list[Medium]]:
    """The media that `source` names, at most `page_rows` at a time, each once.

    Raises:
        ValueError: when there is nothing at `source`, or a manifest as a whole cannot be read.
    """
    distinct = _DistinctItems()
    num_items = 0
    for page in _pages(source, page_rows):
        num_items += len(page)
        if fresh := distinct.of(page):
            yield fresh
    if not num_items:
        name = storage.shown_uri(source)
        if _is_table(source) and not is_glob(source):
            raise ValueError(f"{name}: the manifest has no rows")
        searched = ", ".join((*MEDIA_SUFFIXES, TAR_SUFFIX))
        raise ValueError(f"no medium matches {name!r}; a folder is searched for {searched}, a glob takes any name")


def _pages(source: str, page_rows: int) -> Iterator[list[Medium]]:
    is_pattern = is_glob(source)
    filesystem, path = storage.split_uri(source)
    is_folder = not is_pattern and filesystem.isdir(path)
    if _is_table(source) and not is_pattern and not is_folder:
        return _table_pages(FileEntry(absolute(source), None), absolute(source).rpartition("/")[0], page_rows)
    root, files = list_files(source)
    if is_folder:
        files = (file for file in files if file.uri.lower().endswith((*MEDIA_SUFFIXES, TAR_SUFFIX)))
    tables_and_items = (_of_file(file, root, page_rows) for file in files)
    return pages(chain.from_iterable(tables_and_items), page_rows)


def _of_file(file: FileEntry, root: str, page_rows: int) -> Iterator[Medium]:
    if not is_text(file.uri):
        message = f"{source_name(file.uri)}: the name is no UTF-8; give it another"
        return iter(
            [Medium(file.uri, media_id_of(file.uri, root), error=DecodeError("list", ErrorType.BAD_URI, message))]
        )
    if file.uri.lower().endswith(TAR_SUFFIX):
        return tar_items(file.uri, root, file.version)
    if _is_table(file.uri):
        return chain.from_iterable(_table_pages(file, root, page_rows))
    return iter([Medium(file.uri, media_id_of(file.uri, root), version=file.version)])


def _table_pages(file: FileEntry, root: str, page_rows: int) -> Iterator[list[Medium]]:
    if file.uri.lower().endswith(".parquet") and storage.exists(file.uri):
        try:
            with open_file(file.uri) as opened:
                schema = pq.ParquetFile(opened).schema_arrow
        except pa.ArrowInvalid as error:
            raise ValueError(f"{file.uri} is no readable manifest: {error}") from error
        column = bytes_column(schema) if "uri" not in schema.names else None
        if column is not None:
            return pages(cell_items(file.uri, root, column, file.version), page_rows)
    return read_manifest(file.uri, page_rows)


def _is_table(uri: str) -> bool:
    return uri.lower().endswith(MANIFEST_SUFFIXES)


class _DistinctItems:
    """Leaves repeated items out, over all pages, in 16 bytes an item."""

    def __init__(self) -> None:
        self._seen = HashTable()  # hash of media_id -> hash of the item

    def of(self, page: Sequence[Medium]) -> list[Medium]:
        """The items of a page that no earlier one had; the first medium of a media_id keeps it, others are rejected."""
        fresh, clashes = self._split(page)
        return fresh + self._split([_clashing(item) for item in clashes])[0]

    def _split(self, page: Sequence[Medium]) -> tuple[list[Medium], list[Medium]]:
        """Items that are new, and those whose media_id is another medium's."""
        by_id: dict[str, Medium] = {}
        clashes = [
            item
            for item in page
            if (first := by_id.setdefault(item.media_id, item)) is not item and _text(first) != _text(item)
        ]
        items = list(by_id.values())
        ids = np.array([xxhash.xxh3_64_intdigest(item.media_id.encode()) for item in items], dtype=np.uint64)
        values = np.array(
            [xxhash.xxh3_64_intdigest(_text(item).encode("utf-8", "surrogatepass")) for item in items], dtype=np.uint64
        )
        found, before = self._seen.find(ids)
        clashes += [items[place] for place in np.flatnonzero(found & (before != values))]
        self._seen.add(ids[~found], values[~found])
        return [items[place] for place in np.flatnonzero(~found)], clashes


def _clashing(item: Medium) -> Medium:
    """The item as rejected, with an id of its own: its media_id says what became of the medium that had it first."""
    message = f"media_id {item.media_id!r} stands for more than one medium: {source_name(item.uri)} is not the first"
    own_id = media_id_of(f"{item.media_id}={_text(item)}", "")
    return replace(item, media_id=own_id, error=item.error or DecodeError("list", ErrorType.BAD_ROW, message))


def _text(item: Medium) -> str:
    return f"{item.uri}\n{item.start_seconds}\n{item.end_seconds}\n{item.error or ''}"
