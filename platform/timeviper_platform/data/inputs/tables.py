"""Reads the rows of Parquet, JSON, JSON lines, CSV and TSV files as dicts, also with gzip, a page at a time."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, islice
from operator import itemgetter
from typing import Any, NamedTuple, NoReturn, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from timeviper_platform.common import storage
from timeviper_platform.common.storage import open_file
from timeviper_platform.data.media.content import describe_manifest

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
TABLE_SUFFIXES = (".parquet", *TEXT_SUFFIXES, *(f"{suffix}.gz" for suffix in TEXT_SUFFIXES))

JSON_CHUNK_CHARS = 1 << 20

HEAD_ROWS = 1000
"""Rows whose names are the columns of a JSON file."""

MAX_FIELD_CHARS = 1 << 24
"""Maximum CSV field. Python's default, 131,072, is less than some captions."""

_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_DAMAGE = (OSError, EOFError, zlib.error, UnicodeError, csv.Error, pa.ArrowException)


class Fault(NamedTuple):
    """A row that cannot be read."""

    reason: str


NumberedRow = tuple[int, dict[str, Any] | Fault]
"""Number from 1, without the header; values."""


class TableError(ValueError):
    """A file that is not a table with the wanted columns."""


class DamagedTableError(TableError):
    """A file without a row that can be read."""


def is_table(uri: str) -> bool:
    return uri.lower().endswith(TABLE_SUFFIXES)


def read_rows(uri: str, columns: Sequence[str], needed: Sequence[str], page_rows: int) -> Iterator[list[NumberedRow]]:
    """Yields pages of rows with those of `columns` that the file has, in its own types.

    Ignores case and blanks of column names. A bad row, or the rest of a damaged file, is one Fault.

    Raises:
        TableError: for a file without rows that can be read, or without any of the columns `needed`.
    """
    kind = uri.lower().removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        rows = _parquet_rows(uri, columns, needed, page_rows)
    elif kind in ("csv", "tsv"):
        rows = _csv_rows(uri, columns, needed, "\t" if kind == "tsv" else ",")
    else:
        rows = _json_rows(uri, columns, needed)
    return _up_to_damage(rows, uri, page_rows)


def text_rows(table: Any) -> list[dict[str, Any]]:
    """Returns rows as dicts. Invalid UTF-8 becomes surrogates, which `is_utf8` detects."""
    try:
        return list(table.to_pylist())
    except UnicodeDecodeError:
        columns = {field.name: _values(table[field.name]) for field in table.schema}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def json_values(read: Callable[[int], str], text: str = "", chunk_chars: int = JSON_CHUNK_CHARS) -> Iterator[Any]:
    """Yields the entries of a JSON array, or JSON values that follow each other; `text` was read before.

    Raises:
        ValueError: when the text is not JSON.
    """
    decoder = json.JSONDecoder()
    text = (text + read(chunk_chars)).lstrip()
    is_array = text.startswith("[")
    separators = " \t\r\n," if is_array else " \t\r\n"
    index, is_end = int(is_array), False
    while True:
        while index < len(text) and text[index] in separators:
            index += 1
        if is_array and text.startswith("]", index):
            if text[index + 1 :].strip() or read(chunk_chars).strip():
                raise ValueError("something follows the array")
            return
        try:
            value, stop = decoder.raw_decode(text, index)
            if stop == len(text) and not is_end:
                raise ValueError("a number may continue in the next chunk")
        except ValueError:
            if is_end and index == len(text) and not is_array:
                return
            if is_end:
                raise
            chunk = read(chunk_chars)
            text, index, is_end = text[index:] + chunk, 0, not chunk
        else:
            yield value
            index = stop


@contextmanager
def open_text(uri: str, newline: str | None = None) -> Iterator[TextIO]:
    """Opens text by its byte order mark, else as UTF-8. Invalid bytes become surrogates."""
    with open_file(uri) as file:
        content = gzip.GzipFile(fileobj=file) if uri.lower().endswith(".gz") else file
        head = content.read(4)
        content.seek(0)
        encoding = next((encoding for mark, encoding in _BOMS if head.startswith(mark)), "utf-8")
        errors = "replace" if encoding == "utf-16" else "surrogateescape"
        with io.TextIOWrapper(content, encoding, errors, newline) as text:
            yield text


def _up_to_damage(rows: Iterator[NumberedRow], uri: str, page_rows: int) -> Iterator[list[NumberedRow]]:
    """Ends with a Fault where the file is damaged after some rows."""
    page: list[NumberedRow] = []
    number = 0
    try:
        with storage.plain_errors():
            for row in rows:
                page.append(row)
                if len(page) == page_rows:
                    number = row[0]
                    yield page
                    page = []
    except _DAMAGE as error:
        number = page[-1][0] if page else number
        if not number and isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile) and error.errno:
            raise  # the storage's error
        text = storage.shown_text(str(error)) or type(error).__name__
        if not number:
            raise_unreadable(uri, text, error)
        page.append((number + 1, Fault(f"the file is damaged or cut from here on: {text}")))
    if page:
        yield page


def raise_unreadable(uri: str, reason: str, cause: Exception | None = None) -> NoReturn:
    """Raises DamagedTableError with what the file is, if it is recognised, else why it cannot be read."""
    text = f"it is {known}" if (known := _known_content(uri)) else f"{reason}; write or fetch it again"
    raise DamagedTableError(f"{storage.shown_uri(uri)} is not a readable manifest: {text}") from cause


def _known_content(uri: str) -> str | None:
    kind = uri.lower().rpartition(".")[2]
    if kind == "gz":
        return None
    with suppress(OSError), open_file(uri) as file:
        return describe_manifest(file, kind)
    return None


