"""Images of every mode, depth and format become upright frames on white."""

from __future__ import annotations

import contextlib
import io
import re
import struct
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, PngImagePlugin

from reference.awkward_videos import SIZE
from reference.heic_files import write_heic
from reference.painted_numbers import painted, read_number
from reference.synthetic_media import make_video
from timeviper_platform.data.media.container import DecodeError, MediaLimits
from timeviper_platform.data.media.probe import probe_media
from timeviper_platform.data.video.pictures import read_image
from timeviper_platform.data.video.reader import read_frames

CASES = Path(__file__).parents[3] / "reference" / "cases" / "pictures"


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


def test_a_png_whose_data_have_another_checksum_is_partial() -> None:
    content = bytearray(png16(0, [GREY]))
    assert read_frames(bytes(content), SIZE).num_damaged == 0
    content[content.index(b"IEND") - 5] ^= 1
    assert read_frames(bytes(content), SIZE).num_damaged == 1


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


def test_a_palette_may_have_holes() -> None:
    palette = Image.new("P", (SIZE, SIZE), 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    assert (read_frames(saved(palette, "PNG", transparency=1), SIZE).frames == 255).all()


def test_pillow_opens_only_the_recognized_formats() -> None:
    for format in ("SGI", "TGA", "PCX", "ICO"):
        content = saved(Image.new("RGB", (SIZE, SIZE)), format)
        with pytest.raises(DecodeError, match="corrupt_file"):
            read_image(content, SIZE)
        with pytest.raises(DecodeError, match="unknown_format"):
            probe_media(content)


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, format, **options)
    return content.getvalue()


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("avif.avif", (160, 120)),
        ("big_icc.png", (160, 120)),
        ("exif_srational_zero.jpg", (120, 160)),  # stored on its side
        ("really_gif.jpg", (160, 120)),
        ("tail_cut_eoi.jpg", (160, 120)),
    ],
)
def test_pictures_that_viewers_show_are_shown(name: str, size: tuple[int, int]) -> None:
    path = str(CASES / name)
    medium = probe_media(path)
    assert (medium.modality, medium.width, medium.height) == ("image", *size)
    batch = read_image(path, 64)
    assert (read_number(batch.frames[0]), batch.num_damaged) == (1234, 0)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"])
def test_every_format_is_read(format: str) -> None:
    content = saved(Image.fromarray(painted(1234)), format)
    medium = probe_media(content)
    assert (medium.modality, medium.width, medium.height) == ("image", 160, 120)
    batch = read_image(content, 64)
    assert (read_number(batch.frames[0]), batch.num_damaged) == (1234, 0)


