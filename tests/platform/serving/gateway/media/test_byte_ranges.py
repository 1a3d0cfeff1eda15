"""byte_ranges: the forms of RFC 9110, and files in pieces over HTTP."""

from __future__ import annotations

from pathlib import Path

import pytest

from reference.synthetic_gateway import MP4, Server, check_error, stored_medium
from timeviper_platform.serving.gateway.media.byte_ranges import UnsatisfiableRangeError, parse_range


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, None),
        ("bytes=0-3", (0, 4)),
        ("Bytes=5-", (5, 10)),
        ("bytes=-3", (7, 10)),
        ("bytes=-30", (0, 10)),
        ("bytes=8-99", (8, 10)),
        ("bytes=3-2", None),
        ("bytes=-", None),
        ("bytes=0-1,4-5", None),
        ("frames=0-1", None),
    ],
)
def test_a_range_is_one_of_bytes_or_ignored(header: str | None, expected: tuple[int, int] | None) -> None:
    assert parse_range(header, 10) == expected


@pytest.mark.parametrize("header", ["bytes=10-", "bytes=10-12", "bytes=-0"])
def test_a_range_without_a_byte_is_refused(header: str) -> None:
    with pytest.raises(UnsatisfiableRangeError):
        parse_range(header, 10)


def test_an_upload_is_read_in_pieces(server: Server) -> None:
    """Before: 200 with the whole file, so that a player could not seek."""
    url = f"/v1/files/{server.upload().json()['id']}/content"
    whole = server.http.get(url)
    assert (whole.status_code, whole.content, whole.headers["accept-ranges"]) == (200, MP4, "bytes")
    part = server.http.get(url, headers={"Range": "bytes=4-11"})
    assert (part.status_code, part.content) == (206, MP4[4:12])
    assert part.headers["content-range"] == f"bytes 4-11/{len(MP4)}"
    assert part.headers["content-length"] == "8"
    stale = {"Range": "bytes=4-11", "If-Range": '"other"'}
    assert server.http.get(url, headers=stale).content == MP4
    assert server.http.get(url, headers={**stale, "If-Range": whole.headers["etag"]}).status_code == 206
    beyond = server.http.get(url, headers={"Range": f"bytes={len(MP4)}-"})
    check_error(beyond, 416, "invalid_range")
    assert beyond.headers["content-range"] == f"bytes */{len(MP4)}"


def test_a_stored_mediums_file_is_read_below_allowed_folders_only(tmp_path: Path) -> None:
    film = tmp_path / "films" / "a b.mp4"
    film.parent.mkdir()
    film.write_bytes(MP4)
    allowed = Server(tmp_path, allowed_local_media=(str(film.parent),))
    for uri in (str(film), f"file://{film.parent}/a%20b.mp4"):
        allowed.features.stored = [stored_medium("films/a", uri)]
        part = allowed.http.get("/v1/videos/films/a/content", headers={"Range": "bytes=-5"})
        assert (part.status_code, part.content) == (206, MP4[-5:])
    for uri in ("/etc/passwd", "s3://bucket/a.mp4", f"{film.parent}/../other.mp4"):
        allowed.features.stored = [stored_medium("films/a", uri)]
        check_error(allowed.http.get("/v1/videos/films/a/content"), 404, "content_not_available")
    closed = Server(tmp_path)
    closed.features.stored = [stored_medium("films/a", str(film))]
    check_error(closed.http.get("/v1/videos/films/a/content"), 404, "content_not_available")
