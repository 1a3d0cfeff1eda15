"""URLs are fetched by ranges, from allowed hosts only, with retries and a reason for every failure."""

from __future__ import annotations

import io
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from reference.synthetic_media import make_video, picture
from timeviper_platform.common import storage
from timeviper_platform.data.media.container import DecodeError, ErrorType, MediaLimits, open_binary
from timeviper_platform.data.media.http_file import DomainNotAllowedError, ascii_url, check_allowed
from timeviper_platform.data.media.medium import Medium
from timeviper_platform.data.media.probe import file_version, probe_media
from timeviper_platform.data.plan.segments import PlanSpec, plan_page
from timeviper_platform.data.video.reader import open_video, read_frames
from timeviper_platform.data.video_worker.frame_source import DecodeConfig, DecodeRequest, DecodeResult, LocalFrames

HERE = DecodeConfig(isolation="none")
LIMITS = MediaLimits(allowed_domains=("127.0.0.1",), max_download_bytes=1 << 20, https_backoff_seconds=0.001)


class Server:
    """Loopback web server with `files` by path, `statuses` to send instead of them, and counted requests."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.statuses: dict[str, list[int]] = {}
        self.redirects: dict[str, str] = {}
        self.version = {"ETag": '"v1"'}
        self.requests: Counter[str] = Counter()
        self.sent_bytes = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.respond(self)

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/{path}"

    def respond(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.lstrip("/").partition("?")[0]
        self.requests[path] += 1
        if statuses := self.statuses.get(path):
            self._send(request, statuses.pop(0), b"")
        elif path in self.redirects:
            self._send(request, 302, b"", Location=self.redirects[path])
        elif path not in self.files:
            self._send(request, 404, b"")
        else:
            self._send_file(request, self.files[path], with_ranges=not path.startswith("whole"))

    def _send_file(self, request: BaseHTTPRequestHandler, data: bytes, *, with_ranges: bool) -> None:
        if not with_ranges:
            self._send(request, 200, data)
            return
        first, last = (int(text) for text in request.headers["Range"].removeprefix("bytes=").split("-"))
        if first >= len(data):
            self._send(request, 416, b"")
            return
        chunk = data[first : last + 1]
        span = f"bytes {first}-{first + len(chunk) - 1}/{len(data)}"
        self._send(request, 206, chunk, **{"Content-Range": span, **self.version})

    def _send(self, request: BaseHTTPRequestHandler, status: int, data: bytes, **headers: str) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(data)
        self.sent_bytes += len(data)

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def clip() -> bytes:
    file = io.BytesIO()
    make_video(file, range(24), format="mp4")
    return file.getvalue()


def error_of(url: str, limits: MediaLimits = LIMITS) -> str:
    spec = PlanSpec(fps=Fraction(1), recipe_hash="r", limits=limits, decode=DecodeConfig(isolation="none"))
    (table,) = plan_page([Medium(url, "x")], spec)
    (row,) = table.to_pylist()
    return str(row["error_type"])


def test_media_from_urls_equal_those_from_files(server: Server, clip: bytes) -> None:
    image = io.BytesIO()
    Image.fromarray(picture(1)).save(image, "PNG")
    server.files = {"clip.mp4": clip, "whole.mp4": clip, "image.png": image.getvalue()}
    for name in ("clip.mp4", "whole.mp4", "image.png"):
        found = read_frames(server.url(name), 32, limits=LIMITS)
        assert np.array_equal(found.frames, read_frames(server.files[name], 32).frames), name
    assert file_version(server.url("clip.mp4"), LIMITS) == (len(clip), "v1", "v1")


def test_changed_content_has_another_version(server: Server, clip: bytes) -> None:
    server.files["clip.mp4"] = clip
    dates = ["Wed, 21 Oct 2015 07:28:00 GMT", "Thu, 22 Oct 2015 07:28:00 GMT"]
    found = []
    for headers in ({}, *({"Last-Modified": date} for date in dates)):
        server.version = headers
        found.append(file_version(server.url("clip.mp4"), LIMITS).text)
    assert found == [f"{len(clip)}-web", *(f"{len(clip)}-{date}" for date in dates)]


def test_only_the_needed_ranges_are_sent(server: Server) -> None:
    server.files["large.bin"] = bytes(range(256)) * (1 << 16)
    with open_binary(server.url("large.bin"), LIMITS) as file:
        file.seek(-3, io.SEEK_END)
        assert file.read() == b"\xfd\xfe\xff"
        assert file.seek(5 << 20) == 5 << 20
        assert file.read(2) == b"\x00\x01"
    assert server.sent_bytes < 5 << 20


def test_only_allowed_domains_are_fetched(server: Server, clip: bytes) -> None:
    server.files["clip.mp4"] = clip
    assert error_of(server.url("clip.mp4"), MediaLimits()) == ErrorType.DOMAIN_NOT_ALLOWED
    server.redirects["away"] = f"http://localhost:{server.url('').rpartition(':')[2]}clip.mp4"
    assert error_of(server.url("away")) == ErrorType.DOMAIN_NOT_ALLOWED
    assert server.requests == {"away": 1}  # refused before a request, and not retried
    both = MediaLimits(allowed_domains=("127.0.0.1", "localhost"))
    assert error_of(server.url("away"), both) == "None"
    for url in ("https://notexample.org/a", "http://example.org/a", "https://example.org.evil.test/a"):
        with pytest.raises(DomainNotAllowedError):
            check_allowed(url, ["example.org"])
    check_allowed("https://images.example.org/a", ["example.org"])
    for wrong in ("https://example.org", "a..example.org", ""):
        with pytest.raises(ValueError, match="bare host names"):
            MediaLimits(allowed_domains=(wrong,))
    with pytest.raises(ValueError, match="https_attempts"):
        MediaLimits(https_attempts=0)


@pytest.mark.parametrize(
    "url",
    [
        *("https://[foo/a.jpg", "https://a..127.0.0.1/a.jpg", f"https://{'a' * 64}.127.0.0.1/a.jpg", "https:///a.jpg"),
        *("https://127.0.0.1:port/a.jpg", "https://me:secret@127.0.0.1/a.jpg", "https://127.0.0.1/\udcff.jpg"),
    ],
)
def test_a_malformed_url_is_an_error_row(url: str) -> None:
    (table,) = plan_page([Medium(url, "x")], PlanSpec(fps=Fraction(1), recipe_hash="r", limits=LIMITS, decode=HERE))
    (row,) = table.to_pylist()
    assert (row["error_stage"], row["error_type"]) == ("probe", ErrorType.BAD_URI)
    assert "secret" not in str(row)


def test_a_redirect_to_a_malformed_url_is_an_error_row(server: Server) -> None:
    server.redirects["away"] = "https://[foo"
    assert error_of(server.url("away")) == ErrorType.BAD_URI
    assert server.requests["away"] == 1


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("café/ü b.mp4", "caf%C3%A9/%C3%BC%20b.mp4"),
        ("caf%C3%A9/%20.mp4?q=é&r=1#t=ü", "caf%C3%A9/%20.mp4?q=%C3%A9&r=1"),
    ],
)
def test_non_ascii_urls_are_encoded_as_browsers_do(written: str, sent: str) -> None:
    assert ascii_url(f"https://Bücher.example/{written}") == f"https://xn--bcher-kva.example/{sent}"
    check_allowed(f"https://a.bücher.example/{written}", ["Bücher.example"])


def test_media_with_non_ascii_names_are_fetched(server: Server, clip: bytes) -> None:
    server.files["caf%C3%A9.mp4"] = clip
    assert error_of(server.url("café.mp4")) == "None"


@pytest.mark.parametrize(
    ("status", "kind", "attempts"),
    [
        (404, ErrorType.NOT_FOUND, 1),
        (410, ErrorType.NOT_FOUND, 1),
        (403, ErrorType.PERMISSION_DENIED, 1),
        (400, ErrorType.READ_FAILED, 1),
        (503, ErrorType.READ_FAILED, LIMITS.https_attempts),
        (429, ErrorType.READ_FAILED, LIMITS.https_attempts),
    ],
)
def test_each_status_has_its_error_type(server: Server, status: int, kind: ErrorType, attempts: int) -> None:
    server.statuses["x.jpg"] = [status] * 9
    assert error_of(server.url("x.jpg?token=secret")) == kind
    assert server.requests["x.jpg"] == attempts


def decoded(url: str) -> DecodeResult:
    """Decodes an image without probing it first."""
    config = DecodeConfig(isolation="none")
    (found,) = LocalFrames(32, LIMITS, config).decode([DecodeRequest(url, "image", [Fraction(0)])])
    return found


@pytest.mark.parametrize(
    ("status", "kind", "attempts"),
    [
        (404, ErrorType.NOT_FOUND, 1),
        (401, ErrorType.PERMISSION_DENIED, 1),
        (400, ErrorType.READ_FAILED, 1),
        (503, ErrorType.READ_FAILED, LIMITS.https_attempts),
    ],
)
def test_links_that_die_after_planning_have_the_same_error_types(
    server: Server, status: int, kind: ErrorType, attempts: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    server.statuses["x.jpg"] = [status] * 99
    error = decoded(server.url("x.jpg?token=secret")).frames
    assert isinstance(error, DecodeError)
    assert (error.stage, error.error_type) == ("decode_image", kind)
    assert server.requests["x.jpg"] == attempts
    assert "secret" not in error.message + caplog.text


def test_transient_failures_are_retried(server: Server, clip: bytes) -> None:
    server.files["clip.mp4"] = clip
    server.statuses["clip.mp4"] = [503, 502]
    before = storage.num_retries()
    assert error_of(server.url("clip.mp4")) == "None"
    assert storage.num_retries() - before == 2
    assert server.statuses["clip.mp4"] == []


def test_empty_oversized_and_unreachable_files_have_different_errors(server: Server) -> None:
    server.files = {"empty.mp4": b"", "whole-and-large.mp4": bytes(2 << 20)}
    assert error_of(server.url("empty.mp4")) == ErrorType.EMPTY_FILE
    assert error_of(server.url("whole-and-large.mp4")) == ErrorType.TOO_MANY_BYTES
    server.stop()
    assert error_of(server.url("gone.mp4"), replace(LIMITS, https_attempts=1)) == ErrorType.READ_FAILED


def test_error_messages_leave_out_the_query(server: Server) -> None:
    server.statuses["x.jpg"] = [403]
    items = [Medium(server.url("x.jpg?token=secret"), "x")]
    (table,) = plan_page(items, PlanSpec(fps=Fraction(1), recipe_hash="r", limits=LIMITS))
    (row,) = table.to_pylist()
    assert "HTTP 403 Forbidden" in row["error_message"]
    assert "secret" not in str(row)


def test_a_refused_redirect_is_not_quoted(server: Server) -> None:
    server.redirects["away"] = "gopher://127.0.0.1/a?token=secret"
    error = decoded(server.url("away")).frames
    assert isinstance(error, DecodeError)
    assert "HTTP 302 Found" in error.message
    assert "secret" not in error.message


def test_a_video_is_opened_with_the_bytes_that_told_what_it_is(server: Server) -> None:
    film, gif = io.BytesIO(), io.BytesIO()
    make_video(film, range(16), format="mp4")
    pictures = [Image.fromarray(picture(number)) for number in range(3)]
    pictures[0].save(gif, "GIF", save_all=True, append_images=pictures[1:], duration=1000)
    server.files = {"film.mp4": film.getvalue(), "film.gif": gif.getvalue()}
    for name in server.files:
        url = server.url(name)
        reader = open_video(url, 32, limits=LIMITS)
        assert len(reader.sample([Fraction(0), Fraction(1)]).frames) == 2
        reader.close()
        assert server.requests[name] == 1
        assert probe_media(url, LIMITS).modality == "video"
        assert server.requests[name] == 2
