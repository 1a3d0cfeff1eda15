"""Signatures name pictures and videos, and nothing else."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from timeviper_platform.data.media.container import FORMAT_WHITELIST
from timeviper_platform.data.media.signatures import HEAD_BYTES, may_be_animation, sniff_modality

CASES = Path(__file__).parents[3] / "reference" / "cases"


@pytest.mark.parametrize("path", sorted((CASES / "media").glob("*.*")) + sorted((CASES / "pictures").iterdir()))
def test_the_content_of_every_case_is_recognized(path: Path) -> None:
    if path.suffix == ".json":
        return
    is_picture = path.parent.name == "pictures" or path.name.startswith("anim")
    assert sniff_modality(path.read_bytes()[:HEAD_BYTES]) == ("image" if is_picture else "video")


@pytest.mark.parametrize(
    ("codec", "format"),
    [
        *[("mpeg4", "mov"), ("mpeg4", "mp4"), ("mpeg4", "3gp"), ("mpeg4", "matroska"), ("mpeg4", "avi")],
        *[("libx264", "mpegts"), ("mpeg2video", "mpeg"), ("flv", "flv"), ("libvpx", "webm"), ("libvpx", "ivf")],
        *[("wmv2", "asf"), ("mpeg2video", "mxf"), ("mpeg1video", "mpeg1video"), ("mpeg2video", "mpeg2video")],
        *[("libx264", "h264"), ("libx265", "hevc")],
    ],
)
def test_every_container_is_recognized_and_may_be_opened(codec: str, format: str) -> None:
    content = io.BytesIO()
    with av.open(content, "w", format=format) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), number, np.uint8), "rgb24")))
        container.mux(stream.encode(None))
    assert sniff_modality(content.getvalue()[:HEAD_BYTES]) == "video"
    content.seek(0)
    with av.open(content, options={"format_whitelist": ",".join(FORMAT_WHITELIST)}) as container:
        assert container.streams.video


@pytest.mark.parametrize(
    "text",
    [
        *(
            b"#EXTM3U\nhttp://127.0.0.1/secret",
            b"ffconcat version 1.0\nfile /etc/passwd",
            b"<?xml?><MPD>",
        ),
        *(
            b"BMW and GIF are words; so is RIFF",
            b"Good day" * 100,
            b"P5 is a processor",
            b"MM",
            b"II",
            b"%PDF-1.7",
            b"",
        ),
        *(b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\n", b"PK\x03\x04" + bytes(300), b"\x7fELF" + bytes(300), bytes(512)),
    ],
)
def test_playlists_and_other_files_are_not_media(text: bytes) -> None:
    assert sniff_modality(text[:HEAD_BYTES]) is None


def test_stills_are_no_animations() -> None:
    for format in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "AVIF"):
        content = io.BytesIO()
        Image.new("RGB", (8, 8)).save(content, format)
        assert not may_be_animation(content.getvalue()[:HEAD_BYTES])
        if format in ("PNG", "WEBP", "AVIF"):
            content = io.BytesIO()
            frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
            frames[0].save(content, format, save_all=True, append_images=frames[1:])
            assert may_be_animation(content.getvalue()[:HEAD_BYTES])
