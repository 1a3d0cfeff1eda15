"""Media behind https URLs as seekable files, from hosts that the configuration names and no others.

Knows ranges, redirects (each must lead to an allowed host), retries and which failures are worth one. Plain http is
for the loopback address alone. Does not know what the bytes are.
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

ATTEMPTS = 4
BACKOFF_SECONDS = 0.5
"""Before the second attempt; twice as long before each further one, and up to as much again at random."""

TIMEOUT_SECONDS = 20.0
"""Without a byte."""

FIRST_BYTES = 64 << 10
"""Enough for the headers of an image and of most videos."""

AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Status codes that may be another a moment later."""

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_KEPT = "%/:=&?~#+!$,;'@()*[]|"
"""What stands in paths and queries as it is; a percent sign is one of an encoding."""

_TOTAL = re.compile(r"bytes (?:\d+-\d+|\*)/(\d+)")


class DomainNotAllowedError(PermissionError):
    """A URL, or what it redirects to, is on a host that the configuration does not name."""


class BadUrlError(OSError):
    """A URL, or what it redirects to, that no server could be asked for."""


class TooManyBytesError(OSError):
    """A server that knows no ranges sends more than the limit."""


def is_web(uri: str) -> bool:
    """True for URLs that this module fetches."""
    return uri[:8].lower().startswith(("https://", "http://"))


def check_allowed(url: str, allowed_domains: Sequence[str]) -> None:
    """Passes for https URLs on an allowed domain or below it.

    Raises:
        DomainNotAllowedError: for any other, with the setting that allows it.
        BadUrlError: for what is no URL.
    """
    parts = urlsplit(ascii_url(url))
    host = parts.hostname or ""
    domains = [_ascii_host(domain) for domain in allowed_domains]
    if not any(host == domain or host.endswith(f".{domain}") for domain in domains):
        raise DomainNotAllowedError(f"{host!r} is not fetched from; name it in limits.allowed_domains to allow it")
    if parts.scheme != "https" and not (parts.scheme == "http" and host in _LOOPBACK):
        raise DomainNotAllowedError(f"{parts.scheme}://{host} is not encrypted; only https is fetched")


def ascii_url(url: str) -> str:
    """The URL as browsers send it: other letters percent-encoded, those of a host in IDNA, and without a fragment.

    Raises:
        BadUrlError: for what is no URL.
    """
    try:
        parts = urlsplit(url)
        host, port = _ascii_host(parts.hostname or ""), parts.port
        path, query = quote(parts.path or "/", safe=_KEPT), quote(parts.query, safe=_KEPT)
    except ValueError as error:  # UnicodeError is one
        raise BadUrlError(f"no URL that can be fetched: {error}") from error
    if not host or parts.username is not None:
        fault = "it has a user or password" if host else "it has no host"
        raise BadUrlError(f"no URL that can be fetched: {fault}")
    place = (f"[{host}]" if ":" in host else host) + ("" if port is None else f":{port}")
    return urlunsplit((parts.scheme, place, path, query, ""))


def _ascii_host(host: str) -> str:
    return host.lower() if ":" in host else host.encode("idna").decode("ascii").lower()


def is_host(name: str) -> bool:
    """True for a bare host name."""
    try:
        return bool(_ascii_host(name)) and not set(name) & set("/:*@")
    except UnicodeError:
        return False


def open_web(url: str, allowed_domains: Sequence[str], max_bytes: int) -> io.BufferedReader:
    """A seekable file object over what is at `url`; `max_bytes` bounds a server that knows no ranges.

    Raises:
        OSError: FileNotFoundError and PermissionError as servers say, TimeoutError, socket.gaierror,
            DomainNotAllowedError, BadUrlError, TooManyBytesError, and others after the last attempt.
    """
    return io.BufferedReader(WebFile(url, allowed_domains, max_bytes), buffer_size=READ_AHEAD_BYTES)


