"""Media at addresses that the operator allows: https from domains, files below folders. Both are off by default.

Names are resolved once, and the connection goes to an address that was checked, so that no name can lead to an internal
service; redirects are checked like the first address.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import ipaddress
import math
import os
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import IO, NoReturn
from urllib.parse import unquote, urljoin, urlsplit

from timeviper_platform.common import storage
from timeviper_platform.data.media.http_file import BadUrlError, ascii_url
from timeviper_platform.data.media.signatures import HEAD_BYTES, may_be_animation
from timeviper_platform.serving.gateway.config import GatewayConfig, RemoteMedia
from timeviper_platform.serving.gateway.media.uploads import MediaStore, require_media
from timeviper_platform.serving.gateway.openai_protocol import ApiError
from timeviper_platform.serving.messages import MediaAddress, MediaFile, Modality

HTTPS = "https://"
FILE = "file://"
MAX_REDIRECTS = 3
MAX_URL = 8192
READ_TIMEOUT_S = 20.0
"""Longest wait for the next bytes."""
REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK_BYTES = 1 << 18
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
TENANT = "_downloads"
"""Folder of downloads; no key's tenant can have this name."""
MAX_AT_ONCE = 16
"""Files at addresses that a gateway reads at once; others wait."""
MAX_HASHES = 4096
"""Maximum local files with cached hashes."""
KEPT_LONGER_S = 600.0
"""Further seconds for which a download stays on storage, for requests that still read it."""
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def resolve(host: str, port: int) -> list[str]:
    """Returns the addresses of a host.

    Raises:
        OSError: when the host has none, or one that is not on the public internet.
    """
    found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not found or not all(is_global(ipaddress.ip_address(address)) for address in found):
        raise OSError("the host has an address that is not global")
    return found


def is_global(address: Address) -> bool:
    """Whether an address is on the public internet, also the IPv4 address inside an IPv6 one."""
    inner: Address | None = None
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.is_global and not address.is_multicast and (inner is None or is_global(inner))


class RemoteFetcher:
    def __init__(
        self,
        config: RemoteMedia,
        *,
        resolve: Callable[[str, int], Sequence[str]] = resolve,
        port: int = 443,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self._config = config
        self._resolve = resolve
        self._port = port
        self._context = context or ssl.create_default_context()

    def check(self, url: str, param: str) -> str:
        """Returns the URL in ASCII.

        Raises:
            ApiError: 400 for a URL that may not be fetched.
        """
        if not self._config.allowed_domains:
            raise ApiError(
                400,
                "this server does not fetch remote addresses; upload the file to /v1/files",
                code="remote_media_disabled",
                param=param,
            )
        try:
            if len(url) > MAX_URL:
                raise BadUrlError
            plain = ascii_url(url)
            parts = urlsplit(plain)
            port = parts.port
        except (BadUrlError, ValueError):
            _refuse("the address is not a valid URL without user and password", param)
        if parts.scheme != "https" or port not in (None, self._port):
            _refuse("only https on its own port is fetched", param)
        host = parts.hostname or ""
        if not any(host == domain or host.endswith(f".{domain}") for domain in self._config.allowed_domains):
            _refuse("the address's domain is not one that this server fetches from", param, "domain_not_allowed")
        return plain

    def fetch(self, url: str, file: IO[bytes], param: str) -> None:
        """Downloads to a file.

        Raises:
            ApiError: 400 for an address that may not or cannot be read, 408 or 413 for one that is slow or large.
        """
        deadline = time.monotonic() + self._config.timeout_s
        for _ in range(MAX_REDIRECTS + 1):
            try:
                location = self._fetch_once(self.check(url, param), file, deadline)
            except TimeoutError:
                text = f"the address did not deliver within {self._config.timeout_s:g} s"
                raise ApiError(408, text, code="remote_timeout", param=param) from None
            except _TooLargeError:
                text = f"the file at the address has more than {self._config.max_bytes} bytes"
                raise ApiError(413, text, code="too_large", param=param) from None
            except (OSError, http.client.HTTPException, ValueError):  # no detail: it may describe an internal network
                _refuse("the address cannot be read", param, "remote_failed")
            if location is None:
                return
            url = urljoin(url, location)
        _refuse(f"the address redirects more than {MAX_REDIRECTS} times", param, "remote_failed")

    def _fetch_once(self, url: str, file: IO[bytes], deadline: float) -> str | None:
        """Returns where it redirects, or None after a download."""
        parts = urlsplit(url)
        host = parts.hostname or ""
        (address, *_) = self._resolve(host, self._port)
        connection = _PinnedConnection(host, address, self._port, self._context, deadline)
        # a socket's timeout applies to each read, and headers may come byte by byte
        timer = threading.Timer(max(0.0, deadline - time.monotonic()), connection.shut_down)
        timer.daemon = True
        timer.start()
        try:
            target = parts.path + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={"Accept-Encoding": "identity", "User-Agent": "timeviper"})
            response = connection.getresponse()
            if response.status in REDIRECTS:
                return response.headers["Location"] or _no_location()
            if response.status != 200 or response.headers.get("Content-Encoding", "identity") != "identity":
                raise OSError(f"HTTP {response.status}")
            self._copy(response, file, connection, deadline)
            return None
        except (OSError, http.client.HTTPException):
            _check(deadline)  # shutting down causes other errors
            raise
        finally:
            timer.cancel()
            connection.close()

    def _copy(
        self, response: http.client.HTTPResponse, file: IO[bytes], connection: _PinnedConnection, deadline: float
    ) -> None:
        expected = response.length
        if (expected or 0) > self._config.max_bytes:
            raise _TooLargeError
        num_bytes = 0
        while chunk := response.read1(_CHUNK_BYTES):
            num_bytes += len(chunk)
            if num_bytes > self._config.max_bytes:
                raise _TooLargeError
            file.write(chunk)
            connection.wait_until(deadline)
        _check(deadline)  # a connection that was shut down seems to end
        if expected is not None and num_bytes < expected:
            raise OSError("the download ended early")


