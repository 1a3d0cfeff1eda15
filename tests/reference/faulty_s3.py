"""A moto S3 server on loopback that injects errors and delays, and records requests."""

from __future__ import annotations

import random
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

EXPIRED = (
    b"<?xml version='1.0'?><Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
)
SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)


@dataclass
class Faults:
    """Faults to inject, and what happened so far."""

    is_down: bool = False
    """answer every request with 503"""
    fail_first_of: int | None = None
    """answer the first request of every n-th new (method, path) with 503"""
    slow_rate: float = 0.0
    slow_seconds: float = 0.2
    answers: dict[str, str] = field(default_factory=dict)
    """last part of a path -> status that it always gets, e.g. 403 Forbidden"""
    expired_keys: set[str] = field(default_factory=set)
    """access keys that are answered with ExpiredToken"""
    drops: Callable[[str, str, IO[bytes]], bool] | None = None
    """(method, path, body) -> True to drop a request without storing anything"""
    num_errors: int = 0
    num_slow: int = 0
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """(method, path, query) of the requests without an injected 503"""
    bytes_read: dict[str, int] = field(default_factory=dict)
    """path -> bytes of its GET answers"""
    num_open: int = 0
    """requests in progress; a killed client leaves its last one"""
    _seen: set[tuple[str, str]] = field(default_factory=set)
    _random: random.Random = field(default_factory=lambda: random.Random(0))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def wrap(self, application: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
        """The application behind the faults."""

        def faulty(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            with self._lock:
                self.num_open += 1
                fails = self.is_down or self._fails_at_first((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
                is_slow = self._random.random() < self.slow_rate
                self.num_errors += fails
                self.num_slow += is_slow
                if not fails:
                    request = (environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("QUERY_STRING", ""))
                    self.requests.append(request)
            try:
                if is_slow:
                    time.sleep(self.slow_seconds)
                return self._answer(application, environ, start_response, fails)
            finally:
                with self._lock:
                    self.num_open -= 1

        return faulty

    def wait_until_idle(self) -> None:
        """Returns when no request has been open for 0.1 s."""
        num_idle = 0
        while num_idle < 5:
            time.sleep(0.02)
            num_idle = 0 if self.num_open else num_idle + 1

    def _answer(
        self,
        application: Callable[..., Iterable[bytes]],
        environ: dict[str, Any],
        start_response: Callable[..., Any],
        fails: bool,
    ) -> Iterable[bytes]:
        if self.drops is not None and self.drops(
            environ["REQUEST_METHOD"], environ["PATH_INFO"], environ["wsgi.input"]
        ):
            start_response("500 Dropped", [])
            return []
        status = "503 Slow Down" if fails else self.answers.get(environ["PATH_INFO"].rpartition("/")[2])
        if status is not None:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(status, [("Content-Type", "application/xml")])
            return [SLOW_DOWN] if status.startswith("503") and environ["REQUEST_METHOD"] != "HEAD" else []
        if any(f"Credential={key}/" in environ.get("HTTP_AUTHORIZATION", "") for key in self.expired_keys):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("400 Bad Request", [("Content-Type", "application/xml")])
            return [] if environ["REQUEST_METHOD"] == "HEAD" else [EXPIRED]
        if environ["REQUEST_METHOD"] != "GET":
            return application(environ, start_response)
        body = b"".join(application(environ, start_response))
        with self._lock:
            self.bytes_read[environ["PATH_INFO"]] = self.bytes_read.get(environ["PATH_INFO"], 0) + len(body)
        return [body]

    def _fails_at_first(self, request: tuple[str, str]) -> bool:
        if self.fail_first_of is None or request in self._seen:
            return False
        self._seen.add(request)
        return len(self._seen) % self.fail_first_of == 0


@contextmanager
def s3_server() -> Iterator[tuple[str, Faults]]:
    """Yields the URL of a running server, and its faults."""
    faults = Faults()
    server = make_server("127.0.0.1", 0, faults.wrap(DomainDispatcherApplication(create_backend_app)), threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield url, faults
    finally:
        faults.is_down, faults.fail_first_of = False, None
        urllib.request.urlopen(urllib.request.Request(f"{url}/moto-api/reset", method="POST")).close()
        server.shutdown()
        thread.join()
        server.server_close()
