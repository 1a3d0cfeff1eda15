"""Opens and decodes pictures with Pillow, and repairs broken ones that viewers still show.

Pillow's own switch for broken files, LOAD_TRUNCATED_IMAGES, is global and lifts its limits for compressed text.
"""

from __future__ import annotations

import io
import logging
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from PIL import AvifImagePlugin, Image, UnidentifiedImageError

from timeviper_platform.data.media.container import IMAGE_FORMATS, DecodeError
from timeviper_platform.data.media.heic import HeicPicture
from timeviper_platform.data.media.signatures import HEAD_BYTES, is_heic

logger = logging.getLogger(__name__)

AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # like all decoders here: workers share the cores

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

_SHOWN_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"eXIf", b"IEND")
"""Chunks that a still picture needs."""

_START_OF_FRAME, _START_OF_SCAN = (0xC0, 0xC1, 0xC2), 0xDA
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_END_OF_JPEG = b"\xff\xd9"
_FILLERS = tuple(bytes([pattern]) * 64 for pattern in (0x00, 0x24, 0x49, 0x6D, 0x92, 0xB6, 0xDB, 0xFE))
"""Bytes that begin with each pattern of three bits; where data are missing, some decode to different coefficients."""


class PictureError(Exception):
    """A picture of which nothing decodes."""


class PictureHeader(NamedTuple):
    codec: str
    width: int
    height: int


class LoadedPicture(NamedTuple):
    image: Image.Image
    """Of any mode, upright unless EXIF says otherwise."""
    is_damaged: bool
    """True when a part of the picture is missing."""


class _Segment(NamedTuple):
    marker: int
    data: bytes
    end: int
    """Offset of what follows."""


class Chunk(NamedTuple):
    """A chunk of a PNG: `length` bytes of content at `offset`."""

    kind: bytes
    offset: int
    length: int


@contextmanager
def picture_errors() -> Iterator[None]:
    """Converts whatever Pillow raises for a broken picture. Errors of storage, memory and limits pass."""
    try:
        yield
    except (DecodeError, MemoryError, Image.DecompressionBombError):
        raise
    except UnidentifiedImageError as error:  # its text names a Python object
        raise PictureError("its headers are damaged, or of a kind that Pillow does not read") from error
    except OSError as error:
        if error.errno:
            raise
        raise PictureError(str(error)) from error
    except Exception as error:  # damaged files raise many types in Pillow
        raise PictureError(f"{type(error).__name__}: {error}") from error


def open_picture(file: Any) -> Image.Image:
    """Opens a picture by its headers. Raises PictureError."""
    with picture_errors():
        try:
            return Image.open(file, formats=IMAGE_FORMATS)
        except (ValueError, SyntaxError, OSError) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            shown = without_text(file)
            if shown is None:
                raise
            return Image.open(shown, formats=("PNG",))


def read_header(file: Any) -> PictureHeader:
    """Raises PictureError."""
    file.seek(0)
    if is_heic(file.read(HEAD_BYTES)):
        with picture_errors():
            picture = HeicPicture(file)
            return PictureHeader("heic", picture.width, picture.height)
    file.seek(0)
    image = open_picture(file)
    return PictureHeader((image.format or "").lower(), image.width, image.height)


def load_picture(file: Any, check: Callable[[int, int], None]) -> LoadedPicture:
    """Decodes a picture, or the part of it that decodes.

    Args:
        check: raises for a width and height over the limits, before anything is decoded.

    Raises:
        PictureError: when nothing decodes.
    """
    file.seek(0)
    if is_heic(file.read(HEAD_BYTES)):
        with picture_errors():
            return LoadedPicture(HeicPicture(file).load(check), False)
    is_faulty = has_wrong_checksum(file)
    file.seek(0)
    image = open_picture(file)
    check(*image.size)
    with picture_errors():
        fault = _load(image)
        if fault is None:
            return LoadedPicture(image, is_faulty)
        logger.debug("a picture does not decode whole: %s", fault)
        repaired = _without_text(file, image) or _with_end(file, image)
        if repaired is not None and not repaired.is_damaged:
            return repaired
        found = repaired or LoadedPicture(_decoded_part(image, fault), True)
        pixels = np.asarray(found.image)
        if (pixels == pixels[:1, :1]).all():
            raise fault
        return found


