"""Lists files page by page, so that millions fit in memory."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from operator import itemgetter
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
    fault: OSError | None = None
    """Why the folder `uri` cannot be listed."""


class Listing(NamedTuple):
    root: str
    files: Iterator[FileEntry]


def list_files(source: str) -> Listing:
    """Lists a folder, glob or file, sorted (on local disks, within each folder).

    A folder below that may not be listed is an entry with a `fault`.

    Raises:
        ValueError: when `source` does not exist.
        OSError: when `source` itself cannot be listed, or the storage fails.
    """
    filesystem, path = storage.split_uri(source)
    local = storage.is_local(source)
    found: Iterator[FileEntry]
    wildcard = _WILDCARDS.search(path)
    if wildcard and is_glob(source):
        root = path[: wildcard.start()].rpartition("/")[0]
        found = filter(_matcher(path), _walk(filesystem, root, local))
    elif storage.is_folder(source):
        root, found = path, _walk(filesystem, path, local)
    elif storage.exists(source):
        root, found = path.rpartition("/")[0], iter([FileEntry(path, None)])
    else:
        raise ValueError(f"no manifest, folder or file at {storage.shown_uri(source)!r}; fix `input`")

    def name(path: str) -> str:
        return path if local else str(filesystem.unstrip_protocol(path))

    def files() -> Iterator[FileEntry]:
        for file in found:
            if file.fault is not None and file.uri == root:
                raise file.fault
            yield file._replace(uri=name(file.uri))

    return Listing(name(root), files())


def _matcher(pattern: str) -> Callable[[FileEntry], bool]:
    """Returns whether a file matches, or a folder that cannot be listed may hold files that do."""
    parts = pattern.split("/")
    by_depth = {depth: re.compile(glob_translate("/".join(parts[:depth]))).match for depth in range(1, len(parts) + 1)}

    def matches(entry: FileEntry) -> bool:
        if entry.fault is None:
            return by_depth[len(parts)](entry.uri) is not None
        depth = len(entry.uri.split("/"))
        return "**" in parts or (depth < len(parts) and by_depth[depth](entry.uri) is not None)

    return matches


def names_in(folder: str) -> Iterator[str]:
    """Yields sorted file names without caches; none when the folder is missing.

    Raises:
        OSError: when it cannot be listed completely.
    """
    return (file.uri.rpartition("/")[2] for file in _walk_now(folder))


def sizes_in(folder: str) -> Iterator[tuple[str, int]]:
    """Like `names_in`, with sizes in bytes."""
    filesystem, _ = storage.split_uri(folder)
    for path, version, _ in _walk_now(folder):
        yield path.rpartition("/")[2], int(filesystem.size(path)) if version is None else version.size


def _walk_now(folder: str) -> Iterator[FileEntry]:
    filesystem, path = storage.split_uri(folder)
    filesystem.invalidate_cache()  # other processes write there
    if storage.exists(folder):
        for file in _walk(filesystem, path, storage.is_local(folder)):
            if file.fault is not None:
                raise file.fault
            yield file


def is_glob(source: str) -> bool:
    """Returns False when a file or folder has exactly that name."""
    return _WILDCARDS.search(source) is not None and not storage.exists(source)


def pages(values: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(values)
    while page := list(islice(iterator, size)):
        yield page


def _walk(filesystem: Any, root: str, local: bool) -> Iterator[FileEntry]:
    if local:
        return _walk_local(root)
    return _walk_s3(filesystem, root) if "s3" in _protocols(filesystem) else _walk_any(filesystem, root)


def _protocols(filesystem: Any) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _walk_local(folder: str, above: Sequence[os.stat_result] = ()) -> Iterator[FileEntry]:
    """Holds one folder per level in memory."""
    try:
        here = os.stat(folder or "/")  # noqa: PTH116 - names are strings
        if any(os.path.samestat(here, other) for other in above):
            logger.warning("skipping %s: a link back to one of its parent folders", storage.shown_uri(folder))
            return
        with os.scandir(folder or "/") as entries:
            names = sorted((entry.name, _is_folder(entry)) for entry in entries)
    except OSError as error:
        yield FileEntry(folder, None, error)
        return
    for name, is_folder in names:
        path = f"{folder}/{name}"
        if is_folder:
            yield from _walk_local(path, [*above, here])
        else:
            yield FileEntry(path, None)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: reading it will fail
        return False


def _walk_s3(filesystem: Any, root: str) -> Iterator[FileEntry]:
    """s3fs's `find` would hold the whole listing in memory."""
    bucket, _, prefix = root.partition("/")
    request = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else "", "MaxKeys": S3_PAGE_KEYS}
    while True:
        answer = storage.retrying(partial(filesystem.call_s3, "list_objects_v2", **request), f"s3://{root}")
        for found in answer.get("Contents", ()):
            etag = found["ETag"].strip('"')
            if not found["Key"].endswith("/"):
                yield FileEntry(f"{bucket}/{found['Key']}", FileVersion(found["Size"], etag, etag))
        if not answer.get("IsTruncated"):
            return
        request["ContinuationToken"] = answer["NextContinuationToken"]


def _walk_any(filesystem: Any, folder: str) -> Iterator[FileEntry]:
    """fsspec's `walk` is in no order, and leaves out folders that it cannot list."""
    try:
        entries = storage.retrying(partial(filesystem.ls, folder, detail=True), filesystem.unstrip_protocol(folder))
    except FileNotFoundError:  # deleted meanwhile
        return
    except PermissionError as error:
        yield FileEntry(folder, None, error)
        return
    for entry in sorted(entries, key=itemgetter("name")):
        path = str(entry["name"]).rstrip("/")
        if path == folder.rstrip("/"):  # the mark of an empty folder
            continue
        if entry["type"] == "directory":
            yield from _walk_any(filesystem, path)
        else:
            yield FileEntry(path, None)


class FileVersion(NamedTuple):
    """Identifies a file's content."""

    size: int
    etag: str | None
    text: str
    """Etag, or size and modification time."""
