"""Files that hold many media to items: WebDataset tars and Parquet files with a column of bytes.

Nothing is unpacked: an item addresses its bytes inside the file (parts.py), and a tar's members are read as a stream.
Knows img2dataset's output: failed rows of NAME.parquet beside NAME.tar, or inside the Parquet itself.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from timeviper_platform.common import storage
from timeviper_platform.common.listing import FileVersion
from timeviper_platform.common.storage import open_file
from timeviper_platform.data.inputs.manifest import download_failure
from timeviper_platform.data.media.container import MEDIA_SUFFIXES, DecodeError, ErrorType
from timeviper_platform.data.media.locations import CellLocation, RangeLocation
from timeviper_platform.data.media.medium import Medium, media_id_of
from timeviper_platform.data.media.probe import file_version

_STATUS_COLUMNS = ["key", "status", "error_message"]


def tar_items(uri: str, root: str, version: FileVersion | None = None) -> Iterator[Medium]:
    """The media of a tar, in its order, with the id of TAR/MEMBER; a tar that breaks off ends with a rejected item.

    Args:
        uri: the tar.
        root: what ids are relative to.
        version: of the tar, where a listing says it.
    """
    yield from _failed_downloads(uri, root)
    try:
        version = version or file_version(uri)
        with open_file(uri) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # not in typeshed; it would keep every header that it has seen
                if member.isreg() and member.name.lower().endswith(MEDIA_SUFFIXES):
                    yield _tar_item(uri, root, version, member)
    except DecodeError as error:
        yield Medium(uri, media_id_of(uri, root), error=DecodeError("list", error.error_type, error.message))
    except (tarfile.TarError, OSError) as error:
        text = f"{uri}: {error}; only plain, whole tars can be read in place (unpack .tar.gz first)"
        yield Medium(uri, media_id_of(uri, root), error=DecodeError("list", ErrorType.CORRUPT_FILE, text))


def bytes_column(schema: pa.Schema) -> str | None:
    """The one column that holds media: binary, or a struct with the field `bytes` (then NAME.bytes); None without.

    Raises:
        ValueError: when there is more than one.
    """
    found = []
    for field in schema:
        if pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type):
            found.append(field.name)
        elif pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            found.append(f"{field.name}.bytes")
    if len(found) > 1:
        raise ValueError(f"the columns {', '.join(found)} all hold bytes; write a file with one of them")
    return found[0] if found else None


def cell_items(uri: str, root: str, column: str, version: FileVersion | None = None) -> Iterator[Medium]:
    """The media of a Parquet file's bytes column; the id is `media_id`, else that of FILE/KEY or FILE/ROW.

    Rows that img2dataset could not download become rejected items.
    """
    version = version or file_version(uri)
    with open_file(uri) as file:
        parquet = pq.ParquetFile(file)
        names = [name for name in ("media_id", *_STATUS_COLUMNS) if name in parquet.schema_arrow.names]
        number = 0
        for group in range(parquet.num_row_groups):
            num_rows = parquet.metadata.row_group(group).num_rows
            rows = parquet.read_row_group(group, columns=names).to_pylist() if names else [{}] * num_rows
            for place, row in enumerate(rows):
                address = CellLocation(uri, column, group, place).address()
                media_id = row.get("media_id") or media_id_of(f"{uri}/{row.get('key') or number}", root)
                failure = download_failure(row.get("status"), row.get("error_message"))
                # the size is the file's: that of one value is not known without reading it
                text = f"{version.text}/{column}-{group}-{place}"
                yield Medium(address, media_id, version=version._replace(text=text), error=failure)
                number += 1


def _tar_item(uri: str, root: str, version: FileVersion, member: tarfile.TarInfo) -> Medium:
    address = RangeLocation(uri, member.offset_data, member.size).address()
    text = f"{version.text}/{member.offset_data}-{member.size}"
    return Medium(
        address,
        media_id_of(storage.join_uri(uri, member.name), root),
        version=FileVersion(member.size, version.etag, text),
    )


def _failed_downloads(tar_uri: str, root: str) -> Iterator[Medium]:
    """Rows of img2dataset's table beside a tar for which the tar has no member."""
    table_uri = str(tar_uri.removesuffix(PurePosixPath(tar_uri).suffix)) + ".parquet"
    if not storage.exists(table_uri):
        return
    with open_file(table_uri) as file:
        parquet: Any = pq.ParquetFile(file)
        if not {"key", "status"} <= set(parquet.schema_arrow.names):
            return
        names = [name for name in _STATUS_COLUMNS if name in parquet.schema_arrow.names]
        for batch in parquet.iter_batches(columns=names):
            for row in batch.to_pylist():
                failure = download_failure(row["status"], row.get("error_message"))
                if failure:
                    name = storage.join_uri(tar_uri, str(row["key"]))
                    yield Medium(name, media_id_of(name, root), error=failure)
