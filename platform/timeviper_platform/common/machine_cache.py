"""Files that the processes of a machine compute or download once and share."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from timeviper_platform.common import storage

logger = logging.getLogger(__name__)

MAX_UNUSED_SECONDS = 7 * 24 * 3600.0
"""Seconds after which an unused file is deleted."""

FREE_SPACE_MARGIN = 1.02
"""Free bytes needed per byte to write."""

CONFIG_FILES = ("config.json",)
"""Files of a weights folder that state the model's sizes."""


def machine_file(kind: str, name: str, write: Callable[[Path], object]) -> Path:
    """Returns a file or folder in TMPDIR, written by the first process that needs it; `name` determines its content.

    Raises RuntimeError if the folder of this `kind` belongs to another user.
    """
    folder = Path(tempfile.gettempdir(), f"timeviper-{kind}-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to another user; set TMPDIR to a folder of your own")
    target = folder / name
    with _locked(folder / f"{name}.lock"):
        if not _is_kept(target):
            partial = target.with_suffix(".partial")
            _remove(partial)  # left by a killed process
            try:
                write(partial)
                partial.replace(target)
            except BaseException:
                _remove(partial)
                raise
    return target


def local_copy(name_or_uri: str, patterns: Sequence[str] = ("*",)) -> str:
    """Returns a local folder with the files of a remote one, downloaded once per machine for each version of the files.

    Local paths, and names on a hub, are returned as they are.

    Args:
        patterns: glob patterns of the files to copy; subfolders are left out.

    Raises:
        ValueError: if there are no such files.
        RuntimeError: if the disk of TMPDIR is too small.
        OSError: if they cannot be read.
    """
    if storage.is_local(name_or_uri):
        return str(storage.split_uri(name_or_uri)[1]) if "://" in name_or_uri else name_or_uri
    files = [file for file in listed_files(name_or_uri) if any(fnmatch(file.name, pattern) for pattern in patterns)]
    shown = storage.shown_uri(name_or_uri)
    if not files:
        raise ValueError(f"there is no {' or '.join(patterns)} in {shown}; name a folder that holds the files")
    num_bytes = sum(file.num_bytes for file in files)

    def download(folder: Path) -> None:
        check_free_space(folder, num_bytes, f"the download of {shown}", "set TMPDIR to a larger disk")
        started = time.monotonic()
        folder.mkdir()
        for file in files:
            target = folder / file.name
            storage.download(storage.join_uri(name_or_uri, file.name), target)
            if target.stat().st_size != file.num_bytes:
                raise RuntimeError(
                    f"{shown}/{file.name} has {target.stat().st_size:,} bytes, and had {file.num_bytes:,} when listed;"
                    " wait until it is written, and start again"
                )
        logger.info("%s: %.2f GB in %.1f s into %s", shown, num_bytes / 1e9, time.monotonic() - started, folder)

    version = hashlib.sha256(json.dumps([name_or_uri, files]).encode()).hexdigest()
    return str(machine_file("files", version[:40], download))


def check_free_space(path: str | Path, num_bytes: int, what: str, advice: str) -> None:
    """Raises RuntimeError if the disk of `path`, which need not exist, has less than `num_bytes` free."""
    folder = next(folder for folder in [Path(path), *Path(path).parents] if folder.exists())
    free = shutil.disk_usage(folder).free
    if free < num_bytes * FREE_SPACE_MARGIN:
        raise RuntimeError(f"{what} needs {num_bytes / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB; {advice}")


class ListedFile(NamedTuple):
    name: str
    num_bytes: int
    version: str
    """ETag, else the time of the last change."""


def listed_files(uri: str) -> list[ListedFile]:
    """Returns the files of a folder, sorted by name; equal lists mean equal contents."""
    with storage.plain_errors(of_any_library=True):
        items = [item for item in storage.entries_in(uri) if item["type"] == "file"]
    keys = ("ETag", "etag", "LastModified", "last_modified", "mtime", "updated", "created")
    files = [
        ListedFile(
            name=PurePosixPath(item["name"]).name,
            num_bytes=int(item["size"]),
            version=next((str(item[key]) for key in keys if item.get(key)), ""),
        )
        for item in items
    ]
    return sorted(file for file in files if file.name)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_kept(target: Path) -> bool:
    """Marks the target as used, or removes old ones if there is none."""
    with _locked(target.parent / "lock"):
        if target.exists():
            os.utime(target)
            return True
        for path in target.parent.iterdir():
            if path.suffix == ".lock" or path.name == "lock":  # a process may wait for a lock
                continue
            with contextlib.suppress(FileNotFoundError):  # another process renames what it has written
                if time.time() - path.stat().st_mtime > MAX_UNUSED_SECONDS:
                    _remove(path)
        return False


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
