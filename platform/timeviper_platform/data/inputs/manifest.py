"""Manifest rows to media items with identities: Parquet, JSONL and CSV, read a page at a time.

Knows the MANIFEST columns and how a medium without an id gets one. Opens no medium and knows no folders (listing.py),
tars or Parquet cells (shards.py).
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from timeviper_platform.common import storage
from timeviper_platform.common.listing import FileVersion
from timeviper_platform.common.schemas import MANIFEST
from timeviper_platform.common.storage import open_file
from timeviper_platform.data.media.container import DecodeError, ErrorType
from timeviper_platform.data.media.http_file import is_web
from timeviper_platform.data.media.medium import Medium, media_id_of


def text_rows(table: Any) -> list[dict[str, Any]]:
    """The rows of a table or batch as dicts; bytes that are no UTF-8 become surrogates, which `is_text` finds."""
    try:
        return list(table.to_pylist())
    except UnicodeDecodeError:
        columns = {field.name: _values(table[field.name]) for field in table.schema}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def is_text(*values: str) -> bool:
    """True when all of them can be written as UTF-8."""
    return all(value.isascii() or _is_text(value) for value in values)


def _values(column: Any) -> list[Any]:
    if not pa.types.is_string(column.type):
        return list(column.to_pylist())
    values = column.cast(pa.binary()).to_pylist()
    return [None if value is None else value.decode("utf-8", "surrogateescape") for value in values]


def _is_text(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


MANIFEST_SUFFIXES = (".parquet", ".jsonl", ".csv")

URL_COLUMN = "url"
"""Stands for `uri` where there is none: CC12M, PixelProse and img2dataset call it so."""

_COLUMNS = [*MANIFEST.names, URL_COLUMN]
_TYPES = {**{field.name: field.type for field in MANIFEST}, URL_COLUMN: pa.string()}
_ROW = pa.schema([(name, _TYPES[name]) for name in _COLUMNS])
_NUMBERS = [field.name for field in MANIFEST if not pa.types.is_string(field.type)]

FAULT = "fault"
"""Key of a row that cannot be read, and why; no column's name."""

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


def read_manifest(uri: str, page_rows: int) -> Iterator[list[Medium]]:
    """The items of a manifest, at most `page_rows` at a time, in its order.

    A row that says something impossible becomes a rejected item.

    Raises:
        ValueError: when there is no manifest, or a column is wrong.
    """
    root = absolute(uri).rpartition("/")[0]
    number = 0
    for rows in _row_pages(uri, page_rows):
        yield [_item(number + place, root, row, source=uri) for place, row in enumerate(rows, start=1)]
        number += len(rows)


def absolute(uri: str) -> str:
    """A local path from the root of the file system; other URIs as they are."""
    return storage.split_uri(uri)[1] if storage.is_local(uri) else uri


def download_failure(status: str | None, message: str | None) -> DecodeError | None:
    """Why img2dataset has no image for a row; None when it has one."""
    if status not in DOWNLOAD_FAILURES:
        return None
    text = message or status
    kinds = (kind for part, kind in _DOWNLOAD_MESSAGES if part in text and status == "failed_to_download")
    return DecodeError("download", next(kinds, DOWNLOAD_FAILURES[status]), f"{status}: {text}")


def _row_pages(uri: str, page_rows: int) -> Iterator[list[dict[str, Any]]]:
    """Rows as dicts of the columns that a manifest may have; those that are missing are not keys.

    What cannot be read of a row is said under the key FAULT.
    """
    if not storage.exists(uri):
        raise ValueError(f"there is no manifest at {uri!r}; fix `input`, or write the file first")
    suffix = uri.rpartition(".")[2].lower()
    read = {"parquet": _read_parquet, "jsonl": _read_jsonl, "csv": _read_csv}[suffix]
    try:
        yield from read(uri, page_rows)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{uri} is no readable manifest: {error}") from error


