"""Reads, lists and atomically writes files at any fsspec URI. Retries transient errors and counts the retries."""

from __future__ import annotations

import errno
import inspect
import json
import logging
import math
import os
import random
import re
import socket
import stat
import tempfile
import textwrap
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, Any, NoReturn, TypeVar

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_ATTEMPTS = 4
FIRST_WAIT_S = 0.5
"""Doubles after every attempt."""
FIRST_WAIT_VARIABLE = "TIMEVIPER_RETRY_SECONDS"
"""Environment variable with another first wait, in seconds."""

_TRANSIENT_ERRNOS = frozenset(
    {
        *(errno.EBUSY, errno.EREMOTEIO, errno.EIO, errno.ETIMEDOUT, errno.EAGAIN, errno.ENETUNREACH),
        *(errno.EHOSTUNREACH, errno.ESTALE),
    }
)
"""s3fs maps 503 and SlowDown to EBUSY, 500 to EREMOTEIO, and unknown codes (502, 504) to EIO; NFS raises ESTALE."""

_ABSENT_ERRNOS = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP})
"""Errors that mean that there is no such file."""


class StorageUnavailableError(OSError):
    """A transient error outlasted all retries."""


class StorageError(OSError):
    """An error of a storage library, as (errno, message without credentials)."""

    def __str__(self) -> str:
        return str(self.strerror)


MAX_MESSAGE_CHARS = 400

_STORAGE_PACKAGES = frozenset(
    {
        *("botocore", "aiobotocore", "s3fs", "gcsfs", "google", "adlfs", "azure", "ossfs", "oss2", "paramiko"),
        *("huggingface_hub", "requests", "urllib3", "httpx", "httpx2", "httpcore", "httpcore2", "aiohttp", "fsspec"),
    }
)
_URL = re.compile(r"[\w+.:-]+://[^\s'\"<>()]+")
_USER = re.compile(r"[^\s'\"/@]+:[^\s'\"/@]+@")
_PASSWORD = re.compile(r"://[^\s'\"/@:]*:[^\s'\"/@]+@")
_SECRET = re.compile(r"(?i)\b([\w-]*(?:key|secret|token|password|signature|credential|sig)\w*\s*=\s*)[^\s&;,'\"]+")

_NO_CREDENTIALS = re.compile(
    r"(?i)credential|not logged in|authenticat|signature|(token|request) .*expired|InvalidAccessKey"
)
_NO_HOST = re.compile(r"(?i)name or service not known|name resolution|getaddrinfo|nodename nor|name does not resolve")


_CREDENTIALS_ADVICE = (
    "give the job and its workers credentials that may use it and have not expired, by environment, profile or role"
)

REFRESH_S = 60.0
"""Minimum seconds between two readings of credentials, for a path that stays forbidden."""


class _Counter:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.value = 0

    def add(self) -> None:
        with self._lock:
            self.value += 1


_retries = _Counter()
_counted_clients: weakref.WeakSet[Any] = weakref.WeakSet()
_REFRESHED_AT = "timeviper_refreshed_at"
"""Attribute of an s3fs file system (one per thread): when its credentials were last read again."""


def shown_uri(uri: str) -> str:
    """Removes credentials and query, which may hold secrets; escapes undecodable bytes."""
    uri = uri.encode("utf-8", "backslashreplace").decode("utf-8")
    scheme = _scheme(uri)
    if not scheme:
        return uri
    rest = uri[len(scheme) + len("://") :]
    if scheme.lower() in ("http", "https"):
        rest = re.split("[?#]", rest, maxsplit=1)[0]
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def shown_text(text: str) -> str:
    """Removes credentials and URL queries from an error message; joins and shortens its lines."""
    text = _USER.sub("", _URL.sub(lambda url: shown_uri(url[0]), " ".join(text.split())))
    return textwrap.shorten(_SECRET.sub(r"\1***", text), MAX_MESSAGE_CHARS, placeholder=" ...")


