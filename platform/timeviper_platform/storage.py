"""Files at any fsspec URI (a local path, file://, s3://, memory://): open, list, and writes that are all or nothing.

Knows how to make a file appear complete or not at all: write then rename on local disks, one put on object
stores. Does not know what is in the files.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem


def split_uri(uri: str) -> tuple[Any, str]:
    """The fsspec file system and the path on it; local paths come back absolute."""
    filesystem, path = fsspec.core.url_to_fs(uri)
    return filesystem, str(path)


def join_uri(root: str, *parts: str) -> str:
    """`root/part/part`, for local paths and URIs alike."""
    return "/".join([root.rstrip("/") or "/", *(part.strip("/") for part in parts)])


def is_local(uri: str) -> bool:
    """True when `uri` lies on this machine's disks."""
    return isinstance(split_uri(uri)[0], LocalFileSystem)


def exists(uri: str) -> bool:
    """True when a file or folder is at `uri`."""
    filesystem, path = split_uri(uri)
    return bool(filesystem.exists(path))


def list_files(uri: str, suffix: str = "") -> list[str]:
    """The files directly inside the folder `uri`, as URIs in sorted order; none when the folder is missing."""
    filesystem, path = split_uri(uri)
    filesystem.invalidate_cache()  # object stores' listings are cached, and others write here
    if not filesystem.isdir(path):
        return []
    names = [PurePosixPath(item["name"]).name for item in filesystem.ls(path, detail=True) if item["type"] == "file"]
    return [join_uri(uri, name) for name in sorted(names) if name.endswith(suffix) and not name.startswith(".")]


def read_bytes(uri: str) -> bytes:
    """The whole file."""
    filesystem, path = split_uri(uri)
    return bytes(filesystem.cat_file(path))


def read_json(uri: str) -> Any:
    """The file parsed as JSON."""
    return json.loads(read_bytes(uri))


def write_atomic(uri: str, write: Callable[[IO[bytes]], None]) -> None:
    """Calls `write` with a file open for bytes; `uri` then holds all of it, or what it held before.

    Raises:
        RuntimeError: when the place cannot be written, with its URI.
    """
    filesystem, path = split_uri(uri)
    try:
        if isinstance(filesystem, LocalFileSystem):
            _write_then_rename(path, write)
        else:
            with filesystem.open(path, "wb") as file:  # object stores show an object when its upload completes
                write(file)
    except OSError as error:
        raise RuntimeError(f"cannot write {uri}: {error}; is the folder writable and the disk not full?") from error


def write_bytes(uri: str, data: bytes) -> None:
    """`write_atomic` for bytes at hand."""
    write_atomic(uri, lambda file: _write_all(file, data))


def write_json(uri: str, value: Any) -> None:
    """`write_atomic` of `value` as indented JSON."""
    write_bytes(uri, (json.dumps(value, indent=2, sort_keys=False) + "\n").encode())


def remove(uri: str) -> None:
    """Deletes a file or a whole folder; nothing happens when it is not there."""
    filesystem, path = split_uri(uri)
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


def ensure_writable(uri: str) -> None:
    """Writes and removes a probe file in the folder `uri`.

    Raises:
        RuntimeError: when that fails, so that a job says so before it has worked for hours.
    """
    probe = join_uri(uri, f".write-probe-{uuid.uuid4().hex}")
    write_bytes(probe, b"")
    remove(probe)


def _write_then_rename(path: str, write: Callable[[IO[bytes]], None]) -> None:
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)  # noqa: PTH103 - fsspec paths are strings
    temporary = f"{folder}/.{name}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as file:  # noqa: PTH123
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)  # noqa: PTH105
    except BaseException:
        if os.path.exists(temporary):  # noqa: PTH110
            os.unlink(temporary)  # noqa: PTH108
        raise


def _write_all(file: IO[bytes], data: bytes) -> None:
    file.write(data)