class _TooLargeError(Exception):
    pass


def _check(deadline: float) -> None:
    if time.monotonic() >= deadline:
        raise TimeoutError


def _no_location() -> NoReturn:
    raise OSError("a redirect without Location")


class _PinnedConnection(http.client.HTTPSConnection):
    """A connection to one address, whose certificate must be the host's. Uses no proxy."""

    def __init__(self, host: str, address: str, port: int, context: ssl.SSLContext, deadline: float) -> None:
        super().__init__(host, port, context=context)
        self._address, self._tls, self._deadline = address, context, deadline
        self._socket: ssl.SSLSocket | None = None

    def connect(self) -> None:
        plain = socket.create_connection((self._address, self.port), self._remaining(self._deadline))
        tls = self._tls.wrap_socket(plain, server_hostname=self.host, do_handshake_on_connect=False)
        self.sock = self._socket = tls
        tls.do_handshake()

    def wait_until(self, deadline: float) -> None:
        """Bounds the next read. Raises TimeoutError after the deadline."""
        remaining = self._remaining(deadline)
        if self._socket is not None:  # `sock` is None once the response is the last
            self._socket.settimeout(remaining)

    def shut_down(self) -> None:
        """Ends reads of another thread."""
        with contextlib.suppress(OSError):
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)

    def _remaining(self, deadline: float) -> float:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        return min(remaining, READ_TIMEOUT_S)


def local_path(url: str, roots: Sequence[str], param: str) -> str:
    """Returns the real path of a file:// URL below one of the folders.

    Raises:
        ApiError: 400 for any other file, whether it exists or not.
    """
    if not roots:
        text = "this server reads no local files; upload the file to /v1/files"
        raise ApiError(400, text, code="local_media_disabled", param=param)
    parts = urlsplit(url)
    try:
        path = os.path.realpath(unquote(parts.path))
        is_below = any(os.path.commonpath((path, os.path.realpath(root))) == os.path.realpath(root) for root in roots)
        if parts.netloc in ("", "localhost") and is_below and Path(path).is_file():
            return path
    except (OSError, ValueError):  # ValueError: a path with a null byte
        pass
    _refuse("the address is not a file that this server may read", param, "file_not_allowed")


