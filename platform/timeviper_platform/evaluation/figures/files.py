"""Figures as JSON, CSV, SVG and PNG."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from typing import Any

from timeviper_platform.common import storage
from timeviper_platform.common.charts import FileFormat

Draw = Callable[[FileFormat], bytes]


def write_json(folder: str, name: str, value: Any) -> str:
    uri = storage.join_uri(folder, f"{name}.json")
    storage.write_report(uri, value)
    return uri


def write_csv(folder: str, name: str, rows: Sequence[dict[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return _write(folder, f"{name}.csv", file.getvalue().encode())


def write_pictures(folder: str, name: str, draw: Draw) -> list[str]:
    formats: tuple[FileFormat, ...] = ("svg", "png")
    return [_write(folder, f"{name}.{file_format}", draw(file_format)) for file_format in formats]


def _write(folder: str, name: str, content: bytes) -> str:
    uri = storage.join_uri(folder, name)
    storage.write_bytes(uri, content)
    return uri
