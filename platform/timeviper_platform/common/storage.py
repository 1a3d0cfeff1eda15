"""Files at any fsspec URI (a local path, file://, s3://, memory://): open, list, and writes that are all or nothing.

Knows how to make a file appear complete or not at all: write then rename on local disks, one upload of a finished
local copy on object stores (a single put below 100 MB, completed multipart parts above). Knows which errors pass by
themselves: those are tried again, with growing waits, and counted. Does not know what is in the files.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import re
import tempfile
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from functools import lru_cache
from pathlib import PurePosixPath
from typing import IO, Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from timeviper_platform.common import storage

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_ATTEMPTS = 4
FIRST_WAIT_S = 0.5
"""Doubled after every attempt: with the four attempts, up to 3.5 s in all. Object stores' own clients wait below this:
botocore's five attempts inside each of s3fs's."""

_TRANSIENT_ERRNOS = frozenset(
    {errno.EBUSY, errno.EREMOTEIO, errno.EIO, errno.ETIMEDOUT, errno.EAGAIN, errno.ENETUNREACH, errno.EHOSTUNREACH}
)
"""s3fs says EBUSY for 503 and SlowDown, EREMOTEIO for 500, EIO for codes that it does not know, such as 502 and 504."""


class StorageUnavailableError(OSError):
    """Storage kept failing for a reason that should have passed."""


class _Counter:
    """A number that threads may raise."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.value = 0

    def add(self) -> None:
        with self._lock:
            self.value += 1


_retries = _Counter()
_counted_clients: weakref.WeakSet[Any] = weakref.WeakSet()


def shown_uri(uri: str) -> str:
    """What messages and rows call it: without a user, password and web address's query, any of which may be a secret,
    and with bytes that are no text escaped."""
    uri = uri.encode("utf-8", "backslashreplace").decode("utf-8")
    scheme = _scheme(uri)
    if not scheme:
        return uri
    rest = uri[len(scheme) + len("://") :]
    if scheme.lower() in ("http", "https"):
        rest = re.split("[?#]", rest, maxsplit=1)[0]
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def num_retries() -> int:
    """Requests to storage that failed for a passing reason, in this process so far."""
    return _retries.value


def add_retries(number: int) -> None:
    """Counts requests that a child of this process, or a client that is not of this module, made again."""
    for _ in range(number):
        _retries.add()


def is_transient(error: BaseException | None) -> bool:
    """True for errors that pass: timeouts, resets, 5xx and 429 answers, or what was raised from one of them."""
    if error is None or isinstance(error, FileNotFoundError | PermissionError | StorageUnavailableError):
        return False  # an answer for good, or what has been tried often enough
    if isinstance(error, TimeoutError | ConnectionError) or getattr(error, "errno", None) in _TRANSIENT_ERRNOS:
        return True
    from botocore import exceptions  # s3fs lets them through: they are no OSErrors

    return isinstance(error, exceptions.HTTPClientError | exceptions.ConnectionError) or is_transient(error.__cause__)


def retrying(action: Callable[[], T], what: str) -> T:
    """What `action` returns; it is tried again while it fails for a passing reason.

    Args:
        action: may be done more than once.
        what: the URI that messages name.

    Raises:
        StorageUnavailableError: when the last attempt failed as well, from its error.
    """
    what = shown_uri(what)
    for attempt in range(MAX_ATTEMPTS):
        try:
            return action()
        except Exception as error:
            if not is_transient(error):
                raise
            if attempt + 1 == MAX_ATTEMPTS:
                message = (
                    f"{what}: {error} (tried {MAX_ATTEMPTS} times); is the storage up, and within its rate limits?"
                )
                raise StorageUnavailableError(errno.EBUSY, message) from error
            if not _is_counted(error):
                _retries.add()
            wait = FIRST_WAIT_S * 2**attempt * random.uniform(0.5, 1.0)  # workers that failed together part
            logger.info("%s: %s; trying again in %.1f s", what, error, wait)
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def split_uri(uri: str) -> tuple[Any, str]:
    """The fsspec file system and the path on it; local paths come back absolute, and mean what they say."""
    if is_local(uri):  # where fsspec takes a::b.mp4 for b.mp4 inside of a
        filesystem = fsspec.filesystem("file")
        return filesystem, str(filesystem._strip_protocol(uri))
    filesystem, path = fsspec.core.url_to_fs(uri)
    if "s3" in filesystem.protocol:
        _count_failures_of(filesystem.s3)
    return filesystem, str(path)