def without_passwords(text: str) -> str:
    """Removes user and password from URIs in a text."""
    return _PASSWORD.sub("://", text)


@contextmanager
def plain_errors(*, of_any_library: bool = False) -> Iterator[None]:
    """Converts errors of storage libraries into OSErrors, without credentials.

    `of_any_library` is for code that only opens or lists files: whatever it raises is the storage's.
    """
    try:
        yield
    except Exception as error:  # storage libraries share no base class
        is_known = isinstance(error, ImportError) or _package(error) in _STORAGE_PACKAGES
        if not is_known and (isinstance(error, OSError | MemoryError) or not of_any_library):
            raise
        raise plain_error(error) from error


def is_storage_error(error: BaseException) -> bool:
    """Whether a storage library or its network client defines this exception."""
    return _package(error) in _STORAGE_PACKAGES


def _package(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def plain_error(error: Exception) -> OSError:
    """Converts an error of a storage library; where credentials are missing or refused, says what to do."""
    text, name = shown_text(str(error)) or type(error).__name__, type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", getattr(error, "status", None))
    if isinstance(error, ImportError):
        return StorageError(errno.ENOPKG, f"{text}; install the package where the job and its workers run")
    if _NO_HOST.search(text):
        return socket.gaierror(socket.EAI_NONAME, text)
    if isinstance(error, TimeoutError) or "Timeout" in name:
        return TimeoutError(text)
    if isinstance(error, FileNotFoundError) and "Local" not in name:  # not Hugging Face's "not in the local cache"
        return FileNotFoundError(errno.ENOENT, text)
    if status in (401, 403) or _is_refused(error) or _NO_CREDENTIALS.search(name + text):
        return PermissionError(f"{text}; {_CREDENTIALS_ADVICE}")
    return StorageError(errno.EIO, text)


def num_retries() -> int:
    return _retries.value


def add_retries(count: int) -> None:
    """Counts retries of a child process or another client."""
    for _ in range(count):
        _retries.add()


def is_transient(error: BaseException | None) -> bool:
    """Recognises timeouts, connection resets, 5xx and 429 responses, even as causes."""
    if error is None or isinstance(error, FileNotFoundError | PermissionError | StorageUnavailableError):
        return False  # permanent, or already retried
    if isinstance(error, TimeoutError | ConnectionError) or getattr(error, "errno", None) in _TRANSIENT_ERRNOS:
        return True
    from botocore import exceptions  # s3fs passes them on; they are not OSErrors

    return isinstance(error, exceptions.HTTPClientError | exceptions.ConnectionError) or is_transient(error.__cause__)


def retrying(action: Callable[[], T], uri: str, *, first_wait_s: float | None = None) -> T:
    """Repeats `action` on transient errors, and once after reading credentials again if the storage refuses access.

    Raises:
        StorageUnavailableError: after the last attempt.
        PermissionError: for missing, refused or expired credentials, with advice.
    """
    shown = shown_uri(uri)
    if first_wait_s is None:
        first_wait_s = float(os.environ.get(FIRST_WAIT_VARIABLE, FIRST_WAIT_S))
    for attempt in range(MAX_ATTEMPTS):
        try:
            return action()
        except Exception as error:
            if _may_be_refused(error) and attempt + 1 < MAX_ATTEMPTS and _read_credentials_again(uri):
                continue
            if not is_transient(error):
                _raise_with_advice(error, uri)
            if attempt + 1 == MAX_ATTEMPTS:
                message = (
                    f"{shown}: {error} (tried {MAX_ATTEMPTS} times); is the storage up, and within its rate limits?"
                )
                raise StorageUnavailableError(errno.EBUSY, message) from error
            if not _is_counted(error):
                _retries.add()
            wait = first_wait_s * 2**attempt * random.uniform(0.5, 1.0)  # so that workers do not retry in step
            logger.info("%s: %s; trying again in %.1f s", shown, error, wait)
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _may_be_refused(error: BaseException | None) -> bool:
    return error is not None and (_is_refused(error) or _may_be_refused(error.__cause__))


def _is_refused(error: BaseException) -> bool:
    """S3 answers to HEAD have no text: 400 is an expired token."""
    text = type(error).__name__ + str(error)
    return (
        isinstance(error, PermissionError)
        or (isinstance(error, OSError) and error.errno == errno.EINVAL and "Bad Request" in text)
        or (_package(error) in _STORAGE_PACKAGES and _NO_CREDENTIALS.search(text) is not None)
    )


def _read_credentials_again(uri: str) -> bool:
    """Lets s3fs read profile, role and token files again. Returns False if it did so a moment ago."""
    if is_local(uri) or _scheme(uri).lower() in ("http", "https"):
        return False
    filesystem, _ = split_uri(uri)
    now = time.monotonic()
    if "s3" not in filesystem.protocol or now - getattr(filesystem, _REFRESHED_AT, -math.inf) < REFRESH_S:
        return False
    setattr(filesystem, _REFRESHED_AT, now)
    logger.info("%s: access refused; reading the credentials again", shown_uri(uri))
    filesystem.connect(refresh=True)
    return True


def _raise_with_advice(error: Exception, uri: str) -> NoReturn:
    """Raises `error`, or if credentials are its cause, a PermissionError with advice."""
    is_explained = _CREDENTIALS_ADVICE in str(error) or is_local(uri)
    if is_explained or _scheme(uri).lower() in ("http", "https") or not _is_refused(error):
        raise error
    raise PermissionError(f"{shown_uri(uri)}: {shown_text(str(error))}; {_CREDENTIALS_ADVICE}") from error


def split_uri(uri: str) -> tuple[Any, str]:
    """Returns the fsspec file system and the path; local paths become absolute."""
    if is_local(uri):  # url_to_fs would read a::b.mp4 as b.mp4 inside a, also below
        filesystem = fsspec.filesystem("file")
        return filesystem, str(filesystem._strip_protocol(uri))
    scheme = _scheme(uri)
    if "::" not in uri or _is_over_another(scheme.partition("::")[0]):
        filesystem, path = fsspec.core.url_to_fs(uri)
    else:
        kind = fsspec.get_filesystem_class(scheme)
        filesystem, path = kind(**kind._get_kwargs_from_urls(uri)), kind._strip_protocol(uri)
    if "s3" in filesystem.protocol:
        _count_failures_of(filesystem.s3)
    return filesystem, str(path)


@lru_cache(maxsize=64)
def _is_over_another(scheme: str) -> bool:
    """Whether the file system reads from another, named after `::`, as archives and caches do."""
    kinds = fsspec.get_filesystem_class(scheme).__mro__
    return any({"fo", "target_protocol"} & inspect.signature(kind.__init__).parameters.keys() for kind in kinds)


def _count_failures_of(client: Any) -> None:
    if client not in _counted_clients:
        # first, because at the last attempt the client's own handler raises
        client.meta.events.register_first("needs-retry.s3", _count_response)
        _counted_clients.add(client)


def _count_response(response: Any = None, caught_exception: Any = None, **_: Any) -> None:
    status = response[0].status_code if response is not None else 0
    if caught_exception is not None or status >= 500 or status == 429:
        _retries.add()


def _is_counted(error: BaseException | None) -> bool:
    from botocore.exceptions import BotoCoreError, ClientError

    return error is not None and (isinstance(error, BotoCoreError | ClientError) or _is_counted(error.__cause__))


def has_known_scheme(uri: str) -> bool:
    return is_local(uri) or _is_known(_scheme(uri).rpartition("::")[2])


def _scheme(uri: str) -> str:
    scheme, mark, _ = uri.partition("://")
    return scheme if mark and "/" not in scheme else ""


@lru_cache(maxsize=64)
def _is_known(scheme: str) -> bool:
    return scheme in fsspec.available_protocols()


def join_uri(root: str, *parts: str) -> str:
    """Returns `root/part/part`."""
    return "/".join([root.rstrip("/") or "/", *(part.strip("/") for part in parts)])


def is_local(uri: str) -> bool:
    """Decides by the text alone."""
    return _scheme(uri) in ("", "file", "local")


def exists(uri: str) -> bool:
    """Raises OSError if the storage does not answer, instead of returning False."""
    with plain_errors(of_any_library=True):
        filesystem, path = split_uri(uri)
        return retrying(lambda: _exists(filesystem, path), uri)


def is_folder(uri: str) -> bool:
    """Reads at most one page of a listing. Raises OSError if the storage does not answer."""
    with plain_errors(of_any_library=True):
        filesystem, path = split_uri(uri)
        return retrying(lambda: _is_there(lambda: _is_folder(filesystem, path)), uri)


def _exists(filesystem: Any, path: str) -> bool:
    if isinstance(filesystem, LocalFileSystem):  # os.path.exists hides errors
        return _is_there(lambda: bool(os.stat(path)))  # noqa: PTH116 - fsspec paths are strings
    if getattr(filesystem.exists, "__func__", None) is AbstractFileSystem.exists:  # fsspec's default hides errors too
        return _is_there(lambda: bool(filesystem.info(path)))
    return bool(filesystem.exists(path))


def _is_folder(filesystem: Any, path: str) -> bool:
    if isinstance(filesystem, LocalFileSystem):
        return stat.S_ISDIR(os.stat(path).st_mode)  # noqa: PTH116
    if "s3" in filesystem.protocol:  # `isdir` of s3fs keeps the whole listing
        bucket, _, prefix = path.partition("/")
        request = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else "", "MaxKeys": 1}
        return bool(filesystem.call_s3("list_objects_v2", **request).get("Contents")) or not prefix
    return bool(filesystem.info(path)["type"] == "directory")