class Addresses:
    """Files at addresses, each read once while it is kept."""

    def __init__(self, config: GatewayConfig, store: MediaStore, fetcher: RemoteFetcher | None = None) -> None:
        self._roots = config.allowed_local_media
        self._keep_s = config.remote.keep_s
        self._store = store
        self._fetcher = fetcher or RemoteFetcher(config.remote)
        self._threads = ThreadPoolExecutor(
            MAX_AT_ONCE, thread_name_prefix="address"
        )  # slow sites hold up no other work
        self._files: dict[tuple[str, str], tuple[float, asyncio.Future[MediaFile]]] = {}
        """By tenant and address, because the time of an answer would reveal other tenants' media."""

    async def check(self, url: str, param: str) -> MediaAddress:
        """Returns the address as manifests write it.

        Raises:
            ApiError: 400 for an address that may not be read.
        """
        if url[: len(FILE)].lower() == FILE:
            path = await asyncio.to_thread(local_path, url, self._roots, param)
            named = os.path.normpath(unquote(urlsplit(url).path))  # a manifest may name it by its links
            return MediaAddress(uri=path, aliases=(*({named} - {path}), f"{FILE}{named}"))
        return MediaAddress(uri=self._fetcher.check(url, param))

    async def load(self, address: MediaAddress, tenant: str, param: str) -> MediaFile:
        """Returns the file, downloaded if it is remote.

        Raises:
            ApiError: as RemoteFetcher.fetch, and 415 for other content.
        """
        if not address.uri.startswith(HTTPS):
            return await asyncio.get_running_loop().run_in_executor(self._threads, _local_file, address.uri, param)
        now, key = time.monotonic(), (tenant, address.uri)
        self._files = {key: kept for key, kept in self._files.items() if kept[0] > now}
        loop, kept = asyncio.get_running_loop(), self._files.get(key)
        if kept is not None and kept[1].done():
            uri = (await kept[1]).uri
            if not await loop.run_in_executor(self._threads, storage.exists, uri):  # `retention` has deleted it
                if self._files.get(key) is kept:
                    del self._files[key]
                kept = self._files.get(key)
        if kept is None:
            task = loop.run_in_executor(self._threads, self._download, address.uri, param)
            kept = self._files[key] = now + self._keep_s, task
            task.add_done_callback(lambda done: self._forget(key, done))
        return await asyncio.shield(kept[1])  # others may wait for it

    def _forget(self, key: tuple[str, str], done: asyncio.Future[MediaFile]) -> None:
        if (done.cancelled() or done.exception() is not None) and self._files.get(key, (0, None))[1] is done:
            del self._files[key]

    def _download(self, url: str, param: str) -> MediaFile:
        with tempfile.TemporaryFile() as file:
            self._fetcher.fetch(url, file, param)
            keep_s = math.ceil(self._keep_s + KEPT_LONGER_S)
            record = self._store.put(TENANT, file, filename="download", purpose="download", expires_after_s=keep_s)
        modality: Modality = "video" if record.may_be_animation else record.modality
        return MediaFile(uri=self._store.uri(TENANT, record), sha256=record.sha256, modality=modality)


def _local_file(path: str, param: str) -> MediaFile:
    try:
        with Path(path).open("rb") as file:
            head = file.read(HEAD_BYTES)
        modality = require_media(head, param=param)
        state = Path(path).stat()
        sha256 = _sha256(path, state.st_ino, state.st_size, state.st_mtime_ns)
    except OSError:
        _refuse("the address cannot be read", param, "file_not_allowed")
    return MediaFile(uri=path, sha256=sha256, modality="video" if may_be_animation(head) else modality)


@lru_cache(maxsize=MAX_HASHES)
def _sha256(path: str, inode: int, size: int, modified_ns: int) -> str:
    """Returns a file's hash, read once while the file stays as it is."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse(message: str, param: str, code: str = "invalid_url") -> NoReturn:
    raise ApiError(400, message, code=code, param=param)