def test_a_tiff_of_many_pages_is_its_first() -> None:
    pages = [Image.fromarray(painted(number)) for number in (3, 4, 5)]
    content = saved(pages[0], "TIFF", save_all=True, append_images=pages[1:], compression="tiff_lzw")
    assert probe_media(content).modality == "image"
    assert read_number(read_image(content, 64).frames[0]) == 3


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 160, 3)).astype(np.uint8))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 4}])
def test_a_jpeg_without_its_end_marker_is_whole_and_a_shorter_one_is_damaged(options: dict[str, Any]) -> None:
    content = saved(NOISE, "JPEG", **options)
    whole = read_image(content, 64)
    for missing in (1, 2):
        batch = read_image(content[:-missing], 64)
        assert batch.num_damaged == 0
        assert np.array_equal(batch.frames, whole.frames)
    for missing in (4, 20, len(content) // 4, len(content) // 2):
        batch = read_image(content[:-missing], 64)
        assert (len(batch.frames), batch.num_damaged, batch.num_missing) == (1, 1, 0), missing
    if "progressive" not in options:
        half = read_image(content[: len(content) // 2], 64).frames[0]
        assert np.abs(half[:20].astype(int) - whole.frames[0, :20]).max() <= 2
    headers = content[: content.index(b"\xff\xda") + 14]
    with pytest.raises(DecodeError, match="corrupt_file"):
        read_image(headers, 64)


def test_a_progressive_jpeg_that_ends_between_two_scans_is_damaged() -> None:
    content = saved(NOISE, "JPEG", progressive=True)
    scans = [found.start() for found in re.finditer(rb"\xff\xda", content)]
    assert len(scans) > 5
    for start in scans[2:]:
        tables = content.rindex(b"\xff\xc4", 0, start)
        assert read_image(content[:tables], 64).num_damaged == 1
    assert read_image(content[:-2], 64).num_damaged == 0


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "GIF"])
def test_a_cut_picture_keeps_its_decoded_rows(format: str) -> None:
    image = NOISE.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if format == "BMP" else NOISE  # BMP begins below
    content = saved(image, format, **({"interlace": 0} if format == "GIF" else {}))
    whole, cut = read_image(content, 64), read_image(content[: len(content) * 3 // 4], 64)
    assert (whole.num_damaged, cut.num_damaged) == (0, 1)
    rows = slice(24, 64) if format == "BMP" else slice(0, 40)
    assert np.array_equal(cut.frames[0, rows], whole.frames[0, rows])
    assert not np.array_equal(cut.frames, whole.frames)


def png_with(*chunks: tuple[bytes, bytes], at_end: bool = False) -> bytes:
    content = saved(Image.fromarray(painted(77)), "PNG")
    place = content.index(b"IEND" if at_end else b"IDAT") - 4
    inserted = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return content[:place] + inserted + content[place:]


HUGE = zlib.compress(bytes(8 << 20))
"""More than Pillow's limit for a compressed text."""


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize(
    "chunks",
    [
        [(b"iCCP", b"profile\0\0" + HUGE)],
        [(b"iCCP", b"profile\0\7" + HUGE)],
        [(b"iCCP", b"")],
        [(b"zTXt", b"key\0\0" + HUGE)],
        [(b"zTXt", b"key\0\5" + HUGE)],
        [(b"iTXt", b"key\0\1\0\0\0" + HUGE)],
        [(b"tEXt", b"key\0" + bytes(9 << 20))] * 8,
        [(b"gAMA", b"\0")],
        [(b"cHRM", b"")],
        [(b"pHYs", b"\0\0")],
        [(b"sRGB", b"")],
        [(b"acTL", b"\0")],
    ],
    ids=lambda chunks: f"{len(chunks)} {chunks[0][0].decode()}" if isinstance(chunks, list) else None,
)
def test_texts_and_profiles_of_a_png_do_not_matter(chunks: list[tuple[bytes, bytes]], at_end: bool) -> None:
    content = png_with(*chunks, at_end=at_end)
    assert probe_media(content).width == 160
    batch = read_image(content, 64)
    assert (read_number(batch.frames[0]), batch.num_damaged) == (77, 0)


def test_limits_against_bombs_stay() -> None:
    small = saved(Image.new("1", (8, 8)), "PNG")
    header = struct.pack(">II", 20_000, 20_000) + small[24:29]
    bomb = small[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + small[33:]
    for read in (probe_media, lambda content: read_image(content, 64)):
        with pytest.raises(DecodeError, match="too_many_pixels"):
            read(bomb)
    read_image(png_with((b"zTXt", b"key\0\0" + HUGE)), 64)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    assert PngImagePlugin.MAX_TEXT_CHUNK == ImageFile.SAFEBLOCK


def test_a_picture_or_film_of_few_rows_is_rejected(tmp_path: Path) -> None:
    line = saved(Image.new("1", (36_000_000, 1)), "PNG")
    for read in (probe_media, lambda content: read_image(content, 64)):
        with pytest.raises(DecodeError, match=r"too_narrow.*36000000 x 1"):
            read(line)
    make_video(tmp_path / "line.mp4", range(2), size=(4000, 16))
    with pytest.raises(DecodeError, match="too_narrow"):
        probe_media(str(tmp_path / "line.mp4"))
    strip = saved(Image.new("RGB", (20, 4000)), "PNG")
    assert probe_media(strip).height == 4000
    with pytest.raises(DecodeError, match="too_narrow"):
        probe_media(strip, MediaLimits(max_aspect_ratio=100))


@pytest.mark.parametrize("seed", range(40))
def test_a_broken_exif_block_costs_at_most_the_orientation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    exif = bytearray((CASES / "exif_srational_zero.jpg").read_bytes()[30:90])
    for place in rng.integers(0, len(exif), 3):
        exif[place] = rng.integers(256)
    content = saved(Image.fromarray(painted(9, 120, 120)), "JPEG", exif=b"Exif\0\0" + bytes(exif))
    batch = read_image(content, 64)
    assert (len(batch.frames), batch.num_damaged) == (1, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_every_orientation_is_turned_upright(format: str, orientation: int) -> None:
    upright = Image.fromarray(painted(321))
    turned = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)  # the inverse of what viewers do
    stored = upright if turned is None else upright.transpose(Image.Transpose(turned))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert read_number(read_image(saved(stored, format, exif=exif), 64).frames[0]) == 321


@pytest.mark.parametrize("mode", ["F", "I", "I;16", "I;16B", "CMYK", "YCbCr", "LAB", "1", "L", "LA", "P", "RGBA"])
def test_tiffs_of_every_mode_are_read(mode: str) -> None:
    grey = painted(99)[..., 0]
    images = {
        "F": lambda: Image.fromarray(grey.astype(np.float32) / 255),
        "I": lambda: Image.fromarray(grey.astype(np.int32) * 257),
        "I;16": lambda: Image.fromarray(grey.astype(np.uint16) * 257),
        "I;16B": lambda: Image.fromarray((grey.astype(np.uint16) * 257).astype(">u2")),
        "LAB": lambda: ImageCms.profileToProfile(
            Image.fromarray(painted(99)), *map(ImageCms.createProfile, ("sRGB", "LAB")), outputMode="LAB"
        ),
    }
    image = images[mode]() if mode in images else Image.fromarray(painted(99)).convert(mode)
    batch = read_image(saved(image, "TIFF"), 64)
    assert (read_number(batch.frames[0]), batch.num_damaged) == (99, 0)


def animation(format: str) -> bytes:
    frames = [NOISE.resize((40, 30)).rotate(k) for k in range(4)]
    return saved(frames[0], format, save_all=True, append_images=frames[1:], duration=500)


def flipped(content: bytes, rng: np.random.Generator) -> bytes:
    """The content with drawn bytes flipped, cut or repeated."""
    broken = bytearray(content)
    for place in rng.integers(0, len(broken), rng.integers(1, 12)) ** 2 // len(broken):  # headers more often
        broken[place] = rng.integers(256)
    if rng.random() < 0.3:
        del broken[rng.integers(len(broken)) :]
    return bytes(broken)


FUZZED = {
    "jpeg": lambda: saved(NOISE.resize((40, 30)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"),
    "progressive": lambda: saved(NOISE.resize((40, 30)), "JPEG", progressive=True),
    "png": lambda: saved(NOISE.resize((40, 30)).quantize(16), "PNG", transparency=3),
    "bmp": lambda: saved(NOISE.resize((40, 30)), "BMP"),
    "gif": lambda: saved(NOISE.resize((40, 30)), "GIF"),
    "webp": lambda: saved(NOISE.resize((40, 30)), "WEBP"),
    "avif": lambda: saved(NOISE.resize((40, 30)), "AVIF"),
    "tiff": lambda: saved(NOISE.resize((40, 30)), "TIFF", compression="tiff_lzw"),
    "jpeg2000": lambda: saved(NOISE.resize((40, 30)), "JPEG2000"),
    "ppm": lambda: saved(NOISE.resize((40, 30)), "PPM"),
    "heic": lambda: write_heic(np.asarray(NOISE.resize((64, 64))), tile=32),
    **{f"animated {name}": partial(animation, name) for name in ("GIF", "PNG", "WEBP", "AVIF")},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", FUZZED)
def test_a_broken_picture_is_a_picture_or_a_reject(name: str) -> None:
    content = FUZZED[name]()
    rng = np.random.default_rng(1)
    for _ in range(25):
        with contextlib.suppress(DecodeError):
            read_frames(flipped(content, rng), 16, limits=MediaLimits(max_pixels=10**6))


@pytest.mark.parametrize(
    ("tile", "turns", "flip", "version"),
    [(None, 0, None, 0), (None, 3, None, 1), (None, 2, 1, 0), (64, 0, None, 0), (64, 1, 0, 1)],
)
def test_heic_pictures_are_put_together_and_turned_upright(
    tile: int | None, turns: int, flip: int | None, version: int
) -> None:
    stored = painted(1234)
    if flip is not None:  # the inverse of what viewers do, in reverse
        stored = np.flip(stored, axis=flip)
    stored = np.rot90(stored, -turns)
    content = write_heic(stored, tile=tile, turns=turns, flip=flip, version=version)
    medium = probe_media(content)
    assert (medium.modality, medium.codec, medium.height, medium.width) == ("image", "heic", *stored.shape[:2])
    batch = read_image(content, 64)
    assert (read_number(batch.frames[0]), batch.num_damaged) == (1234, 0)
    with pytest.raises(DecodeError, match="corrupt_file"):
        read_image(content[:-200], 64)
