"""A file that no decoder reads is named for what it is, with what to do."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from reference.synthetic_media import make_video
from timeviper_platform.data.media.container import DecodeError, ErrorType
from timeviper_platform.data.media.content import describe_content
from timeviper_platform.data.media.probe import probe_media


def zip_file() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.mp4", b"x")
    return file.getvalue()


def tar_file() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("a.mp4"))
    return file.getvalue()


def parquet_file() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"uri": ["a"]}), file)
    return file.getvalue()


def array_file() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
MPD = b'<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"></MPD>'
S3_ERROR = b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>NoSuchKey</Code><Key>secret/a.mp4</Key></Error>'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "an HTML page .* fetch the file itself"),
        (b"\xef\xbb\xbf\n  <HTML lang=de>", "an HTML page"),
        (b'<?xml version="1.0"?><!DOCTYPE html PUBLIC "x"><html>', "an HTML page"),
        (S3_ERROR, "an error message of a storage server"),
        (LFS, "a Git LFS pointer, not the file; run git lfs pull"),
        (b"#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:9.0,\nsegment0.ts\n", r"an HLS playlist \(m3u8\).* ffmpeg -i"),
        (b"\xef\xbb\xbf#EXTM3U\n", "an HLS playlist"),
        (MPD, r"a DASH playlist \(mpd\)"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
        (b"<rss></rss>", "an XML document"),
        (json.dumps({"error": "quota"}).encode(), "JSON text"),
        (zip_file(), "a zip archive; unpack it"),
        (tar_file(), "a tar archive"),
        (gzip.compress(b"x" * 100, mtime=0), "a gzip archive; unpack it"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj", "a PDF document"),
        (parquet_file(), "a Parquet file"),
        (array_file(), "a NumPy array"),
        (b"ID3\x04\x00\x00\x00\x00\x00\x21", "a sound file"),
        (b"uri,media_id\na.mp4,1\n", "text, not a medium"),
        ("Größe\n".encode("utf-16"), "text, not a medium"),
        ("é".encode() * 3000, "text, not a medium"),  # a character lies across the end of the head
        (bytes(5000), "zero bytes, as of a download that never finished"),
    ],
)
def test_other_contents_are_named(content: bytes, message: str) -> None:
    with pytest.raises(DecodeError, match=message) as raised:
        probe_media(content)
    assert raised.value.error_type == ErrorType.UNKNOWN_FORMAT
    assert "secret" not in str(raised.value)


def film() -> bytes:
    file = io.BytesIO()
    make_video(file, range(24), format="mp4")
    return file.getvalue()


def boxes(data: bytes) -> list[tuple[bytes, int, int]]:
    """Name, start and size of the top-level boxes."""
    found, offset = [], 0
    while offset < len(data):
        size = int.from_bytes(data[offset : offset + 4], "big")
        found.append((data[offset + 4 : offset + 8], offset, size))
        offset += size
    return found


def test_a_recording_without_its_index_says_so() -> None:
    data = film()
    (start,) = (start for name, start, _ in boxes(data) if name == b"moov")
    assert boxes(data)[-1][0] == b"moov"  # as cameras write it
    for size, fact in ((start, ""), (start - 100, f"it ends at byte {start - 100}, its data at byte {start}")):
        with pytest.raises(
            DecodeError, match=r"its index \(moov\) is missing.* before its index was written"
        ) as raised:
            probe_media(data[:size])
        assert raised.value.error_type == ErrorType.CORRUPT_FILE
        assert fact in str(raised.value)
    with pytest.raises(DecodeError, match=r"inside its index \(moov\): it was cut"):
        probe_media(data[: start + 60])


def test_a_media_segment_without_its_initialisation_says_so() -> None:
    parts = ((b"styp", b"msdh\0\0\0\0"), (b"moof", bytes(40)), (b"mdat", bytes(90)))
    segment = b"".join((8 + len(body)).to_bytes(4, "big") + name + body for name, body in parts)
    with pytest.raises(DecodeError, match="a media segment without its initialisation segment"):
        probe_media(segment)


def test_whole_media_and_noise_have_no_description() -> None:
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    for content in (film(), picture.getvalue(), b"\xff\xd8\xff\xe0" + bytes(range(256)), b"", b"\x80\x81\x82"):
        assert describe_content(io.BytesIO(content)) is None