class WebFile(io.RawIOBase):
    """Reads ranges of one URL; see `open_web`."""

    def __init__(self, url: str, allowed_domains: Sequence[str], max_bytes: int) -> None:
        check_allowed(url, allowed_domains)
        self._url = ascii_url(url)
        self._opener = urllib.request.build_opener(_CheckedRedirects(allowed_domains))
        self._max_bytes = max_bytes
        self._place = 0
        self._body: Any = None  # all of it, where the server knows no ranges
        self.size = 0
        self.etag: str | None = None
        self.modified: str | None = None
        """when, in the server's words"""
        self._first = self._fetch(0, FIRST_BYTES)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.size}[whence]
        self._place = max(0, base + place)
        return self._place

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self.size - self._place))
        data = self._read(wanted) if wanted else b""
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def close(self) -> None:
        if self._body is not None:
            self._body.close()
        super().close()

    def _read(self, wanted: int) -> bytes:
        if self._body is not None:
            self._body.seek(self._place)
            return bytes(self._body.read(wanted))
        if self._place < len(self._first):
            return self._first[self._place : self._place + wanted]
        return self._fetch(self._place, wanted)

    def _fetch(self, offset: int, count: int) -> bytes:
        for attempt in range(ATTEMPTS):
            try:
                return self._fetch_once(offset, count)
            except (OSError, HTTPException, ValueError) as error:  # ValueError: a redirect to what is no URL
                if attempt + 1 == ATTEMPTS or not _is_passing(error):
                    _raise_plain(error, self._url)
            storage.add_retries(1)
            time.sleep(BACKOFF_SECONDS * 2**attempt * (1 + random.random()))
        raise AssertionError("the last attempt returns or raises")

    def _fetch_once(self, offset: int, count: int) -> bytes:
        headers = {"Range": f"bytes={offset}-{offset + count - 1}", "Accept-Encoding": "identity"}
        request = urllib.request.Request(self._url, headers=headers)
        try:
            with self._opener.open(request, timeout=TIMEOUT_SECONDS) as answer:
                self.etag = (answer.headers.get("ETag") or "").strip('"') or None
                self.modified = answer.headers.get("Last-Modified")
                if answer.status == 200:
                    return self._take_all(answer)[offset : offset + count]
                total = _TOTAL.match(answer.headers.get("Content-Range") or "")
                if total is None:
                    raise OSError(errno.EPROTO, "the server answers a range without saying which")
                self.size = int(total[1])
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416 and offset == 0:  # an empty file has no range
                return b""
            raise

    def _take_all(self, answer: Any) -> bytes:
        body = tempfile.SpooledTemporaryFile(max_size=READ_AHEAD_BYTES)  # noqa: SIM115 - lives as long as this
        while piece := answer.read(1 << 20):
            body.write(piece)
            if body.tell() > self._max_bytes:
                body.close()
                raise TooManyBytesError(
                    errno.EFBIG, f"more than {self._max_bytes} bytes and no ranges", storage.shown_uri(self._url)
                )
        expected = answer.headers.get("Content-Length")
        if expected is not None and body.tell() < int(expected):
            raise ConnectionError(errno.ECONNRESET, f"the answer ends after {body.tell()} of {expected} bytes")
        self.size, self._body = body.tell(), body
        body.seek(0)
        return bytes(body.read(FIRST_BYTES))


class _CheckedRedirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect only to where a URL of the manifest could have led."""

    def __init__(self, allowed_domains: Sequence[str]) -> None:
        self._allowed_domains = allowed_domains

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        check_allowed(newurl, self._allowed_domains)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _is_passing(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code in AGAIN
    if isinstance(error, urllib.error.URLError):
        return not isinstance(error.reason, socket.gaierror)
    return not isinstance(error, DomainNotAllowedError | BadUrlError | TooManyBytesError | ValueError)


def _raise_plain(error: Exception, url: str) -> NoReturn:
    """As the file systems would: without urllib's types, and without the URL's query, which may hold a secret."""
    name = storage.shown_uri(url)
    if isinstance(error, urllib.error.HTTPError):
        number = {404: errno.ENOENT, 410: errno.ENOENT, 401: errno.EACCES, 403: errno.EACCES}.get(error.code, errno.EIO)
        # the standard's words: a server's own, and urllib's of redirects, may repeat the URL
        raise OSError(number, f"HTTP {error.code} {responses.get(error.code, '')}".rstrip(), name) from error
    if isinstance(error, ValueError):
        raise BadUrlError("it redirects to no URL that can be fetched") from error
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, socket.gaierror | TimeoutError | DomainNotAllowedError | BadUrlError | TooManyBytesError):
        raise cause from None
    raise OSError(errno.EIO, str(cause), name) from error
