"""Lists files page by page, so that millions fit in memory."""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from fsspec.utils import glob_translate

from timeviper_platform.common import storage

logger = logging.getLogger(__name__)

S3_PAGE_KEYS = 1000
"""S3's limit per list request."""

_WILDCARDS = re.compile(r"[*?\[]")


class FileEntry(NamedTuple):
    uri: str
    version: FileVersion | None
    """None where the listing does not report it."""


class Listing(NamedTuple):
    root: str
    files: Iterator[FileEntry]


def list_files(source: str) -> Listing:
    """Lists a folder, glob or file, sorted (on local disks, within each folder).

    Skips unreadable folders with a warning.

    Raises:
        ValueError: when `source` does not exist.
    """
    filesystem, path = storage.split_uri(source)
    local = storage.is_local(source)
    found: Iterator[tuple[str, FileVersion | None]]
    wildcard = _WILDCARDS.search(path)
    if wildcard and is_glob(source):
        root = path[: wildcard.start()].rpartition("/")[0]
        matches = re.compile(glob_translate(path)).match
        found = filter(lambda file: matches(file[0]), _walk(filesystem, root, local))
    elif storage.is_folder(source):
        root, found = path, _walk(filesystem, path, local)
    elif storage.exists(source):
        root, found = path.rpartition("/")[0], iter([(path, None)])
    else:
        raise ValueError(f"no manifest, folder or file at {storage.shown_uri(source)!r}; fix `input`")

    def name(path: str) -> str:
        return path if local else str(filesystem.unstrip_protocol(path))

    return Listing(name(root), (FileEntry(name(path), version) for path, version in found))


def names_in(folder: str) -> Iterator[str]:
    """Yields sorted file names without caches; none when the folder is missing.

    Raises:
        OSError: when it cannot be listed completely.
    """
    return (path.rpartition("/")[2] for path, _ in _walk_now(folder))


def sizes_in(folder: str) -> Iterator[tuple[str, int]]:
    """Like `names_in`, with sizes in bytes."""
    filesystem, _ = storage.split_uri(folder)
    for path, version in _walk_now(folder):
        yield path.rpartition("/")[2], int(filesystem.size(path)) if version is None else version.size


def _walk_now(folder: str) -> Iterator[tuple[str, FileVersion | None]]:
    filesystem, path = storage.split_uri(folder)
    filesystem.invalidate_cache()  # other processes write there
    if storage.exists(folder):
        yield from _walk(filesystem, path, storage.is_local(folder), is_strict=True)


def is_glob(source: str) -> bool:
    """Returns False when a file or folder has exactly that name."""
    return _WILDCARDS.search(source) is not None and not storage.exists(source)


def pages(values: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(values)
    while page := list(islice(iterator, size)):
        yield page


def _walk(
    filesystem: Any, root: str, local: bool, *, is_strict: bool = False
) -> Iterator[tuple[str, FileVersion | None]]:
    if local:
        return ((path, None) for path in _walk_local(root, is_strict=is_strict))
    if "s3" in _protocols(filesystem):
        return _walk_s3(filesystem, root)
    return ((path, None) for path in _walk_any(filesystem, root))


def _protocols(filesystem: Any) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _walk_local(folder: str, above: Sequence[os.stat_result] = (), *, is_strict: bool = False) -> Iterator[str]:
    """Holds one folder per level in memory."""
    try:
        here = os.stat(folder or "/")  # noqa: PTH116 - names are strings
        if any(os.path.samestat(here, other) for other in above):
            raise OSError(errno.ELOOP, "a link back to one of its parent folders")
        with os.scandir(folder or "/") as entries:
            names = sorted((entry.name, _is_folder(entry)) for entry in entries)
    except OSError as error:
        if is_strict:
            raise
        logger.warning("skipping %s: %s", storage.shown_uri(folder), error.strerror)
        return
    for name, is_folder in names:
        path = f"{folder}/{name}"
        if is_folder:
            yield from _walk_local(path, [*above, here], is_strict=is_strict)
        else:
            yield path


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: reading it will fail
        return False


def _walk_s3(filesystem: Any, root: str) -> Iterator[tuple[str, FileVersion | None]]:
    """s3fs's `find` would hold the whole listing in memory."""
    bucket, _, prefix = root.partition("/")
    request = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else "", "MaxKeys": S3_PAGE_KEYS}
    while True:
        answer = storage.retrying(partial(filesystem.call_s3, "list_objects_v2", **request), f"s3://{root}")
        for found in answer.get("Contents", ()):
            etag = found["ETag"].strip('"')
            if not found["Key"].endswith("/"):
                yield f"{bucket}/{found['Key']}", FileVersion(found["Size"], etag, etag)
        if not answer.get("IsTruncated"):
            return
        request["ContinuationToken"] = answer["NextContinuationToken"]


def _walk_any(filesystem: Any, root: str) -> Iterator[str]:
    for folder, _, names in filesystem.walk(root):
        for name in sorted(names):
            yield f"{folder.rstrip('/')}/{name}"


class FileVersion(NamedTuple):
    """Identifies a file's content."""

    size: int
    etag: str | None
    text: str
    """Etag, or size and modification time."""
