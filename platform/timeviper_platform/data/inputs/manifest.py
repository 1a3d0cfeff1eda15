"""Reads Parquet, JSONL and CSV manifests of the MANIFEST schema in pages."""

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
    """Returns rows as dicts. Invalid UTF-8 becomes surrogates, which `is_utf8` detects."""
    try:
        return list(table.to_pylist())
    except UnicodeDecodeError:
        columns = {field.name: _values(table[field.name]) for field in table.schema}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def is_utf8(*values: str) -> bool:
    return all(value.isascii() or _is_encodable(value) for value in values)


def _values(column: Any) -> list[Any]:
    if not pa.types.is_string(column.type):
        return list(column.to_pylist())
    values = column.cast(pa.binary()).to_pylist()
    return [None if value is None else value.decode("utf-8", "surrogateescape") for value in values]


def _is_encodable(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


MANIFEST_SUFFIXES = (".parquet", ".jsonl", ".csv")

URL_COLUMN = "url"
"""Alternative to `uri` in CC12M, PixelProse and img2dataset."""

_COLUMNS = [*MANIFEST.names, URL_COLUMN]
_TYPES = {**{field.name: field.type for field in MANIFEST}, URL_COLUMN: pa.string()}
_ROW = pa.schema([(name, _TYPES[name]) for name in _COLUMNS])
_NUMBERS = [field.name for field in MANIFEST if not pa.types.is_string(field.type)]

FAULT = "fault"
"""Key of the reason in unreadable rows."""

DOWNLOAD_FAILURES = {"failed_to_download": ErrorType.READ_FAILED, "failed_to_resize": ErrorType.CORRUPT_FILE}
"""img2dataset's `status` of rows without an image."""

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
"""Texts of urllib in img2dataset's `error_message`."""


def read_manifest(uri: str, page_rows: int) -> Iterator[list[Medium]]:
    """Yields pages of at most `page_rows` media, in order. Invalid rows are media in error.

    Raises:
        ValueError: without a manifest, or for a column of the wrong type.
    """
    root = absolute(uri).rpartition("/")[0]
    num_rows = 0
    for rows in _row_pages(uri, page_rows):
        yield [_medium(num_rows + index, root, row, source=uri) for index, row in enumerate(rows, start=1)]
        num_rows += len(rows)


def absolute(uri: str) -> str:
    return storage.split_uri(uri)[1] if storage.is_local(uri) else uri


def download_failure(status: str | None, message: str | None) -> DecodeError | None:
    """Returns the error of an img2dataset row without an image."""
    if status not in DOWNLOAD_FAILURES:
        return None
    text = message or status
    kinds = (kind for pattern, kind in _DOWNLOAD_MESSAGES if pattern in text and status == "failed_to_download")
    return DecodeError("download", next(kinds, DOWNLOAD_FAILURES[status]), f"{status}: {text}")


def _row_pages(uri: str, page_rows: int) -> Iterator[list[dict[str, Any]]]:
    """Yields rows as dicts of known columns. Unreadable rows have the key FAULT."""
    if not storage.exists(uri):
        raise ValueError(f"no manifest at {uri!r}; fix `input`, or write the file first")
    suffix = uri.rpartition(".")[2].lower()
    read = {"parquet": _read_parquet, "jsonl": _read_jsonl, "csv": _read_csv}[suffix]
    try:
        yield from read(uri, page_rows)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{uri} is not a readable manifest: {error}") from error


def _read_parquet(uri: str, page_rows: int) -> Iterator[list[dict[str, Any]]]:
    with open_file(uri) as file:
        parquet = pq.ParquetFile(file)
        columns = _known_columns(parquet.schema_arrow.names, uri)
        schema = pa.schema([(name, _TYPES[name]) for name in columns])
        for batch in parquet.iter_batches(batch_size=page_rows, columns=columns):
            yield _bisected(pa.Table.from_batches([batch]).select(columns), lambda table: _cast(table, schema, uri))


def _read_jsonl(uri: str, page_rows: int) -> Iterator[list[dict[str, Any]]]:
    with open_file(uri) as file:
        lines = (line for line in file if line.strip())
        columns: list[str] = []
        while page := list(islice(lines, page_rows)):
            rows = [_json_row(line) for line in page]
            if not columns and (names := {name for row in rows for name in row if name != FAULT}):
                columns = _known_columns(sorted(names), uri)
            if not columns:
                raise ValueError(f"{uri} is not a readable manifest: {rows[0][FAULT]}")
            yield _bisected(rows, _typed)


def _json_row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8", "surrogateescape"))
    except ValueError as error:
        return {FAULT: f"not JSON: {error}"}
    return row if isinstance(row, dict) else {FAULT: f"a {type(row).__name__}, not a JSON object"}


def _typed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    known = [row for row in rows if FAULT not in row]
    typed = iter(pa.Table.from_pylist(known, schema=_ROW).to_pylist())
    return [row if FAULT in row else next(typed) for row in rows]


def _cast(table: pa.Table, schema: pa.Schema, uri: str) -> list[dict[str, Any]]:
    """Raises ValueError for a column of the wrong type, _BadValueError for a value."""
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
    """A value that cannot be cast to its column's type."""


def _bisected(rows: Any, typed: Callable[[Any], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Returns `typed(rows)`. Bisects on failure, so that only bad rows become faults."""
    try:
        return typed(rows)
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError, _BadValueError) as error:
        half = len(rows) // 2
        return _bisected(rows[:half], typed) + _bisected(rows[half:], typed) if half else [{FAULT: str(error)}]


def _read_csv(uri: str, page_rows: int) -> Iterator[list[dict[str, Any]]]:
    ragged: deque[tuple[int, dict[str, Any]]] = deque()

    def note_ragged(row: pa.csv.InvalidRow) -> str:
        fault = f"it has {row.actual_columns} values for {row.expected_columns} columns"
        ragged.append((row.number, {FAULT: fault}))
        return "skip"

    parse = pa.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=note_ragged)
    read = pa.csv.ReadOptions(use_threads=False)  # threads drop the numbers of skipped rows
    with open_file(uri) as file, pa.csv.open_csv(file, read, parse) as reader:
        columns = _known_columns(reader.schema.names, uri)
    ragged.clear()
    # as text: Arrow would stop at the first value that is not a number
    convert = pa.csv.ConvertOptions(
        include_columns=columns, column_types=dict.fromkeys(columns, pa.string()), check_utf8=False
    )
    schema = pa.schema([(name, _TYPES[name]) for name in columns])
    number = 2  # of the first row after the header, as Arrow counts
    with open_file(uri) as file, pa.csv.open_csv(file, read, parse, convert) as reader:
        for batch in reader:
            for start in range(0, batch.num_rows, page_rows):
                texts = _numbers_stripped(pa.Table.from_batches([batch.slice(start, page_rows)]), convert.null_values)
                merged = _merged(_bisected(texts, lambda table: _cast(table, schema, uri)), ragged, number)
                number += len(merged)
                yield from _pages(merged, page_rows)
    yield from _pages([row for _, row in ragged], page_rows)


def _numbers_stripped(table: pa.Table, null_values: Sequence[str]) -> pa.Table:
    for index, name in enumerate(table.column_names):
        if name in _NUMBERS:
            text = pc.ascii_trim_whitespace(table[name])
            is_null = pc.is_in(text, pa.array(null_values, pa.string()))
            table = table.set_column(index, name, pc.if_else(is_null, None, text))
    return table


def _pages(rows: list[dict[str, Any]], page_rows: int) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(rows), page_rows):
        yield rows[start : start + page_rows]


def _merged(rows: list[dict[str, Any]], ragged: deque[tuple[int, dict[str, Any]]], number: int) -> list[dict[str, Any]]:
    """Inserts ragged rows by number; `number` is that of the first row."""
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


def _medium(number: int, root: str, row: dict[str, Any], *, source: str) -> Medium:
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
    if not uri:
        return "it has no uri"
    if not is_utf8(*(value for value in row.values() if isinstance(value, str))):
        return f"it is not UTF-8: {storage.shown_uri(uri)!r}"
    for name in _NUMBERS:
        value = row.get(name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            return f"{name} = {value} must be a number of at least 0"
    start_seconds, end_seconds = row.get("start_seconds") or 0.0, row.get("end_seconds")
    if end_seconds is not None and end_seconds <= start_seconds:
        return f"{end_seconds = } must be after {start_seconds = }"
    if not is_web(uri) and not storage.has_known_scheme(uri):
        return f"{storage.shown_uri(uri)} has an unknown scheme; fix the part before ://"
    return None


def _version(row: dict[str, Any]) -> FileVersion | None:
    size, etag = row.get("size"), row.get("etag") or None
    return None if size is None else FileVersion(size, etag, etag or f"{size}-stated")


def _headers(row: dict[str, Any]) -> dict[str, Any]:
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
