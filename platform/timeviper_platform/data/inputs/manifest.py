"""Turns the rows of a table with the MANIFEST schema into media.

The same values give the same media in every format: numbers may be text, ids numbers; NaN and null mean none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pyarrow as pa

from timeviper_platform.common import storage
from timeviper_platform.common.listing import FileVersion
from timeviper_platform.common.schemas import MANIFEST
from timeviper_platform.data.inputs.tables import Fault, NumberedRow, read_rows
from timeviper_platform.data.media.container import DecodeError, ErrorType
from timeviper_platform.data.media.http_file import is_web
from timeviper_platform.data.media.medium import Medium, exact, media_id_of

URL_COLUMN = "url"
"""Alternative to `uri` in CC12M, PixelProse and img2dataset."""

COLUMNS = (*MANIFEST.names, URL_COLUMN)

_ZERO = Fraction(0)

NO_NUMBER = frozenset({"", "nan", "null", "none", "na", "n/a", "#n/a", "#na", "<na>", "-nan"})
"""Texts of missing numbers, in lower case, as pandas and Arrow read them."""

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
        ValueError: for a file that cannot be read, or has no column `uri` or `url`.
    """
    root = absolute(uri).rpartition("/")[0]
    name = storage.shown_uri(uri)
    for rows in read_rows(uri, COLUMNS, ("uri", URL_COLUMN), page_rows):
        yield [medium_of(row, root, source=uri, name=name) for row in rows]


def is_utf8(*values: str) -> bool:
    return all(value.isascii() or _is_encodable(value) for value in values)


def _is_encodable(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def absolute(uri: str) -> str:
    return storage.split_uri(uri)[1] if storage.is_local(uri) else uri


def download_failure(status: str | None, message: str | None) -> DecodeError | None:
    """Returns the error of an img2dataset row without an image."""
    if status not in DOWNLOAD_FAILURES:
        return None
    text = message or status
    kinds = (kind for pattern, kind in _DOWNLOAD_MESSAGES if pattern in text and status == "failed_to_download")
    return DecodeError("download", next(kinds, DOWNLOAD_FAILURES[status]), f"{status}: {text}")


def text_of(value: Any) -> str | None:
    """Returns the value as JSON and CSV write it, without surrounding blanks. Raises ValueError for lists and dicts."""
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape").strip() or None
    if isinstance(value, bool):
        return str(value).lower()
    if value is None or value != value:
        return None
    if isinstance(value, int | float | Decimal):
        return str(value)
    raise ValueError(f"a {type(value).__name__}, not text")


def _real(value: Any) -> float | None:
    kind = type(value)
    if kind is not float:
        try:
            if kind is bool or not isinstance(value, (str, int, float, Decimal)) or (kind is str and "_" in str(value)):
                raise ValueError
            value = float(value)
        except (ValueError, OverflowError):
            if kind is str and str(value).strip().lower() in NO_NUMBER:
                return None
            raise ValueError(f"{value!r:.80} is not a number") from None
    return value if value == value else None


def _whole(maximum: int) -> Callable[[Any], int | None]:
    num_digits = len(str(maximum))

    def convert(value: Any) -> int | None:
        if type(value) is str and value.isdecimal() and len(value) < num_digits:
            return int(value)
        if type(value) is int and 0 <= value <= maximum:
            return value
        number = _real(value)
        if number is None:
            return None
        if not number.is_integer() or abs(number) > maximum:
            raise ValueError(f"{value!r:.80} is not a whole number of at most {maximum}")
        return int(value) if isinstance(value, str) and value.strip().isdecimal() else int(number)

    return convert


def _converter(data_type: pa.DataType) -> Callable[[Any], Any]:
    if pa.types.is_integer(data_type):
        return _whole(2 ** (data_type.bit_width - 1) - 1)
    return _real if pa.types.is_floating(data_type) else text_of


_CONVERTERS = {**{field.name: _converter(field.type) for field in MANIFEST}, URL_COLUMN: text_of}
_TEXTS = frozenset(name for name, converter in _CONVERTERS.items() if converter is text_of)


def _typed(row: dict[str, Any]) -> dict[str, Any] | Fault:
    """Returns the values that are not missing, in the types and ranges of MANIFEST."""
    typed: dict[str, Any] = {}
    name = ""
    try:
        for name, value in row.items():
            if type(value) is str and name in _TEXTS:
                value = value.strip() or None
            elif value is not None:
                value = _CONVERTERS[name](value)
            if value is None:
                continue
            if type(value) is str:
                if not value.isascii() and not _is_encodable(value):
                    return Fault(f"it is not UTF-8: {storage.shown_uri(typed.get('uri') or value)!r}")
            elif not 0 <= value < math.inf:
                return Fault(f"{name} = {value} must be a number of at least 0")
            typed[name] = value
    except ValueError as error:
        return Fault(f"{name}: {error}")
    return typed


def medium_of(row: NumberedRow, root: str, *, source: str, name: str) -> Medium:
    """Returns the medium of a row of the table `source`, shown as `name`; relative URIs are below `root`."""
    number, given = row
    values = given if isinstance(given, Fault) else _typed(given)
    origin = f"{name}: row {number}"
    uri = _uri(given if isinstance(values, Fault) else values)
    full = uri if not uri or "://" in uri or uri.startswith("/") else storage.join_uri(root, uri)
    if not isinstance(values, Fault) and (fault := _fault(uri, values)) is not None:
        values = Fault(fault)
    if isinstance(values, Fault):
        own_id = media_id_of(f"{source}#row={number}", root)
        return Medium(full, own_id, error=DecodeError("list", ErrorType.BAD_ROW, f"{origin}: {values.reason}"))
    start_seconds, end_seconds = values.get("start_seconds"), values.get("end_seconds")
    return Medium(
        full,
        values.get("media_id") or media_id_of(full, root, start_seconds, end_seconds),
        start_seconds,
        end_seconds,
        version=_version(values),
        sha256=values.get("sha256"),
        **_headers(values),
        error=download_failure(values.get("status"), values.get("error_message")),
        origin=origin,
    )


def _uri(row: dict[str, Any] | Fault) -> str:
    uri = "" if isinstance(row, Fault) else row.get("uri") or row.get(URL_COLUMN)
    return uri if isinstance(uri, str) else ""


def _fault(uri: str, row: dict[str, Any]) -> str | None:
    if not uri:
        return "it has no uri"
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
    duration, modality = row.get("duration_seconds"), (row.get("modality") or "video").lower()
    is_image = modality == "image"
    if row.get("size") is None or not (is_image or (duration and modality == "video")):
        return {}
    return {
        "modality": "image" if is_image else "video",
        "duration_seconds": exact(duration) if duration and not is_image else _ZERO,
        "source_fps": row.get("source_fps") or 0.0,
        "width": row.get("width") or 0,
        "height": row.get("height") or 0,
        "codec": row.get("codec") or "",
    }
