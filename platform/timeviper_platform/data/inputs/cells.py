"""Lists the media in Parquet files with a column of bytes, without reading the bytes.

Also reads Hugging Face's layouts: {bytes, path}, where either may be null, and lists of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from timeviper_platform.common import storage
from timeviper_platform.common.listing import FileVersion
from timeviper_platform.common.storage import open_file
from timeviper_platform.data.inputs.manifest import download_failure, medium_of, text_of
from timeviper_platform.data.inputs.tables import known_columns, text_rows
from timeviper_platform.data.media.container import DecodeError, ErrorType
from timeviper_platform.data.media.locations import CellLocation
from timeviper_platform.data.media.medium import Medium, media_id_of
from timeviper_platform.data.media.probe import file_version

LABEL_COLUMNS = ("media_id", "key", "status", "error_message")
"""Columns of this job and of img2dataset."""

BATCH_ROWS_WITH_BYTES = 8
"""Rows read at once where no statistics show which bytes are null."""

BATCH_ROWS = 4096


class BytesColumn(NamedTuple):
    """A column whose cells, or fields or items of cells, are media."""

    name: str
    field: str | None
    """The struct's field."""
    is_list: bool

    @property
    def address(self) -> str:
        return self.name if self.field is None else f"{self.name}.{self.field}"


class _Entry(NamedTuple):
    item: int | None
    """Position in a list."""
    has_bytes: bool
    path: str | None


def find_bytes_column(schema: pa.Schema, wanted: str | None) -> BytesColumn | None:
    """Returns the column of bytes; None for a manifest, which has `uri` or no bytes.

    Raises:
        ValueError: when `wanted` does not choose one of several.
    """
    found = [column for field in schema if (column := _bytes_column(field)) is not None]
    is_manifest = any(name.strip().lower() == "uri" for name in schema.names)
    names = ", ".join(column.address for column in found)
    if wanted is not None:
        chosen = [column for column in found if wanted.lower() in (column.name.lower(), column.address.lower())]
        if not chosen and found and not is_manifest:
            raise ValueError(f"bytes_column={wanted} is not a column of bytes; it has {names}")
        return chosen[0] if chosen else None
    if is_manifest:
        return None
    if len(found) > 1:
        raise ValueError(f"the columns {names} all hold bytes; choose one with bytes_column={found[0].name}")
    return found[0] if found else None


def cell_media(uri: str, root: str, column: BytesColumn, version: FileVersion | None = None) -> Iterator[Medium]:
    """Yields the media of a column. A row group that cannot be read is one error.

    Ids are `media_id`, or derived from FILE/KEY or FILE/ROW, with /ITEM for list items. A path without bytes is read as
    a manifest's `uri`.
    """
    version = version or file_version(uri)
    with open_file(uri) as file:
        parquet = pq.ParquetFile(file)
        names = known_columns(parquet.schema_arrow.names, LABEL_COLUMNS, (), uri)
        first = 0
        for group in range(parquet.num_row_groups):
            num_rows = parquet.metadata.row_group(group).num_rows
            try:
                labels = _labels(parquet, group, names) if names else [{}] * num_rows
                entries = _entries(parquet, group, column)
                for index, (of_row, row) in enumerate(zip(entries, labels, strict=True)):
                    for entry in of_row:
                        location = CellLocation(uri, column.address, group, index, entry.item)
                        yield _medium(entry, row, location, first + index, root, version)
            except (pa.ArrowException, OSError) as error:
                text = f"{storage.shown_uri(uri)}: row group {group} ({num_rows} rows) is damaged: {error}"
                own_id = media_id_of(f"{uri}#row_group={group}", root)
                yield Medium(uri, own_id, error=DecodeError("list", ErrorType.CORRUPT_FILE, text))
            first += num_rows


def _labels(parquet: Any, group: int, names: dict[str, str]) -> list[dict[str, Any]]:
    table = parquet.read_row_group(group, columns=list(names))
    return text_rows(table.rename_columns([names[name] for name in table.column_names]))


def _medium(
    entry: _Entry, row: dict[str, Any], location: CellLocation, row_index: int, root: str, version: FileVersion
) -> Medium:
    uri, item = location.uri, "" if location.item is None else f"/{location.item}"
    name = storage.shown_uri(uri)
    origin = f"{name}: row {row_index + 1}"
    try:
        label = {column: text_of(value) for column, value in row.items()}
    except ValueError as error:
        return _bad_row(location, root, f"{origin}: its media_id, key or status is {error}")
    stated_id = label.get("media_id")
    media_id = f"{stated_id}{item}" if stated_id else media_id_of(f"{uri}/{label.get('key') or row_index}{item}", root)
    failure = download_failure(label.get("status"), label.get("error_message"))
    if entry.has_bytes or failure is not None:
        # with the file's size: a cell's is unknown until read
        own = version._replace(text=f"{version.text}/{location.version_text()}")
        return Medium(location.address(), media_id, version=own, error=failure, origin=origin)
    if not entry.path:
        return _bad_row(location, root, f"{origin}: {location.column} has neither bytes nor a path")
    named = {"uri": entry.path, "media_id": stated_id and media_id}
    return medium_of((row_index + 1, named), uri.rpartition("/")[0], source=uri, name=name)


