"""Reads https URLs of allowed hosts by ranges; plain http from loopback only.

Does not use httpx: domain check, URL quoting and error mapping would remain.
"""

from __future__ import annotations

import errno
import io
import random
import re
import socket
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException, responses
from typing import Any, NoReturn
from urllib.parse import quote, urlsplit, urlunsplit

from timeviper_platform.common import storage
from timeviper_platform.common.storage import READ_AHEAD_BYTES

TIMEOUT_SECONDS = 20.0
"""Maximum wait for the next byte."""

FIRST_BYTES = 64 << 10
"""Size of the first range, which holds the headers of most media."""

TRANSIENT_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_KEPT = "%/:=&?~#+!$,;'@()*[]|"
"""Characters that stay unquoted. Percent signs belong to existing encodings."""

_TOTAL = re.compile(r"bytes (?:\d+-\d+|\*)/(\d+)")


class DomainNotAllowedError(PermissionError):
    """A URL or redirect to a host outside `allowed_domains`."""


class BadUrlError(OSError):
    """A malformed URL."""


class TooManyBytesError(OSError):
    """A download without range support over its limit."""


def is_web(uri: str) -> bool:
    return uri[:8].lower().startswith(("https://", "http://"))


def check_allowed(url: str, allowed_domains: Sequence[str]) -> None:
    """Raises DomainNotAllowedError or BadUrlError unless `url` is https on an allowed domain or subdomain."""
    parts = urlsplit(ascii_url(url))
    host = parts.hostname or ""
    domains = [_ascii_host(domain) for domain in allowed_domains]
    if not any(host == domain or host.endswith(f".{domain}") for domain in domains):
        raise DomainNotAllowedError(f"{host!r} is not an allowed domain; add it to limits.allowed_domains")
    if parts.scheme != "https" and not (parts.scheme == "http" and host in _LOOPBACK):
        raise DomainNotAllowedError(f"{parts.scheme}://{host} is not encrypted; use https")


def ascii_url(url: str) -> str:
    """Returns the URL percent-encoded, in IDNA, without fragment. Raises BadUrlError if malformed."""
    try:
        parts = urlsplit(url)
        host, port = _ascii_host(parts.hostname or ""), parts.port
        path, query = quote(parts.path or "/", safe=_KEPT), quote(parts.query, safe=_KEPT)
    except ValueError as error:  # UnicodeError is one
        raise BadUrlError(f"not a URL that can be fetched: {error}") from error
    if not host or parts.username is not None:
        fault = "it has a user or password" if host else "it has no host"
        raise BadUrlError(f"not a URL that can be fetched: {fault}")
    netloc = (f"[{host}]" if ":" in host else host) + ("" if port is None else f":{port}")
    return urlunsplit((parts.scheme, netloc, path, query, ""))


def _ascii_host(host: str) -> str:
    return host.lower() if ":" in host else host.encode("idna").decode("ascii").lower()


def is_host(name: str) -> bool:
    try:
        return bool(_ascii_host(name)) and not set(name) & set("/:*@")
    except UnicodeError:
        return False


def open_web(
    url: str, allowed_domains: Sequence[str], max_bytes: int, attempts: int, backoff_seconds: float
) -> io.BufferedReader:
    """Opens a URL as a seekable file. `max_bytes` limits downloads without range support.

    Raises:
        OSError: with a file system's errno, as socket.gaierror, or as an error of this module.
    """
    file = WebFile(url, allowed_domains, max_bytes, attempts, backoff_seconds)
    return io.BufferedReader(file, buffer_size=READ_AHEAD_BYTES)