def png_chunks(file: Any) -> Iterator[Chunk]:
    """Yields the chunks of a PNG up to IEND, a break or the end. The last may be longer than the file."""
    file.seek(len(PNG_SIGNATURE))
    while len(header := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        if not kind.isalpha():
            return
        offset = file.tell()
        yield Chunk(kind, offset, length)
        if kind == b"IEND":
            return
        file.seek(offset + length + 4)


def has_wrong_checksum(file: Any) -> bool:
    """Returns whether the data of a PNG's picture are damaged, which Pillow does not check. False for other formats."""
    file.seek(0)
    if file.read(len(PNG_SIGNATURE)) != PNG_SIGNATURE:
        return False
    for chunk in png_chunks(file):
        if chunk.kind in (b"IDAT", b"fdAT"):
            file.seek(chunk.offset)
            checksum, left = zlib.crc32(chunk.kind), chunk.length
            while left and (part := file.read(min(left, 1 << 20))):
                checksum, left = zlib.crc32(part, checksum), left - len(part)
            if file.read(4) != checksum.to_bytes(4, "big"):
                return True
    return False


def without_text(file: Any) -> io.BytesIO | None:
    """Returns a PNG without texts, profiles and animation, or None for another format."""
    file.seek(0)
    if file.read(8) != PNG_SIGNATURE:
        return None
    shown = io.BytesIO()
    shown.write(PNG_SIGNATURE)
    for chunk in png_chunks(file):
        if chunk.kind in _SHOWN_CHUNKS:
            file.seek(chunk.offset - 8)
            shown.write(file.read(chunk.length + 12))
    shown.seek(0)
    return shown


def _load(image: Image.Image) -> Exception | None:
    """Decodes in place. Returns the error of a broken picture."""
    try:
        image.load()
    except (DecodeError, MemoryError, Image.DecompressionBombError):
        raise
    except Exception as error:  # as above
        if isinstance(error, OSError) and error.errno:
            raise
        return error
    return None


def _decoded_part(image: Image.Image, fault: Exception) -> Image.Image:
    """Returns the image with the rows that were decoded before `fault`. Pillow keeps them."""
    if hasattr(image, "tile"):
        image.tile = []  # nothing is left to decode
    if _load(image) is not None:
        raise fault
    return image


def _without_text(file: Any, image: Image.Image) -> LoadedPicture | None:
    if image.format != "PNG" or (shown := without_text(file)) is None:
        return None
    plain = Image.open(shown, formats=("PNG",))
    fault = _load(plain)
    return LoadedPicture(plain if fault is None else _decoded_part(plain, fault), fault is not None)


def _with_end(file: Any, image: Image.Image) -> LoadedPicture | None:
    """Decodes a JPEG that lacks its end marker. It is whole if appending bytes changes no pixel."""
    if image.format not in ("JPEG", "MPO"):
        return None
    file.seek(0)
    content = file.read().rstrip(b"\xff")
    scans = [segment for segment in _jpeg_segments(content) if segment.marker == _START_OF_SCAN]
    shown = _jpeg(content + _END_OF_JPEG)
    if shown is None or not scans:
        return None
    if np.array_equal(np.asarray(shown), np.asarray(_jpeg(content[: scans[0].end] + _END_OF_JPEG))):
        return None  # nothing follows the headers
    restarts = [b"\xff" + bytes([0xD0 + number]) for number in range(8)]
    endings = (filler + b"".join(restart + filler for restart in restarts) + _END_OF_JPEG for filler in _FILLERS)
    others = (_jpeg(content + ending) for ending in endings)
    is_whole = _has_all_scans(content) and all(
        other is not None and np.array_equal(np.asarray(shown), np.asarray(other)) for other in others
    )
    return LoadedPicture(shown, not is_whole)


def _jpeg_segments(content: bytes) -> Iterator[_Segment]:
    place = 2
    while place + 4 <= len(content):
        end = place + 2 + int.from_bytes(content[place + 2 : place + 4], "big")
        yield _Segment(content[place + 1], content[place + 4 : end], end)
        following = _MARKER.search(content, end)  # after a scan's header: past its data
        place = following.start() if following else len(content)


def _has_all_scans(content: bytes) -> bool:
    """Returns whether the scans hold every coefficient at full precision (ITU-T T.81, B.2.3 and G.1.1.1)."""
    components = b""
    missing_bits: dict[tuple[int, int], int] = {}  # by component and coefficient
    for marker, data, _ in _jpeg_segments(content):
        if marker in _START_OF_FRAME:
            components = data[6 : 6 + 3 * data[5] : 3]
        elif marker == _START_OF_SCAN:
            first, last, bits = data[1 + 2 * data[0] :]
            missing_bits |= {(name, k): bits & 15 for name in data[1 : 2 * data[0] : 2] for k in range(first, last + 1)}
    return all(missing_bits.get((name, k)) == 0 for name in components for k in range(64))


def _jpeg(content: bytes) -> Image.Image | None:
    image = Image.open(io.BytesIO(content), formats=("JPEG",))
    return image if _load(image) is None else None
