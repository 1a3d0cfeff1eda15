"""Lists media in WebDataset tars, without unpacking them.

img2dataset lists failures in NAME.parquet next to NAME.tar.
"""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from timeviper_platform.common import storage
from timeviper_platform.common.listing import FileVersion
from timeviper_platform.common.storage import open_file
from timeviper_platform.data.inputs.manifest import download_failure, text_of
from timeviper_platform.data.inputs.tables import DamagedTableError, text_rows
from timeviper_platform.data.inputs.tar_scan import TAR_MAGIC, TarBreak, scan_tar
from timeviper_platform.data.media.container import MEDIA_SUFFIXES, DecodeError, ErrorType, source_name
from timeviper_platform.data.media.content import describe_content
from timeviper_platform.data.media.locations import RangeLocation
from timeviper_platform.data.media.medium import Medium, media_id_of
from timeviper_platform.data.media.probe import file_version

_STATUS_COLUMNS = ["key", "status", "error_message"]

MAX_SUFFIX_CHARS = 8
MAX_SUFFIXES = 50
"""Maximum suffixes counted separately: names that hold data would give millions."""


def leave_out(left_out: Counter[str], name: str) -> None:
    """Counts a file that is left out because of its name."""
    suffix = PurePosixPath(name).suffix.lower() or "without a suffix"
    is_odd = len(suffix) > MAX_SUFFIX_CHARS + 1 and suffix.startswith(".")
    left_out["others" if is_odd or (suffix not in left_out and len(left_out) >= MAX_SUFFIXES) else suffix] += 1


def tar_media(uri: str, root: str, version: FileVersion | None, left_out: Counter[str]) -> Iterator[Medium]:
    """Yields a tar's media, with ids of TAR/MEMBER relative to `root`. Each damaged place is one error."""
    version = version or file_version(uri)
    with open_file(uri) as file:
        if other := _other_content(file):
            text = f"{source_name(uri)}: not a tar but {other}; only uncompressed, complete tars can be read in place"
            yield Medium(uri, media_id_of(uri, root), error=DecodeError("list", ErrorType.CORRUPT_FILE, text))
            return
        for found in scan_tar(file):
            if isinstance(found, TarBreak):
                yield _break(uri, root, found)
            elif not found.isreg():
                if not found.isdir():
                    left_out["links in tars"] += 1
            elif not found.name.lower().endswith(MEDIA_SUFFIXES):
                leave_out(left_out, found.name)
            else:
                yield _tar_medium(uri, root, version, found)


def failed_downloads(tar_uri: str, root: str) -> Iterator[Medium]:
    """Yields the media that img2dataset could not fetch into a tar."""
    table_uri = str(tar_uri.removesuffix(PurePosixPath(tar_uri).suffix)) + ".parquet"
    if not storage.exists(table_uri):
        return
    try:
        with open_file(table_uri) as file:
            parquet: Any = pq.ParquetFile(file)
            if not {"key", "status"} <= set(parquet.schema_arrow.names):
                return
            names = [name for name in _STATUS_COLUMNS if name in parquet.schema_arrow.names]
            for batch in parquet.iter_batches(columns=names):
                for row in text_rows(batch):
                    failure = download_failure(text_of(row["status"]), text_of(row.get("error_message")))
                    if failure:
                        name = storage.join_uri(tar_uri, str(row["key"]))
                        yield Medium(name, media_id_of(name, root), error=failure)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # the storage's error
        raise DamagedTableError(f"{source_name(table_uri)}: failures of a download cannot be read: {error}") from error


def _tar_medium(uri: str, root: str, version: FileVersion, member: tarfile.TarInfo) -> Medium:
    location = RangeLocation(uri, member.offset_data, member.size)
    media_id = media_id_of(storage.join_uri(uri, member.name), root)
    error = None
    if member.issparse():
        text = f"{source_name(uri)}: {member.name!r} is stored as a sparse file; write the tar without --sparse"
        error = DecodeError("list", ErrorType.CORRUPT_FILE, text)
    text = f"{version.text}/{location.version_text()}"
    return Medium(location.address(), media_id, version=FileVersion(member.size, version.etag, text), error=error)


def _other_content(file: Any) -> str | None:
    """Returns what the file is if it is certainly not a tar, so that it is not searched for members."""
    head = file.read(tarfile.BLOCKSIZE)
    file.seek(0)
    return None if TAR_MAGIC in head or not head.strip(b"\0") else describe_content(file)


def _break(uri: str, root: str, found: TarBreak) -> Medium:
    text = f"{source_name(uri)}: {found}"
    own_id = media_id_of(f"{uri}#byte={found.start}", root)
    return Medium(uri, own_id, error=DecodeError("list", ErrorType.CORRUPT_FILE, text))