def _is_there(test: Callable[[], bool]) -> bool:
    try:
        return test()
    except ValueError:  # a name with a zero byte
        return False
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError) or error.errno in _ABSENT_ERRNOS:
            return False
        raise


def state_of(uri: str) -> str:
    """Returns a text that changes with the file; raises FileNotFoundError when it is missing."""
    filesystem, path = split_uri(uri)

    def read() -> str:
        filesystem.invalidate_cache()  # other processes write here
        return str(filesystem.ukey(path))

    return retrying(read, uri)


def entries_in(uri: str) -> list[dict[str, Any]]:
    """Returns fsspec's details of files and folders in a folder, from the storage itself; none when it is missing.

    Raises:
        OSError: if the storage does not answer.
    """
    filesystem, path = split_uri(uri)

    def list_now() -> list[dict[str, Any]]:
        filesystem.invalidate_cache()  # other processes write here
        return list(filesystem.ls(path, detail=True))

    def list_folder() -> list[dict[str, Any]]:
        try:
            found = list_now()
        except (FileNotFoundError, NotADirectoryError):
            if not _exists(filesystem, path):
                return []
            found = list_now()  # made since
        return [item for item in found if item["name"].rstrip("/") != path.rstrip("/")]  # `ls` of a file is the file

    return retrying(list_folder, uri)