def _parquet_rows(uri: str, columns: Sequence[str], needed: Sequence[str], page_rows: int) -> Iterator[NumberedRow]:
    with open_file(uri) as file:
        parquet = pq.ParquetFile(file)
        names = known_columns(parquet.schema_arrow.names, columns, needed, uri)
        first = 1
        for group in range(parquet.num_row_groups):
            number = first
            try:
                for batch in parquet.iter_batches(page_rows, row_groups=[group], columns=list(names)):
                    for row in text_rows(batch.rename_columns([names[name] for name in batch.schema.names])):
                        yield (number, row)
                        number += 1
            except (pa.ArrowException, OSError) as error:
                yield (number, Fault(f"row group {group} is damaged from here on: {error}"))
            first += parquet.metadata.row_group(group).num_rows


def _json_rows(uri: str, columns: Sequence[str], needed: Sequence[str]) -> Iterator[NumberedRow]:
    with open_text(uri) as text:
        lines = (line for line in text if line.strip())
        first = next(lines, "")
        if first.lstrip().startswith("[") or first.strip() == "{":  # an array, or an object over several lines
            values = _array_values(text, first)
        else:
            values = (_json_value(line) for line in chain([first] if first else [], lines))
        head = list(islice(values, HEAD_ROWS))
        _check_names(head, columns, needed, uri)
        names: dict[str, str] = {}
        for number, value in enumerate(chain(head, values), start=1):
            if isinstance(value, dict):
                yield (number, _known_values(value, names, columns))
            else:
                is_fault = isinstance(value, Fault)
                yield (number, value if is_fault else Fault(f"a {type(value).__name__}, not a JSON object"))


def _check_names(head: Sequence[Any], columns: Sequence[str], needed: Sequence[str], uri: str) -> None:
    names = {name for row in head if isinstance(row, dict) for name in row}
    if names:
        known_columns(sorted(names), columns, needed, uri)
    elif head and all(isinstance(row, Fault) for row in head):
        raise_unreadable(uri, head[0].reason)


def _array_values(text: TextIO, first: str) -> Iterator[Any]:
    try:
        yield from json_values(lambda size: _read_up_to_damage(text, size), first)
    except (ValueError, RecursionError) as error:
        yield Fault(f"not JSON from here on: {error}")


def _read_up_to_damage(text: TextIO, size: int) -> str:
    """Raises the error of a damaged file only when nothing was read before it."""
    parts: list[str] = []
    try:
        while size > 0 and (part := text.read(min(size, io.DEFAULT_BUFFER_SIZE))):
            parts.append(part)
            size -= len(part)
    except _DAMAGE:
        if not parts:
            raise
    return "".join(parts)


def _json_value(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return Fault(f"not JSON: {error}")


def _known_values(row: dict[str, Any], names: dict[str, str], columns: Sequence[str]) -> dict[str, Any]:
    """`names` caches the column of every key."""
    values = {}
    for key, value in row.items():
        name = names.get(key)
        if name is None:
            name = names[key] = folded if (folded := _folded(key)) in columns else ""
        if name and (name not in values or key == name):
            values[name] = value
    return values


def _csv_rows(uri: str, columns: Sequence[str], needed: Sequence[str], delimiter: str) -> Iterator[NumberedRow]:
    if csv.field_size_limit() < MAX_FIELD_CHARS:
        csv.field_size_limit(MAX_FIELD_CHARS)
    with open_text(uri, newline="") as text:
        reader = csv.reader(text, delimiter=delimiter, skipinitialspace=True)
        header = next((values for values in reader if values), [])
        known = known_columns(header, columns, needed, uri)
        names, pick = list(known.values()), _picker([header.index(name) for name in known])
        number = 0
        while True:
            try:
                for values in reader:
                    if not values or (len(values) == 1 and not values[0].strip()):  # a blank line
                        continue
                    number += 1
                    if len(values) == len(header):
                        yield (number, dict(zip(names, pick(values), strict=True)))
                    else:
                        yield (number, Fault(f"it has {len(values)} values for {len(header)} columns"))
                return
            except csv.Error as error:
                number += 1
                yield (number, Fault(f"not CSV: {error}"))


def _picker(indices: Sequence[int]) -> Callable[[Sequence[str]], Sequence[str]]:
    """Returns a function that picks the values at `indices`."""
    if len(indices) == 1:
        return lambda values: (values[indices[0]],)
    return itemgetter(*indices) if indices else lambda _: ()


def known_columns(names: Iterable[str], columns: Sequence[str], needed: Sequence[str], uri: str) -> dict[str, str]:
    """Returns the file's name of each known column. Exact names win over others.

    Raises:
        TableError: without any of the columns `needed`.
    """
    names = list(names)
    known: dict[str, str] = {}
    for name in sorted(names, key=lambda name: name not in columns):
        if (column := _folded(name)) in columns and column not in known.values():
            known[name] = column
    if needed and not set(needed) & set(known.values()):
        if not uri.lower().endswith(".parquet") and _known_content(uri) is not None:
            raise_unreadable(uri, "")
        found = ", ".join(names) or "none"
        raise TableError(f"{storage.shown_uri(uri)}: a manifest needs the column {needed[0]!r}; it has {found:.500}")
    return known


def _folded(name: str) -> str:
    return name.strip("\ufeff \t\r\n").lower()


def _values(column: Any) -> list[Any]:
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        return list(column.to_pylist())
    values = column.cast(pa.large_binary()).to_pylist()
    return [None if value is None else value.decode("utf-8", "surrogateescape") for value in values]
