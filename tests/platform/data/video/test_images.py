"""Images of every mode, depth and format become upright frames on white."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reference.awkward_videos import SIZE
from timeviper_platform.data.media.container import DecodeError
from timeviper_platform.data.media.probe import probe_media
from timeviper_platform.data.video.reader import read_frames, read_image


def test_an_image_is_one_upright_frame_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    image.save(tmp_path / "clear.png")
    assert (read_image(str(tmp_path / "clear.png"), SIZE).frames == 255).all()
    halves = Image.new("RGB", (40, 20), "red")
    halves.paste("blue", (0, 0, 20, 20))
    exif = halves.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    halves.save(tmp_path / "turned.jpg", exif=exif, quality=100)
    frame = read_frames(str(tmp_path / "turned.jpg"), SIZE)
    assert frame.frames.shape == (1, SIZE, SIZE, 3)
    assert frame.frames[0, 2, 2, 2] > 200 > 60 > frame.frames[0, -3, 2, 2]  # blue above, red below
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "turned.jpg").read_bytes()[:500])
    with pytest.raises(DecodeError, match="corrupt_file"):
        read_image(str(tmp_path / "cut.jpg"), SIZE)


GREY = np.linspace(0, 0xFFFF, SIZE * SIZE).astype(np.uint16).reshape(SIZE, SIZE)


def png16(colour: int, channels: list[np.ndarray], *chunks: bytes) -> bytes:
    """A PNG with 16 bits per channel; `colour` is PNG's colour type."""
    rows = np.stack(channels, -1).astype(">u2")
    header = struct.pack(">IIBBBBB", SIZE, SIZE, 16, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in (b"IHDR" + header, *chunks, b"IDAT" + data, b"IEND")
    )


@pytest.mark.parametrize("name", ["grey", "colours", "grey, opaque", "colours, opaque"])
def test_sixteen_bits_become_their_high_byte(name: str) -> None:
    opaque = np.full_like(GREY, 0xFFFF)
    content = {
        "grey": png16(0, [GREY]),
        "colours": png16(2, [GREY] * 3),
        "grey, opaque": png16(4, [GREY, opaque]),
        "colours, opaque": png16(6, [*([GREY] * 3), opaque]),
    }[name]
    frame = read_frames(content, SIZE).frames[0]
    assert np.array_equal(frame, np.repeat((GREY >> 8)[..., None], 3, axis=2))


def test_a_transparent_grey_of_sixteen_bits_is_white() -> None:
    grey = np.where(GREY > 40_000, 30_000, 20_000).astype(np.uint16)
    frame = read_frames(png16(0, [grey], b"tRNS" + struct.pack(">H", 30_000)), SIZE).frames[0]
    assert np.array_equal(frame[..., 0], np.where(grey == 30_000, 255, 20_000 >> 8))


@pytest.mark.parametrize(
    ("mode", "format"),
    [("L", "PNG"), ("1", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("CMYK", "JPEG"), ("L", "JPEG"), ("P", "BMP")],
)
def test_images_of_every_mode_keep_their_colours(mode: str, format: str) -> None:
    halves = np.zeros((SIZE, SIZE, 3), np.uint8)
    halves[:, SIZE // 2 :] = 255
    content = io.BytesIO()
    Image.fromarray(halves).convert(mode).save(content, format)
    frame = read_frames(content.getvalue(), SIZE).frames[0]
    assert np.abs(frame.astype(int) - halves).mean() < 2


def test_an_animation_gives_its_first_image_and_a_palette_may_have_holes() -> None:
    colours = [Image.new("RGB", (SIZE, SIZE), name) for name in ("red", "blue")]
    content = io.BytesIO()
    colours[0].save(content, "WEBP", save_all=True, append_images=colours[1:], lossless=True)
    assert (read_frames(content.getvalue(), SIZE).frames == [[255, 0, 0]]).all()
    palette = Image.new("P", (SIZE, SIZE), 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    content = io.BytesIO()
    palette.save(content, "PNG", transparency=1)
    assert (read_frames(content.getvalue(), SIZE).frames == 255).all()


def test_pillow_opens_only_the_recognized_formats() -> None:
    content = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE)).save(content, "GIF")
    with pytest.raises(DecodeError, match="unknown_format"):
        read_image(content.getvalue(), SIZE)
    with pytest.raises(DecodeError, match="unknown_format"):
        probe_media(content.getvalue())