def files_in(uri: str, suffix: str = "") -> list[str]:
    """Returns sorted URIs of visible files; none when the folder is missing. Raises as `entries_in`."""
    return list(_files_in(uri, suffix))


def file_states(uri: str, suffix: str = "") -> dict[str, str]:
    """Returns the URIs of `files_in`, each with a text that changes with the file, by one listing."""
    return {file: str(sorted(entry.items())) for file, entry in _files_in(uri, suffix).items()}


def _files_in(uri: str, suffix: str) -> dict[str, dict[str, Any]]:
    found = {PurePosixPath(item["name"]).name: item for item in entries_in(uri) if item["type"] == "file"}
    names = [name for name in sorted(found) if name.endswith(suffix) and not name.startswith(".")]
    return {join_uri(uri, name): found[name] for name in names}


def folders_in(uri: str) -> list[str]:
    """Returns sorted URIs of folders; none when the folder is missing. Raises as `entries_in`."""
    names = [PurePosixPath(item["name"]).name for item in entries_in(uri) if item["type"] == "directory"]
    return [join_uri(uri, name) for name in sorted(names)]


def read_bytes(uri: str) -> bytes:
    filesystem, path = split_uri(uri)
    return retrying(lambda: bytes(filesystem.cat_file(path)), uri)


