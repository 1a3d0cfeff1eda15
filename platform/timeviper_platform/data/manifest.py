"""Manifest rows to media items with identities: Parquet, JSONL and CSV, read a page at a time.

Knows the MANIFEST columns and how a medium without an id gets one. Opens no medium and knows no folders (listing.py),
tars or Parquet cells (shards.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from timeviper_platform import storage
from timeviper_platform.data.media import ErrorType, FileVersion, MediaProbe, Stage
from timeviper_platform.data.parts import open_file
from timeviper_platform.schemas import MANIFEST

MANIFEST_SUFFIXES = (".parquet", ".jsonl", ".csv")

URL_COLUMN = "url"
"""Stands for `uri` where there is none: CC12M, PixelProse and img2dataset call it so."""

_COLUMNS = [*MANIFEST.names, URL_COLUMN]
_TYPES = {**{field.name: field.type for field in MANIFEST}, URL_COLUMN: pa.string()}

DOWNLOAD_FAILURES = {"failed_to_download": ErrorType.READ_FAILED, "failed_to_resize": ErrorType.CORRUPT_FILE}
"""img2dataset's `status` of a row that has no image; any other status is somebody else's column."""

_DOWNLOAD_MESSAGES = (
    ("404", ErrorType.NOT_FOUND),
    ("410", ErrorType.NOT_FOUND),
    ("401", ErrorType.PERMISSION_DENIED),
    ("403", ErrorType.PERMISSION_DENIED),
    ("timed out", ErrorType.TIMED_OUT),
    ("not known", ErrorType.UNKNOWN_HOST),
    ("No address", ErrorType.UNKNOWN_HOST),
    ("name resolution", ErrorType.UNKNOWN_HOST),
)
"""What Python's urllib writes into img2dataset's `error_message`."""


class Rejection(NamedTuple):
    """Why there is nothing to preprocess, before any medium is opened."""

    stage: Stage
    error_type: ErrorType
    message: str


@dataclass(frozen=True, slots=True)
class MediaItem:
    """One medium, or a stretch of it, that is to be preprocessed."""

    uri: str
    """absolute; may address a part of a file (parts.py)"""
    media_id: str
    start_seconds: float | None = None
    end_seconds: float | None = None
    version: FileVersion | None = None
    """where a listing or the manifest says it; None = ask the file"""
    probe: MediaProbe | None = None
    """where the manifest says it; None = read the headers"""
    sha256: str | None = None
    rejected: Rejection | None = None
    """the source itself says that there is no such medium, and why"""


def media_id_of(uri: str, root: str, start_seconds: float | None = None, end_seconds: float | None = None) -> str:
    """The id of a medium that came without one: the first 32 hex digits of sha256(URI relative to the input root).

    A stretch of a medium has its bounds in the id, so that two stretches of one file differ.
    """
    text = uri[len(root) :].lstrip("/") if uri.startswith(root.rstrip("/") + "/") else uri
    if start_seconds is not None or end_seconds is not None:
        text += f"#t={start_seconds or 0},{'' if end_seconds is None else end_seconds}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def read_manifest(uri: str, page_rows: int) -> Iterator[list[MediaItem]]:
    """The items of a manifest, at most `page_rows` at a time, in its order.

    Raises:
        ValueError: when there is no manifest, or a row or column is wrong.
    """
    root = absolute(uri).rpartition("/")[0]
    number = 0
    for rows in _row_pages(uri, page_rows):
        yield [_item(number + place, root, row, source=uri) for place, row in enumerate(rows, start=1)]
        number += len(rows)


def absolute(uri: str) -> str:
    """A local path from the root of the file system; other URIs as they are."""
    return storage.split_uri(uri)[1] if storage.is_local(uri) else uri


def download_failure(status: str | None, message: str | None) -> Rejection | None:
    """Why img2dataset has no image for a row; None when it has one."""
    if status not in DOWNLOAD_FAILURES:
        return None
    text = message or status
    kinds = (kind for part, kind in _DOWNLOAD_MESSAGES if part in text and status == "failed_to_download")
    return Rejection("download", next(kinds, DOWNLOAD_FAILURES[status]), f"{status}: {text}")


def _row_pages(uri: str, page_rows: int) -> Iterator[list[dict[str, Any]]]:
    """Rows as dicts of the columns that a manifest may have; those that are missing are not keys."""
    if not storage.exists(uri):
        raise ValueError(f"there is no manifest at {uri!r}; fix `input`, or write the file first")
    suffix = uri.rpartition(".")[2]
    read = {"parquet": _read_parquet, "jsonl": _read_jsonl, "csv": _read_csv}[suffix]
    try:
        for batch in read(uri, page_rows):
            yield batch.to_pylist()
    except pa.ArrowInvalid as error:
        if "conversion error" in str(error):
            raise _wrong_types(uri, error) from error
        raise ValueError(f"{uri} is no readable manifest: {error}") from error


def _read_parquet(uri: str, page_rows: int) -> Iterator[Any]:
    with open_file(uri) as file:
        parquet = pq.ParquetFile(file)
        columns = _known_columns(parquet.schema_arrow.names, uri)
        schema = pa.schema([(name, _TYPES[name]) for name in columns])
        for batch in parquet.iter_batches(batch_size=page_rows, columns=columns):
            try:
                yield pa.Table.from_batches([batch]).select(columns).cast(schema)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise _wrong_types(uri, error) from error


def _read_jsonl(uri: str, page_rows: int) -> Iterator[Any]:
    with open_file(uri) as file:
        lines = (line for line in file if line.strip())
        columns: list[str] = []
        while page := list(islice(lines, page_rows)):
            try:
                rows = [json.loads(line) for line in page]
            except ValueError as error:
                raise ValueError(f"{uri} is no readable manifest: {error}") from error
            columns = columns or _known_columns(sorted({name for row in rows for name in row}), uri)
            try:
                yield pa.Table.from_pylist(rows, schema=pa.schema([(name, _TYPES[name]) for name in _COLUMNS]))
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise _wrong_types(uri, error) from error


def _read_csv(uri: str, page_rows: int) -> Iterator[Any]:
    with open_file(uri) as file, pa.csv.open_csv(file) as reader:
        columns = _known_columns(reader.schema.names, uri)
    # types are given, not guessed: a guess from the first block breaks on a later one
    convert = pa.csv.ConvertOptions(include_columns=columns, column_types=_TYPES)
    with open_file(uri) as file, pa.csv.open_csv(file, convert_options=convert) as reader:
        for batch in reader:
            for start in range(0, batch.num_rows, page_rows):
                yield batch.slice(start, page_rows)


def _known_columns(names: Sequence[str], uri: str) -> list[str]:
    if "uri" not in names and URL_COLUMN not in names:
        raise ValueError(f"{uri}: a manifest needs the column 'uri'; it has {', '.join(names) or 'none'}")
    return [name for name in names if name in MANIFEST.names or (name == URL_COLUMN and "uri" not in names)]


def _wrong_types(uri: str, error: Exception) -> ValueError:
    return ValueError(f"{uri}: columns must have the types {MANIFEST.to_string(show_schema_metadata=False)}: {error}")


def _item(number: int, root: str, row: dict[str, Any], *, source: str) -> MediaItem:
    uri, start_seconds, end_seconds = row.get("uri"), row.get("start_seconds"), row.get("end_seconds")
    uri = uri or row.get(URL_COLUMN)
    if not uri:
        raise ValueError(f"{source}: row {number} has no uri")
    if start_seconds is not None and end_seconds is not None and end_seconds <= start_seconds:
        raise ValueError(f"{source}: row {number}: {end_seconds = } must be after {start_seconds = }")
    if start_seconds is not None and start_seconds < 0:
        raise ValueError(f"{source}: row {number}: {start_seconds = } must not be negative")
    full = uri if "://" in uri or uri.startswith("/") else storage.join_uri(root, uri)
    return MediaItem(
        full,
        row.get("media_id") or media_id_of(full, root, start_seconds, end_seconds),
        start_seconds,
        end_seconds,
        version=_version(row),
        probe=_probe(row),
        sha256=row.get("sha256") or None,
        rejected=download_failure(row.get("status"), row.get("error_message")),
    )


def _version(row: dict[str, Any]) -> FileVersion | None:
    size, etag = row.get("size"), row.get("etag") or None
    return None if size is None else FileVersion(size, etag, etag or f"{size}-stated")


def _probe(row: dict[str, Any]) -> MediaProbe | None:
    """What the row says in place of the headers; None where it says too little."""
    duration = row.get("duration_seconds")
    is_image = row.get("modality") == "image"
    if row.get("size") is None or not (is_image or duration):
        return None
    return MediaProbe(
        modality="image" if is_image else "video",
        end_seconds=Fraction(repr(float(duration))) if duration and not is_image else Fraction(0),
        end_is_exact=True,
        source_fps=row.get("source_fps") or 0.0,
        width=row.get("width") or 0,
        height=row.get("height") or 0,
        codec=row.get("codec") or "",
    )
