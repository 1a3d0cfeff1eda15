"""What a job is pointed at (a manifest, a glob, a folder, one file) to media items with identities.

Knows manifests in Parquet, JSONL and CSV, and how a medium without an id gets one. Opens no medium.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from timeviper_platform import storage
from timeviper_platform.schemas import MANIFEST

MANIFEST_SUFFIXES = (".parquet", ".jsonl", ".csv")
MEDIA_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mpg", ".mpeg", ".flv", ".3gp", ".ogv"),
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp"),
)
"""What is taken from a folder; a glob or a manifest may name anything."""


@dataclass(frozen=True, slots=True)
class MediaItem:
    """One medium, or a stretch of it, that is to be preprocessed."""

    uri: str
    """absolute"""
    media_id: str
    start_seconds: float | None = None
    end_seconds: float | None = None


def list_media(source: str) -> list[MediaItem]:
    """The media that `source` names, in its order (sorted for globs and folders).

    Raises:
        ValueError: when there is nothing at `source`, or a manifest's row is wrong.
    """
    if source.endswith(MANIFEST_SUFFIXES):
        return _read_manifest(source)
    filesystem, path = storage.split_uri(source)
    if any(letter in path for letter in "*?["):
        root = path[: min(path.index(letter) for letter in "*?[" if letter in path)].rpartition("/")[0]
        found = [name for name in filesystem.glob(path) if not filesystem.isdir(name)]
    elif filesystem.isdir(path):
        root = path
        found = [name for name in filesystem.find(path) if name.lower().endswith(MEDIA_SUFFIXES)]
    elif filesystem.exists(path):
        root, found = path.rpartition("/")[0], [path]
    else:
        raise ValueError(f"there is no manifest, folder or file at {source!r}; fix `input`")
    if not found:
        raise ValueError(f"no medium matches {source!r}; a folder is searched for {', '.join(MEDIA_SUFFIXES)}")
    local = storage.is_local(source)
    names = [str(name) if local else str(filesystem.unstrip_protocol(name)) for name in sorted(found)]
    root = root if local else str(filesystem.unstrip_protocol(root))
    return [MediaItem(name, media_id_of(name, root)) for name in names]


def media_id_of(uri: str, root: str, start_seconds: float | None = None, end_seconds: float | None = None) -> str:
    """The id of a medium that came without one: the first 32 hex digits of sha256(URI relative to the input root).

    A stretch of a medium has its bounds in the id, so that two stretches of one file differ.
    """
    text = uri[len(root) :].lstrip("/") if uri.startswith(root.rstrip("/") + "/") else uri
    if start_seconds is not None or end_seconds is not None:
        text += f"#t={start_seconds or 0},{'' if end_seconds is None else end_seconds}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _read_manifest(uri: str) -> list[MediaItem]:
    if not storage.exists(uri):
        raise ValueError(f"there is no manifest at {uri!r}; fix `input`, or write the file first")
    table = _read_table(uri)
    if "uri" not in table.column_names:
        raise ValueError(f"{uri}: a manifest needs the column 'uri'; it has {', '.join(table.column_names) or 'none'}")
    try:
        columns = [
            table[name].cast(MANIFEST.field(name).type).to_pylist()
            if name in table.column_names
            else [None] * table.num_rows
            for name in MANIFEST.names
        ]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"{uri}: columns must have the types {MANIFEST.to_string()}: {error}") from error
    root = _absolute(uri).rpartition("/")[0]
    items = [_item(number, root, *row, source=uri) for number, row in enumerate(zip(*columns, strict=True), start=1)]
    if not items:
        raise ValueError(f"{uri}: the manifest has no rows")
    return _distinct(items, uri)


def _read_table(uri: str) -> pa.Table:
    data = pa.BufferReader(storage.read_bytes(uri))
    try:
        if uri.endswith(".parquet"):
            columns = [name for name in pq.read_schema(data).names if name in MANIFEST.names]
            data.seek(0)
            return pq.ParquetFile(data).read(columns=columns)
        return pa.json.read_json(data) if uri.endswith(".jsonl") else pa.csv.read_csv(data)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{uri} is no readable manifest: {error}") from error


def _item(
    number: int, root: str, uri: Any, media_id: Any, start_seconds: Any, end_seconds: Any, *, source: str
) -> MediaItem:
    if not uri:
        raise ValueError(f"{source}: row {number} has no uri")
    if start_seconds is not None and end_seconds is not None and end_seconds <= start_seconds:
        raise ValueError(f"{source}: row {number}: {end_seconds = } must be after {start_seconds = }")
    if start_seconds is not None and start_seconds < 0:
        raise ValueError(f"{source}: row {number}: {start_seconds = } must not be negative")
    full = uri if "://" in uri or uri.startswith("/") else storage.join_uri(root, uri)
    name = media_id or media_id_of(full, root, start_seconds, end_seconds)
    return MediaItem(full, name, start_seconds, end_seconds)


def _distinct(items: Sequence[MediaItem], source: str) -> list[MediaItem]:
    """Without repeated rows.

    Raises:
        ValueError: when one media_id stands for two media.
    """
    by_id: dict[str, MediaItem] = {}
    clashes = [item for item in items if by_id.setdefault(item.media_id, item) != item]
    if clashes:
        raise ValueError(f"{source}: {_listed(item.media_id for item in clashes)} stand for more than one medium")
    return list(by_id.values())


def _absolute(uri: str) -> str:
    return storage.split_uri(uri)[1] if storage.is_local(uri) else uri


def _listed(names: Iterable[str], limit: int = 5) -> str:
    distinct = list(dict.fromkeys(names))
    more = f" and {len(distinct) - limit} more" if len(distinct) > limit else ""
    return "media_id " + ", ".join(repr(name) for name in distinct[:limit]) + more
