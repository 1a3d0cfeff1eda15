"""Lists media in WebDataset tars and Parquet files, without unpacking them.

img2dataset lists failures in NAME.parquet next to NAME.tar, or in the Parquet file itself.
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


def tar_media(uri: str, root: str, version: FileVersion | None = None) -> Iterator[Medium]:
    """Yields a tar's media, with ids of TAR/MEMBER relative to `root`. A damaged tar ends with an error."""
    yield from _failed_downloads(uri, root)
    try:
        version = version or file_version(uri)
        with open_file(uri) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # not in typeshed; it would keep every header
                if member.isreg() and member.name.lower().endswith(MEDIA_SUFFIXES):
                    yield _tar_medium(uri, root, version, member)
    except DecodeError as error:
        yield Medium(uri, media_id_of(uri, root), error=DecodeError("list", error.error_type, error.message))
    except (tarfile.TarError, OSError) as error:
        text = f"{uri}: {error}; only uncompressed, complete tars can be read in place (unpack .tar.gz first)"
        yield Medium(uri, media_id_of(uri, root), error=DecodeError("list", ErrorType.CORRUPT_FILE, text))


def bytes_column(schema: pa.Schema) -> str | None:
    """Returns the binary column, or NAME.bytes of a struct, if any. Raises ValueError for several."""
    found = []
    for field in schema:
        if pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type):
            found.append(field.name)
        elif pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            found.append(f"{field.name}.bytes")
    if len(found) > 1:
        raise ValueError(f"the columns {', '.join(found)} all hold bytes; keep one of them")
    return found[0] if found else None


def cell_media(uri: str, root: str, column: str, version: FileVersion | None = None) -> Iterator[Medium]:
    """Yields the media of a bytes column; ids are `media_id`, or those of FILE/KEY or FILE/ROW."""
    version = version or file_version(uri)
    with open_file(uri) as file:
        parquet = pq.ParquetFile(file)
        names = [name for name in ("media_id", *_STATUS_COLUMNS) if name in parquet.schema_arrow.names]
        row_index = 0
        for group in range(parquet.num_row_groups):
            num_rows = parquet.metadata.row_group(group).num_rows
            rows = parquet.read_row_group(group, columns=names).to_pylist() if names else [{}] * num_rows
            for index, row in enumerate(rows):
                address = CellLocation(uri, column, group, index).address()
                media_id = row.get("media_id") or media_id_of(f"{uri}/{row.get('key') or row_index}", root)
                failure = download_failure(row.get("status"), row.get("error_message"))
                # with the file's size: a cell's is unknown until read
                text = f"{version.text}/{column}-{group}-{index}"
                yield Medium(address, media_id, version=version._replace(text=text), error=failure)
                row_index += 1


def _tar_medium(uri: str, root: str, version: FileVersion, member: tarfile.TarInfo) -> Medium:
    address = RangeLocation(uri, member.offset_data, member.size).address()
    text = f"{version.text}/{member.offset_data}-{member.size}"
    return Medium(
        address,
        media_id_of(storage.join_uri(uri, member.name), root),
        version=FileVersion(member.size, version.etag, text),
    )


def _failed_downloads(tar_uri: str, root: str) -> Iterator[Medium]:
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