def _read_parquet(uri: str, page_rows: int) -> Iterator[list[dict[str, Any]]]:
    with open_file(uri) as file:
        parquet = pq.ParquetFile(file)
        columns = _known_columns(parquet.schema_arrow.names, uri)
        schema = pa.schema([(name, _TYPES[name]) for name in columns])
        for batch in parquet.iter_batches(batch_size=page_rows, columns=columns):
            yield _halved(pa.Table.from_batches([batch]).select(columns), lambda table: _cast(table, schema, uri))


def _read_jsonl(uri: str, page_rows: int) -> Iterator[list[dict[str, Any]]]:
    with open_file(uri) as file:
        lines = (line for line in file if line.strip())
        columns: list[str] = []
        while page := list(islice(lines, page_rows)):
            rows = [_json_row(line) for line in page]
            if not columns and (names := {name for row in rows for name in row if name != FAULT}):
                columns = _known_columns(sorted(names), uri)
            if not columns:
                raise ValueError(f"{uri} is no readable manifest: {rows[0][FAULT]}")
            yield _halved(rows, _typed)


def _json_row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8", "surrogateescape"))
    except ValueError as error:
        return {FAULT: f"no JSON: {error}"}
    return row if isinstance(row, dict) else {FAULT: f"a {type(row).__name__}, no JSON object"}


def _typed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    known = [row for row in rows if FAULT not in row]
    typed = iter(pa.Table.from_pylist(known, schema=_ROW).to_pylist())
    return [row if FAULT in row else next(typed) for row in rows]


def _cast(table: pa.Table, schema: pa.Schema, uri: str) -> list[dict[str, Any]]:
    """The rows of a table in these types.

    Raises:
        ValueError: when a whole column has a type that has no such values.
    """
    columns = {}
    for field in schema:
        try:
            columns[field.name] = table[field.name].cast(field.type)
        except pa.ArrowNotImplementedError as error:
            types = MANIFEST.to_string(show_schema_metadata=False)
            raise ValueError(f"{uri}: columns must have the types {types}: {error}") from error
        except pa.ArrowInvalid as error:
            raise _BadValueError(f"{field.name}: {error}") from error
    return text_rows(pa.table(columns))


class _BadValueError(ValueError):
    """A value that is not of its column's type."""


