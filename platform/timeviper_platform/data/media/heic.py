"""Reads HEIC pictures (ISO/IEC 23008-12): single HEVC images and grids of tiles, as phones write them.

FFmpeg decodes the tiles; PyAV has no way to make it assemble them.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import av
import numpy as np
from PIL import Image

MAX_TILES = 4096

_TURNS = {1: Image.Transpose.ROTATE_90, 2: Image.Transpose.ROTATE_180, 3: Image.Transpose.ROTATE_270}
"""By `irot`: quarter turns, counterclockwise."""

_FLIPS = {0: Image.Transpose.FLIP_TOP_BOTTOM, 1: Image.Transpose.FLIP_LEFT_RIGHT}
"""By `imir`: which parts are exchanged."""


class _Box(NamedTuple):
    kind: bytes
    content: bytes


class HeicPicture:
    """The primary picture of a HEIC file. Damage raises ValueError, LookupError, struct.error or an error of FFmpeg."""

    def __init__(self, file: Any) -> None:
        file.seek(0)
        self._content = bytes(file.read())
        boxes = {box.kind: box.content for box in _boxes(self._content)}
        self._meta = {box.kind: box.content for box in _boxes(boxes[b"meta"][4:])}
        self._primary = _number(self._meta[b"pitm"][4:], 0, 4 if self._meta[b"pitm"][0] else 2)
        self._kinds = dict(self._items())
        self._places = dict(self._locations())
        properties = {box.kind: box.content for box in _boxes(self._meta[b"iprp"])}
        self._properties = list(_boxes(properties[b"ipco"]))
        self._associated = dict(_associations(properties[b"ipma"]))
        self.width, self.height = struct.unpack_from(">II", self._property(self._primary, b"ispe"), 4)

    def load(self, check: Callable[[int, int], None]) -> Image.Image:
        """Decodes it, upright.

        Args:
            check: raises for a width and height over the limits.
        """
        check(self.width, self.height)
        is_grid = self._kinds[self._primary] == b"grid"
        image = self._grid(check) if is_grid else self._tile(self._primary, check)
        for index in self._associated[self._primary]:
            kind, content = self._properties[index]
            method = {b"irot": _TURNS, b"imir": _FLIPS}.get(kind, {}).get(content[0] & 3 if content else -1)
            image = image if method is None else image.transpose(method)
        return image

    def _grid(self, check: Callable[[int, int], None]) -> Image.Image:
        data = self._data(self._primary)
        rows, columns = data[2] + 1, data[3] + 1
        width, height = struct.unpack_from(">II" if data[1] & 1 else ">HH", data, 4)
        check(width, height)
        tiles = self._references(b"dimg")[self._primary]
        if len(tiles) != rows * columns or len(tiles) > MAX_TILES:
            raise ValueError(f"a grid of {rows} x {columns} has {len(tiles)} tiles")
        image = Image.new("RGB", (width, height))
        for number, item in enumerate(tiles):
            tile = self._tile(item, check)
            image.paste(tile, (number % columns * tile.width, number // columns * tile.height))
        return image

    def _tile(self, item: int, check: Callable[[int, int], None]) -> Image.Image:
        if self._kinds[item] != b"hvc1":
            raise ValueError(f"an item of type {self._kinds[item]!r} is not HEVC")
        check(*struct.unpack_from(">II", self._property(item, b"ispe"), 4))
        context: Any = av.CodecContext.create("hevc", "r")
        context.extradata = self._property(item, b"hvcC")
        context.thread_type = "NONE"
        frames = [*context.decode(av.Packet(self._data(item))), *context.decode(None)]
        check(frames[0].width, frames[0].height)
        return Image.fromarray(np.asarray(frames[0].to_ndarray(format="rgb24")))

    def _data(self, item: int) -> bytes:
        is_inside, places = self._places[item]
        source = self._meta[b"idat"] if is_inside else self._content
        return b"".join(source[offset : offset + length] for offset, length in places)

    def _property(self, item: int, kind: bytes) -> bytes:
        found = (self._properties[index] for index in self._associated[item])
        return next((box.content for box in found if box.kind == kind), b"")

    def _items(self) -> Iterator[tuple[int, bytes]]:
        content = self._meta[b"iinf"]
        for box in _boxes(content[8 if content[0] else 6 :]):
            size = 4 if box.content[0] > 2 else 2
            yield _number(box.content, 4, size), box.content[6 + size : 10 + size]

    def _locations(self) -> Iterator[tuple[int, tuple[bool, list[tuple[int, int]]]]]:
        file = io.BytesIO(self._meta[b"iloc"])
        version = _read(file, 4) >> 24
        sizes = _read(file, 2)
        offset_size, length_size, base_size, index_size = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
        id_size = 2 if version < 2 else 4
        for _ in range(_read(file, id_size)):
            item = _read(file, id_size)
            method = _read(file, 2) & 15 if version else 0
            _read(file, 2)  # which file: this one
            base = _read(file, base_size)
            places = []
            for _ in range(_read(file, 2)):
                _read(file, index_size if version else 0)
                places.append((base + _read(file, offset_size), _read(file, length_size)))
            yield item, (method == 1, places)

    def _references(self, kind: bytes) -> dict[int, list[int]]:
        content = self._meta[b"iref"]
        size = 4 if content[0] else 2
        return {
            _number(box.content, 0, size): [
                _number(box.content, size + 2 + size * k, size) for k in range(_number(box.content, size, 2))
            ]
            for box in _boxes(content[4:])
            if box.kind == kind
        }


def _associations(content: bytes) -> Iterator[tuple[int, list[int]]]:
    """Yields items with the indices of their properties."""
    file = io.BytesIO(content)
    version_and_flags = _read(file, 4)
    id_size, is_wide = (4 if version_and_flags >> 24 else 2), bool(version_and_flags & 1)
    for _ in range(_read(file, 4)):
        item = _read(file, id_size)
        numbers = [_read(file, 2) & 0x7FFF if is_wide else _read(file, 1) & 0x7F for _ in range(_read(file, 1))]
        yield item, [number - 1 for number in numbers if number]


def _boxes(content: bytes) -> Iterator[_Box]:
    start = 0
    while start + 8 <= len(content):
        size, kind = struct.unpack_from(">I4s", content, start)
        header = 8
        if size == 1:
            size, header = _number(content, start + 8, 8), 16
        end = start + size if size else len(content)
        if end < start + header:
            return
        yield _Box(kind, content[start + header : end])
        start = end


def _number(content: bytes, offset: int, size: int) -> int:
    if offset + size > len(content):
        raise ValueError("a box ends early")
    return int.from_bytes(content[offset : offset + size], "big")


def _read(file: io.BytesIO, size: int) -> int:
    return _number(file.read(size), 0, size)
