"""Reads annotation files; an error names the file, the row and the field."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow.parquet as pq

from timeviper_platform.common import storage
from timeviper_platform.data.inputs.tables import json_values, open_text
from timeviper_platform.evaluation.scoring.spans import Span


class AnnotationError(ValueError):
    def __init__(self, where: str, fault: str) -> None:
        super().__init__(f"{where}: {fault}; compare the file with the owner's, or download it again")


class Fields:
    """Typed access to the fields of one annotation."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, Mapping):
            raise AnnotationError(where, f"is {_shown(values)}, not an object with fields")
        self.values, self.where = values, where

    def text(self, name: str, default: str | None = None) -> str:
        """A non-empty text, also of a number; `default` for a missing, null or empty field."""
        value = self.values.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = f"{value}"
        if isinstance(value, str) and value.strip():
            return value.strip()
        if default is not None and value in (None, ""):
            return default
        raise self.error(name, "a text")

    def number(self, name: str, default: float | None = None) -> float:
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(name, "a number")
        return value

    def texts(self, name: str, *, at_least: int = 1) -> tuple[str, ...]:
        value = self.values.get(name)
        if not isinstance(value, list | tuple) or len(value) < at_least:
            raise self.error(name, f"a list of at least {at_least} texts")
        if not all(isinstance(item, str | int | float) for item in value):
            raise self.error(name, "a list of texts")
        return tuple(str(item).strip() for item in value)

    def objects(self, name: str) -> Iterator[Fields]:
        value = self.values.get(name)
        if not isinstance(value, list | tuple):
            raise self.error(name, "a list of objects")
        for number, item in enumerate(value):
            yield Fields(item, f"{self.where}, {name}[{number}]")

    def span(self, name: str, value: Any = None) -> Span:
        """[start, end] in seconds."""
        value = self.values.get(name) if value is None else value
        is_pair = isinstance(value, list | tuple) and len(value) == 2
        if not is_pair or not all(isinstance(x, int | float) and math.isfinite(x) for x in value):
            raise self.error(name, "a pair of seconds", value)
        return Span(float(value[0]), float(value[1]))

    def spans(self, name: str) -> tuple[Span, ...]:
        value = self.values.get(name)
        if not isinstance(value, list | tuple):
            raise self.error(name, "a list of pairs of seconds")
        return tuple(self.span(name, pair) for pair in value)

    def letter(self, name: str, num_options: int) -> str:
        """The right option as 'B', 'B.', '(B)' or a number from 0."""
        value = self.values.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < num_options:
            return chr(ord("A") + value)
        letter = value.strip("(). ").upper() if isinstance(value, str) else ""
        if len(letter) != 1 or not 0 <= ord(letter) - ord("A") < num_options:
            raise self.error(name, f"one of {num_options} letters")
        return letter

    def error(self, name: str, expected: str, value: Any = None) -> AnnotationError:
        if value is None and name not in self.values:
            return AnnotationError(self.where, f"field {name!r} is missing, it has {', '.join(map(str, self.values))}")
        shown = _shown(self.values.get(name) if value is None else value)
        return AnnotationError(self.where, f"field {name!r} is {shown}, not {expected}")


def read_json_rows(uri: str) -> list[Fields]:
    """Entries of a JSON array, or JSON lines."""
    try:
        with open_text(uri) as file:
            values = list(json_values(file.read))
    except FileNotFoundError as error:
        raise _missing(uri) from error
    except ValueError as error:
        raise AnnotationError(uri, f"neither a JSON array nor JSON lines ({error})") from error
    return [Fields(value, f"{uri} row {number}") for number, value in enumerate(values)]


def read_json_object(uri: str) -> Fields:
    try:
        value = json.loads(storage.read_bytes(uri).decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise _missing(uri) from error
    except ValueError as error:
        raise AnnotationError(uri, f"not JSON ({error})") from error
    return Fields(value, uri)


def read_parquet_rows(*uris: str) -> list[Fields]:
    """Rows of Parquet files that are one table."""
    rows = []
    for uri in uris:
        try:
            with storage.open_file(uri) as file:
                values = pq.read_table(file).to_pylist()
        except FileNotFoundError as error:
            raise _missing(uri) from error
        except (OSError, ValueError) as error:
            raise AnnotationError(uri, f"not a Parquet file ({error})") from error
        rows += [Fields(value, f"{uri} row {number}") for number, value in enumerate(values)]
    return rows


def read_text_lines(uri: str) -> list[tuple[str, str]]:
    """Non-blank lines, each after its file and number."""
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise _missing(uri) from error
    except UnicodeDecodeError as error:
        raise AnnotationError(uri, f"not UTF-8 ({error})") from error
    return [(f"{uri} line {n}", line.strip()) for n, line in enumerate(text.splitlines(), start=1) if line.strip()]


def parquet_files(folder: str, prefix: str = "") -> list[str]:
    """Parquet files of a split, named PREFIX.parquet or PREFIX-00000-of-00002.parquet."""
    files = [uri for uri in storage.files_in(folder, ".parquet") if uri.rpartition("/")[2].startswith(prefix)]
    if not files:
        raise ValueError(f"{folder} has no {prefix}*.parquet; set benchmark.folder to the downloaded data set")
    return files


def _missing(uri: str) -> ValueError:
    return ValueError(f"{uri} does not exist; set benchmark.folder to the downloaded data set")


def _shown(value: Any) -> str:
    return f"{value!r:.80}"