def read_bytes_or_none(uri: str) -> bytes | None:
    """None = no such file; asking for it first could be too early for a process that deletes it."""
    try:
        return read_bytes(uri)
    except FileNotFoundError:
        return None


def read_json(uri: str) -> Any:
    return json.loads(read_bytes(uri))


def read_json_or_none(uri: str) -> Any | None:
    data = read_bytes_or_none(uri)
    return None if data is None else json.loads(data)


def download(uri: str, local: Path) -> None:
    filesystem, path = split_uri(uri)
    retrying(lambda: filesystem.get_file(path, str(local)), uri)


def upload(local: Path, uri: str) -> None:
    filesystem, path = split_uri(uri)
    filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
    retrying(lambda: filesystem.put_file(str(local), path), uri)


def write_atomic(uri: str, write: Callable[[IO[bytes]], None]) -> None:
    """Calls `write` with a binary file. After an error, `uri` keeps its old content.

    Raises:
        RuntimeError: when `uri` cannot be written.
    """
    filesystem, path = split_uri(uri)
    try:
        if isinstance(filesystem, LocalFileSystem):
            _write_then_rename(path, write)
        else:
            _write_then_upload(filesystem, path, write, uri)
    except OSError as error:
        is_explained = _CREDENTIALS_ADVICE in str(error)
        advice = "" if is_explained else "; is the folder writable and the disk not full?"
        raise RuntimeError(f"cannot write {shown_uri(uri)}: {error}{advice}") from error


def write_bytes(uri: str, data: bytes) -> None:
    write_atomic(uri, lambda file: _write_all(file, data))


def write_json(uri: str, value: Any) -> None:
    write_text(uri, _json_text(value))


def write_report(uri: str, value: Any) -> None:
    """As write_json, for people: URIs lose user and password."""
    write_text(uri, without_passwords(_json_text(value)))


def _json_text(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def write_text(uri: str, text: str) -> None:
    write_bytes(uri, text.encode())


def remove(uri: str) -> None:
    filesystem, path = split_uri(uri)

    def remove_all() -> None:
        if _exists(filesystem, path):
            filesystem.rm(path, recursive=True)

    retrying(remove_all, uri)


def ensure_writable(uri: str) -> None:
    """Writes a probe file, so that a job fails early.

    Raises:
        RuntimeError: when the folder cannot be written.
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
    """Uploads a local copy, because closing a partly written remote file would publish it."""
    with tempfile.NamedTemporaryFile(prefix="timeviper-upload-") as local:
        write(local)
        local.flush()
        retrying(lambda: filesystem.put_file(local.name, path), uri)


def _write_all(file: IO[bytes], data: bytes) -> None:
    file.write(data)


READ_AHEAD_BYTES = 4 << 20
"""Larger blocks need more memory and fewer requests."""


def open_file(uri: str) -> Any:
    """Opens a seekable binary file. Raises OSError."""
    with plain_errors(of_any_library=True):
        try:
            return _open(uri)
        except Exception as error:  # noqa: BLE001 - raised again
            if not (_may_be_refused(error) and _read_credentials_again(uri)):
                _raise_with_advice(error, uri)
        try:
            return _open(uri)
        except Exception as error:  # noqa: BLE001 - raised again
            _raise_with_advice(error, uri)


def _open(uri: str) -> Any:
    filesystem, path = split_uri(uri)
    if is_local(uri):
        return filesystem.open(path, "rb")
    return filesystem.open(path, "rb", block_size=READ_AHEAD_BYTES, cache_type="readahead")
