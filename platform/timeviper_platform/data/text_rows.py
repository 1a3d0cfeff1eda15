"""Text as other people wrote it: Arrow rows whose strings may hold bytes that are no UTF-8.

Knows how such bytes are kept until somebody counts the row as bad. Does not know what the text says.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa


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