def _count_failures_of(client: Any) -> None:
    """Counts a botocore client's failed requests where they happen: it makes them again without a word."""
    if client not in _counted_clients:
        # first: at the last attempt the client's own handler raises what it caught, and later ones are not asked
        client.meta.events.register_first("needs-retry.s3", _note_answer)
        _counted_clients.add(client)


def _note_answer(response: Any = None, caught_exception: Any = None, **_: Any) -> None:
    status = response[0].status_code if response is not None else 0
    if caught_exception is not None or status >= 500 or status == 429:
        _retries.add()


def _is_counted(error: BaseException | None) -> bool:
    """True when the error came from botocore, whose failed requests are counted one by one."""
    from botocore.exceptions import BotoCoreError, ClientError

    return error is not None and (isinstance(error, BotoCoreError | ClientError) or _is_counted(error.__cause__))


def has_known_scheme(uri: str) -> bool:
    """True for local paths, and for URIs of a kind that fsspec has a file system for."""
    return is_local(uri) or _is_known(_scheme(uri).rpartition("::")[2])


def _scheme(uri: str) -> str:
    """What stands before ://, with what it is chained to; '' for a path."""
    scheme, mark, _ = uri.partition("://")
    return scheme if mark and "/" not in scheme else ""


@lru_cache(maxsize=64)
def _is_known(scheme: str) -> bool:
    return scheme in fsspec.available_protocols()


def join_uri(root: str, *parts: str) -> str:
    """`root/part/part`, for local paths and URIs alike."""
    return "/".join([root.rstrip("/") or "/", *(part.strip("/") for part in parts)])


def is_local(uri: str) -> bool:
    """True when `uri` lies on this machine's disks; asks no storage."""
    return _scheme(uri) in ("", "file", "local")


def exists(uri: str) -> bool:
    """True when a file or folder is at `uri`."""
    filesystem, path = split_uri(uri)
    return retrying(lambda: bool(filesystem.exists(path)), uri)


def list_files(uri: str, suffix: str = "") -> list[str]:
    """The files directly inside the folder `uri`, as URIs in sorted order; none when the folder is missing."""
    filesystem, path = split_uri(uri)

    def list_folder() -> list[dict[str, Any]]:
        filesystem.invalidate_cache()  # object stores' listings are cached, and others write here
        return list(filesystem.ls(path, detail=True)) if filesystem.isdir(path) else []

    names = [PurePosixPath(item["name"]).name for item in retrying(list_folder, uri) if item["type"] == "file"]
    return [join_uri(uri, name) for name in sorted(names) if name.endswith(suffix) and not name.startswith(".")]


def read_bytes(uri: str) -> bytes:
    """The whole file."""
    filesystem, path = split_uri(uri)
    return retrying(lambda: bytes(filesystem.cat_file(path)), uri)


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
            _write_then_upload(filesystem, path, write, uri)
    except OSError as error:
        raise RuntimeError(
            f"cannot write {shown_uri(uri)}: {error}; is the folder writable and the disk not full?"
        ) from error


def write_bytes(uri: str, data: bytes) -> None:
    """`write_atomic` for bytes at hand."""
    write_atomic(uri, lambda file: _write_all(file, data))


def write_json(uri: str, value: Any) -> None:
    """`write_atomic` of `value` as indented JSON."""
    write_bytes(uri, (json.dumps(value, indent=2, sort_keys=False) + "\n").encode())


def remove(uri: str) -> None:
    """Deletes a file or a whole folder; nothing happens when it is not there."""
    filesystem, path = split_uri(uri)

    def remove_all() -> None:
        if filesystem.exists(path):
            filesystem.rm(path, recursive=True)

    retrying(remove_all, uri)


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


def _write_then_upload(filesystem: Any, path: str, write: Callable[[IO[bytes]], None], uri: str) -> None:
    """Closing a remote file that was written in part would show the part; and an upload can be tried again."""
    with tempfile.NamedTemporaryFile(prefix="timeviper-upload-") as local:
        write(local)
        local.flush()
        retrying(lambda: filesystem.put_file(local.name, path), uri)


def _write_all(file: IO[bytes], data: bytes) -> None:
    file.write(data)


READ_AHEAD_BYTES = 4 << 20
"""Block of a remote file; larger costs memory for every open decoder, smaller costs requests."""


def open_file(uri: str) -> Any:
    """A seekable file object over a whole file; remote files are read ahead, never copied whole."""
    filesystem, path = storage.split_uri(uri)
    if storage.is_local(uri):
        return filesystem.open(path, "rb")
    return filesystem.open(path, "rb", block_size=READ_AHEAD_BYTES, cache_type="readahead")