def _bad_row(location: CellLocation, root: str, message: str) -> Medium:
    address = location.address()
    return Medium(address, media_id_of(address, root), error=DecodeError("list", ErrorType.BAD_ROW, message))


def _entries(parquet: Any, group: int, column: BytesColumn) -> Iterator[list[_Entry]]:
    """Yields the media of every row. Reads bytes only where statistics do not show which are null."""
    metadata = parquet.metadata.row_group(group)
    if column.field is None and not column.is_list:
        yield from ([_Entry(None, True, None)] for _ in range(metadata.num_rows))
        return
    leaves = {leaf.path_in_schema: leaf for leaf in map(metadata.column, range(metadata.num_columns))}
    own = [path for path in leaves if path.startswith(f"{column.name}.")]
    bytes_path = next(path for path in own if column.field is None or path.endswith(f".{column.field}"))
    path_path = next((path for path in own if path.endswith(".path")), None)
    has_bytes = _has_bytes(parquet, group, leaves[bytes_path], path_path)
    if has_bytes and not column.is_list:
        yield from ([_Entry(None, True, None)] for _ in range(metadata.num_rows))
        return
    if has_bytes is None or path_path is None:
        batches = parquet.iter_batches(BATCH_ROWS_WITH_BYTES, row_groups=[group], columns=[column.name])
    else:
        batches = parquet.iter_batches(BATCH_ROWS, row_groups=[group], columns=[path_path])
    for batch in batches:
        for row in text_rows(batch):
            yield _row_entries(row[column.name], column, has_bytes)


def _has_bytes(parquet: Any, group: int, leaf: Any, path_path: str | None) -> bool | None:
    """Returns whether all or none have bytes; None if only some have, or without statistics."""
    if not leaf.is_stats_set or not leaf.statistics.has_null_count:
        return None
    num_null = leaf.statistics.null_count
    if num_null in (0, leaf.num_values):
        return bool(num_null == 0)
    if path_path is None:
        return None
    batches = parquet.iter_batches(BATCH_ROWS, row_groups=[group], columns=[path_path])
    num_empty = sum(not cell for batch in batches for cell in batch.column(0).to_pylist())  # rows without a path
    return True if num_null == num_empty else None


def _row_entries(cell: Any, column: BytesColumn, has_bytes: bool | None) -> list[_Entry]:
    if not column.is_list:
        return [_entry(None, cell, column, has_bytes)]
    return [_entry(index, item, column, has_bytes) for index, item in enumerate(cell or ())]


def _entry(item: int | None, value: Any, column: BytesColumn, has_bytes: bool | None) -> _Entry:
    if column.field is None:
        return _Entry(item, value is not None, None)
    fields = value or {}
    is_there = fields.get(column.field) is not None if has_bytes is None else has_bytes and value is not None
    return _Entry(item, is_there, text_of(fields.get("path")))


def _bytes_column(field: pa.Field) -> BytesColumn | None:
    data_type, is_list = _plain(field.type), False
    if _is_list(data_type):
        data_type, is_list = _plain(data_type.value_type), True
    if _is_bytes(data_type):
        return BytesColumn(field.name, None, is_list)
    if pa.types.is_struct(data_type):
        index = data_type.get_field_index("bytes")
        has_path = data_type.get_field_index("path") >= 0
        if index >= 0 and (_is_bytes(kind := _plain(data_type.field(index).type)) or (has_path and kind == pa.null())):
            return BytesColumn(field.name, "bytes", is_list)
    return None


def _plain(data_type: pa.DataType) -> pa.DataType:
    return data_type.value_type if pa.types.is_dictionary(data_type) else data_type


def _is_bytes(data_type: pa.DataType) -> bool:
    """Returns False for bytes of a fixed size, such as hashes."""
    return pa.types.is_binary(data_type) or pa.types.is_large_binary(data_type) or pa.types.is_binary_view(data_type)


def _is_list(data_type: pa.DataType) -> bool:
    tests = (
        *(pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list),
        *(pa.types.is_list_view, pa.types.is_large_list_view),
    )
    return any(test(data_type) for test in tests)