def _halved(rows: Any, typed: Callable[[Any], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What `typed` makes of the rows (a list, or a table); halves of them where that fails, so that only those with
    values of other types are bad."""
    try:
        return typed(rows)
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError, _BadValueError) as error:
        half = len(rows) // 2
        return _halved(rows[:half], typed) + _halved(rows[half:], typed) if half else [{FAULT: str(error)}]


def _read_csv(uri: str, page_rows: int) -> Iterator[list[dict[str, Any]]]:
    ragged: deque[tuple[int, dict[str, Any]]] = deque()

    def set_aside(row: pa.csv.InvalidRow) -> str:
        fault = f"it has {row.actual_columns} values for {row.expected_columns} columns"
        ragged.append((row.number, {FAULT: fault}))
        return "skip"

    parse = pa.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=set_aside)
    read = pa.csv.ReadOptions(use_threads=False)  # with threads the rows that are set aside have no numbers
    with open_file(uri) as file, pa.csv.open_csv(file, read, parse) as reader:
        columns = _known_columns(reader.schema.names, uri)
    ragged.clear()
    # all of it as text: one value that is no number would end Arrow's reading
    convert = pa.csv.ConvertOptions(
        include_columns=columns, column_types=dict.fromkeys(columns, pa.string()), check_utf8=False
    )
    schema = pa.schema([(name, _TYPES[name]) for name in columns])
    number = 2  # of the first row behind the header, as Arrow counts
    with open_file(uri) as file, pa.csv.open_csv(file, read, parse, convert) as reader:
        for batch in reader:
            for start in range(0, batch.num_rows, page_rows):
                texts = _numbers_stripped(pa.Table.from_batches([batch.slice(start, page_rows)]), convert.null_values)
                merged = _merged(_halved(texts, lambda table: _cast(table, schema, uri)), ragged, number)
                number += len(merged)
                yield from _cut(merged, page_rows)
    yield from _cut([row for _, row in ragged], page_rows)


def _numbers_stripped(table: pa.Table, null_values: Sequence[str]) -> pa.Table:
    """Text as Arrow would read numbers from: without blanks around, and null where it says so."""
    for place, name in enumerate(table.column_names):
        if name in _NUMBERS:
            text = pc.ascii_trim_whitespace(table[name])
            is_null = pc.is_in(text, pa.array(null_values, pa.string()))
            table = table.set_column(place, name, pc.if_else(is_null, None, text))
    return table


def _cut(rows: list[dict[str, Any]], page_rows: int) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(rows), page_rows):
        yield rows[start : start + page_rows]


def _merged(rows: list[dict[str, Any]], ragged: deque[tuple[int, dict[str, Any]]], number: int) -> list[dict[str, Any]]:
    """The rows, of which the first that is not ragged comes at or behind `number`, with the ragged ones in their
    places; those are taken out of `ragged`."""
    if not ragged:
        return rows
    merged = list[dict[str, Any]]()
    for row in rows:
        while ragged and ragged[0][0] <= number + len(merged):
            merged.append(ragged.popleft()[1])
        merged.append(row)
    return merged


def _known_columns(names: Sequence[str], uri: str) -> list[str]:
    if "uri" not in names and URL_COLUMN not in names:
        raise ValueError(f"{uri}: a manifest needs the column 'uri'; it has {', '.join(names) or 'none'}")
    return [name for name in names if name in MANIFEST.names or (name == URL_COLUMN and "uri" not in names)]


def _item(number: int, root: str, row: dict[str, Any], *, source: str) -> Medium:
    uri = row.get("uri") or row.get(URL_COLUMN) or ""
    full = uri if not uri or "://" in uri or uri.startswith("/") else storage.join_uri(root, uri)
    if fault := row.get(FAULT) or _fault(uri, row):
        message = f"{storage.shown_uri(source)}: row {number}: {fault}"
        own_id = media_id_of(f"{source}#row={number}", root)
        return Medium(full, own_id, error=DecodeError("list", ErrorType.BAD_ROW, message))
    start_seconds, end_seconds = row.get("start_seconds"), row.get("end_seconds")
    return Medium(
        full,
        row.get("media_id") or media_id_of(full, root, start_seconds, end_seconds),
        start_seconds,
        end_seconds,
        version=_version(row),
        sha256=row.get("sha256") or None,
        **_headers(row),
        error=download_failure(row.get("status"), row.get("error_message")),
    )


def _fault(uri: str, row: dict[str, Any]) -> str | None:
    """What is impossible in a row; None when nothing is."""
    if not uri:
        return "it has no uri"
    if not is_text(*(value for value in row.values() if isinstance(value, str))):
        return f"it is no UTF-8: {storage.shown_uri(uri)!r}"
    for name in _NUMBERS:
        value = row.get(name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            return f"{name} = {value} must be a number that is not negative"
    start_seconds, end_seconds = row.get("start_seconds") or 0.0, row.get("end_seconds")
    if end_seconds is not None and end_seconds <= start_seconds:
        return f"{end_seconds = } must be after {start_seconds = }"
    if not is_web(uri) and not storage.has_known_scheme(uri):
        return f"{storage.shown_uri(uri)} is on no file system that is known; fix what stands before ://"
    return None


def _version(row: dict[str, Any]) -> FileVersion | None:
    size, etag = row.get("size"), row.get("etag") or None
    return None if size is None else FileVersion(size, etag, etag or f"{size}-stated")


def _headers(row: dict[str, Any]) -> dict[str, Any]:
    """Header fields of a `Medium` that the row states; none where it states too little to do without the file."""
    duration = row.get("duration_seconds")
    is_image = row.get("modality") == "image"
    if row.get("size") is None or not (is_image or duration):
        return {}
    return {
        "modality": "image" if is_image else "video",
        "duration_seconds": Fraction(repr(float(duration))) if duration and not is_image else Fraction(0),
        "source_fps": row.get("source_fps") or 0.0,
        "width": row.get("width") or 0,
        "height": row.get("height") or 0,
        "codec": row.get("codec") or "",
    }
