"""Writes GIF, APNG and WebP animations frame by frame, and composes them slowly with NumPy."""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

CANVAS = 16
"""Side of the canvas in pixels."""


@dataclass(frozen=True, kw_only=True)
class Patch:
    """A frame: `pixels` (h, w, 4) uint8 drawn at (x, y)."""

    pixels: np.ndarray
    x: int = 0
    y: int = 0
    milliseconds: int = 100
    disposal: str = "keep"
    is_blended: bool = True

    @property
    def box(self) -> tuple[slice, slice]:
        height, width = self.pixels.shape[:2]
        return slice(self.y, self.y + height), slice(self.x, self.x + width)


def drawn_patches(seed: int, count: int, *, is_binary: bool, disposals: Sequence[str]) -> list[Patch]:
    """`count` frames at drawn places, of drawn colours and transparency (`is_binary`: all or nothing)."""
    rng = np.random.default_rng(seed)
    patches = []
    for number in range(count):
        x, y = 2 * rng.integers(0, CANVAS // 4, 2) * (number % 3 > 0)  # WebP places frames at even pixels
        width, height = rng.integers(2, CANVAS - max(x, y) + 1, 2) if number % 3 else (CANVAS, CANVAS)
        pixels = (51 * rng.integers(0, 6, (height, width, 4))).astype(np.uint8)  # few enough colours for GIF
        if is_binary:
            pixels[..., 3] = np.where(pixels[..., 3] > 100, 255, 0)
        if number % 4 == 3:
            pixels[..., 3] = 255
        disposal, is_blended = disposals[rng.integers(len(disposals))], bool(rng.integers(2)) or is_binary
        patches.append(Patch(pixels=pixels, x=int(x), y=int(y), disposal=disposal, is_blended=is_blended))
    return patches


def composed(patches: Sequence[Patch]) -> np.ndarray:
    """(F, CANVAS, CANVAS, 3) uint8: each frame as shown, on white."""
    canvas = np.zeros((CANVAS, CANVAS, 4))
    shown = []
    for patch in patches:
        before = canvas.copy()
        source, target = patch.pixels / 255, canvas[patch.box]
        if patch.is_blended:
            alpha = source[..., 3:] + target[..., 3:] * (1 - source[..., 3:])
            colour = source[..., :3] * source[..., 3:] + target[..., :3] * target[..., 3:] * (1 - source[..., 3:])
            source = np.concatenate([np.divide(colour, alpha, out=np.zeros_like(colour), where=alpha > 0), alpha], -1)
        canvas[patch.box] = source
        shown.append(canvas[..., :3] * canvas[..., 3:] + 1 - canvas[..., 3:])
        if patch.disposal == "clear":
            canvas[patch.box] = 0
        elif patch.disposal == "restore":
            canvas = before
    return (np.stack(shown) * 255).round().astype(np.uint8)


def write_gif(patches: Sequence[Patch], *, background: int = 7) -> bytes:
    """Each frame has its own palette, whose last colour is transparent."""
    parts = [b"GIF89a" + struct.pack("<HHBBB", CANVAS, CANVAS, 0xF7, background, 0), bytes(range(256)) * 3]
    for patch in patches:
        height, width = patch.pixels.shape[:2]
        colours, indices = np.unique(patch.pixels[..., :3].reshape(-1, 3), axis=0, return_inverse=True)
        assert len(colours) < 256, "too many colours for a GIF frame"
        indices = np.where(patch.pixels[..., 3].reshape(-1) == 0, 255, indices.reshape(-1))
        is_transparent = bool((indices == 255).any())
        flags = {"keep": 1, "clear": 2, "restore": 3}[patch.disposal] << 2 | is_transparent
        parts.append(b"\x21\xf9\x04" + struct.pack("<BHBB", flags, patch.milliseconds // 10, 255, 0))
        parts.append(b"," + struct.pack("<HHHHB", patch.x, patch.y, width, height, 0x87))
        parts.append(colours.astype(np.uint8).tobytes().ljust(768, b"\0") + b"\x08" + _blocks(_lzw(indices.tolist())))
    return b"".join(parts) + b";"


def write_apng(patches: Sequence[Patch], mode: str = "RGBA") -> bytes:
    number = itertools.count()
    parts = [b"\x89PNG\r\n\x1a\n", _png_chunks(Image.new(mode, (CANVAS, CANVAS)))[b"IHDR"]]
    parts.append(_chunk(b"acTL", struct.pack(">II", len(patches), 0)))
    for index, patch in enumerate(patches):
        height, width = patch.pixels.shape[:2]
        disposal = {"keep": 0, "clear": 1, "restore": 2}[patch.disposal]
        values = next(number), width, height, patch.x, patch.y, patch.milliseconds, 1000, disposal, patch.is_blended
        parts.append(_chunk(b"fcTL", struct.pack(">IIIIIHHBB", *values)))
        data = _png_chunks(Image.fromarray(patch.pixels).convert(mode))[b"IDAT"][8:-4]
        parts.append(_chunk(b"fdAT", struct.pack(">I", next(number)) + data) if index else _chunk(b"IDAT", data))
    return b"".join([*parts, _chunk(b"IEND", b"")])


def write_webp(patches: Sequence[Patch]) -> bytes:
    size = (CANVAS - 1).to_bytes(3, "little")
    parts = [b"WEBP", b"VP8X" + struct.pack("<I", 10) + b"\x12\0\0\0" + size + size, b"ANIM\x06\0\0\0" + bytes(6)]
    for patch in patches:
        height, width = patch.pixels.shape[:2]
        content = io.BytesIO()
        Image.fromarray(patch.pixels).save(content, "WEBP", lossless=True, exact=True)
        values = patch.x // 2, patch.y // 2, width - 1, height - 1, patch.milliseconds
        flags = (patch.disposal == "clear") | (not patch.is_blended) << 1
        data = b"".join(value.to_bytes(3, "little") for value in values) + bytes([flags]) + content.getvalue()[12:]
        parts.append(b"ANMF" + struct.pack("<I", len(data)) + data)
    body = b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _lzw(indices: Sequence[int]) -> bytes:
    """Nine-bit codes that never grow: the table is cleared before it is full."""
    codes = []
    for number, index in enumerate(indices):
        codes += ([256] if number % 250 == 0 else []) + [index]
    bits = sum(code << 9 * place for place, code in enumerate([*codes, 257]))
    return bits.to_bytes(9 * (len(codes) + 1) // 8 + 1, "little")


def _blocks(data: bytes) -> bytes:
    return b"".join(bytes([len(part)]) + part for part in (data[k : k + 255] for k in range(0, len(data), 255))) + b"\0"


def _png_chunks(image: Image.Image) -> dict[bytes, bytes]:
    content = io.BytesIO()
    image.save(content, "PNG")
    data, chunks, at = content.getvalue(), {}, 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big") + 12
        chunks[data[at + 4 : at + 8]] = data[at : at + length]
        at += length
    return chunks


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