class WebFile(io.RawIOBase):
    def __init__(
        self, url: str, allowed_domains: Sequence[str], max_bytes: int, attempts: int, backoff_seconds: float
    ) -> None:
        check_allowed(url, allowed_domains)
        self._attempts, self._backoff_seconds = attempts, backoff_seconds
        self._url = ascii_url(url)
        self._opener = urllib.request.build_opener(_CheckedRedirects(allowed_domains))
        self._max_bytes = max_bytes
        self._offset = 0
        self._body: Any = None  # the whole file, from a server without range support
        self.size = 0
        self.etag: str | None = None
        self.modified: str | None = None
        self._first = self._fetch(0, FIRST_BYTES)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._offset, io.SEEK_END: self.size}[whence]
        self._offset = max(0, base + offset)
        return self._offset

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self.size - self._offset))
        data = self._read(count) if count else b""
        buffer[: len(data)] = data
        self._offset += len(data)
        return len(data)

    def close(self) -> None:
        if self._body is not None:
            self._body.close()
        super().close()

    def _read(self, count: int) -> bytes:
        if self._body is not None:
            self._body.seek(self._offset)
            return bytes(self._body.read(count))
        if self._offset < len(self._first):
            return self._first[self._offset : self._offset + count]
        return self._fetch(self._offset, count)

    def _fetch(self, offset: int, count: int) -> bytes:
        for attempt in range(self._attempts):
            try:
                return self._fetch_once(offset, count)
            except (OSError, HTTPException, ValueError) as error:  # ValueError: a redirect to a malformed URL
                if attempt + 1 == self._attempts or not _is_transient(error):
                    _raise_plain(error, self._url)
            storage.add_retries(1)
            time.sleep(self._backoff_seconds * 2**attempt * (1 + random.random()))
        raise AssertionError("the last attempt returns or raises")

    def _fetch_once(self, offset: int, count: int) -> bytes:
        headers = {"Range": f"bytes={offset}-{offset + count - 1}", "Accept-Encoding": "identity"}
        request = urllib.request.Request(self._url, headers=headers)
        try:
            with self._opener.open(request, timeout=TIMEOUT_SECONDS) as response:
                self.etag = (response.headers.get("ETag") or "").strip('"') or None
                self.modified = response.headers.get("Last-Modified")
                if response.status == 200:
                    return self._download(response)[offset : offset + count]
                total = _TOTAL.match(response.headers.get("Content-Range") or "")
                if total is None:
                    raise OSError(errno.EPROTO, "the server sent a range without a valid Content-Range")
                self.size = int(total[1])
                return bytes(response.read())
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416 and offset == 0:  # an empty file has no ranges
                return b""
            raise

    def _download(self, response: Any) -> bytes:
        body = tempfile.SpooledTemporaryFile(max_size=READ_AHEAD_BYTES)  # noqa: SIM115 - closed with this file
        while chunk := response.read(1 << 20):
            body.write(chunk)
            if body.tell() > self._max_bytes:
                body.close()
                raise TooManyBytesError(
                    errno.EFBIG,
                    f"more than {self._max_bytes} bytes, and no range support",
                    storage.shown_uri(self._url),
                )
        expected = response.headers.get("Content-Length")
        if expected is not None and body.tell() < int(expected):
            raise ConnectionError(errno.ECONNRESET, f"the response ends after {body.tell()} of {expected} bytes")
        self.size, self._body = body.tell(), body
        body.seek(0)
        return bytes(body.read(FIRST_BYTES))


class _CheckedRedirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, allowed_domains: Sequence[str]) -> None:
        self._allowed_domains = allowed_domains

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        check_allowed(newurl, self._allowed_domains)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _is_transient(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code in TRANSIENT_STATUSES
    if isinstance(error, urllib.error.URLError):
        return not isinstance(error.reason, socket.gaierror)
    return not isinstance(error, DomainNotAllowedError | BadUrlError | TooManyBytesError | ValueError)


def _raise_plain(error: Exception, url: str) -> NoReturn:
    """Raises an OSError without the URL's query, which may be secret."""
    name = storage.shown_uri(url)
    if isinstance(error, urllib.error.HTTPError):
        number = {404: errno.ENOENT, 410: errno.ENOENT, 401: errno.EACCES, 403: errno.EACCES}.get(error.code, errno.EIO)
        # standard phrases: those of servers and of urllib's redirects may repeat the URL
        raise OSError(number, f"HTTP {error.code} {responses.get(error.code, '')}".rstrip(), name) from error
    if isinstance(error, ValueError):
        raise BadUrlError("it redirects to a URL that cannot be fetched") from error
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, socket.gaierror | TimeoutError | DomainNotAllowedError | BadUrlError | TooManyBytesError):
        raise cause from None
    raise OSError(errno.EIO, str(cause), name) from error
