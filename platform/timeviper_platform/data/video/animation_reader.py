"""Samples animated GIF, APNG, WebP and AVIF, composed as browsers show them, on white.

Pillow decodes each frame but does not draw it: it differs from browsers in GIFs that clear to transparency or mix
disposals, and in translucent APNGs. Holds one canvas, whatever the number of frames.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from timeviper_platform.data.media.animations import Animation, AnimationFrame, scan_animation
from timeviper_platform.data.media.container import (
    DecodeError,
    ErrorType,
    MediaFile,
    MediaLimits,
    check_size,
    decode_errors,
    source_name,
)
from timeviper_platform.data.media.pictures import (
    PNG_SIGNATURE,
    PictureError,
    has_wrong_checksum,
    load_picture,
    open_picture,
    picture_errors,
    png_chunks,
)
from timeviper_platform.data.video.frames import FrameBatch, Resample
from timeviper_platform.data.video.pictures import on_white, scaled, with_8_bits


class AnimationReader:
    """VideoReader of an animation. Seeks back to the last frame that covers all before it."""

    def __init__(
        self,
        source: str | bytes,
        image_size: int,
        *,
        limits: MediaLimits | None = None,
        resample: Resample = "bicubic",
        file: MediaFile | None = None,
    ) -> None:
        """Raises DecodeError when the file holds no animation."""
        limits = limits or MediaLimits()
        self._source, self._limits, self._image_size, self._resample = source, limits, image_size, resample
        self._shown: tuple[int, np.ndarray] | None = None
        name = source_name(source)
        check = partial(check_size, limits=limits, stage="decode_video", name=name)
        with decode_errors("decode_video", source, limits):
            file = file or MediaFile(source, limits)
            self._file = file.open()
            animation = scan_animation(self._file, file.head)
            if animation is None:
                raise DecodeError("decode_video", ErrorType.NO_VIDEO_STREAM, f"{name}: a still picture, not a video")
            check(animation.width, animation.height)
            self._animation = animation
            kind = _AvifCanvas if animation.format == "avif" else _Canvas
            self._canvas = kind(self._file, animation, limits)

    def sample(self, times: Sequence[Fraction]) -> FrameBatch:
        if list(times) != sorted(times):
            raise ValueError("sampling times must ascend")
        kept: list[tuple[Fraction, int, np.ndarray]] = []
        num_missing = num_damaged = 0
        with decode_errors("decode_video", self._source, self._limits):
            for t in times:
                index = self._animation.index_at(t)
                pixels = None if index == len(self._animation.frames) else self._pixels(index)
                if pixels is None:
                    num_missing += 1
                    continue
                kept.append((t, index, pixels))
                num_damaged += self._canvas.is_damaged
        size = self._image_size
        return FrameBatch(
            np.stack([pixels for _, _, pixels in kept]) if kept else np.empty((0, size, size, 3), np.uint8),
            np.array([float(self._animation.start(index)) for _, index, _ in kept]),
            np.array([float(t) for t, _, _ in kept]),
            num_missing,
            num_damaged,
        )

    def close(self) -> None:
        self._file.close()

    def _pixels(self, index: int) -> np.ndarray | None:
        if self._shown is None or self._shown[0] != index:
            image = self._canvas.show(index)
            if image is None:
                return None
            self._shown = index, scaled(on_white(image), self._image_size, self._resample)
        return self._shown[1]


class _Canvas:
    """Draws the frames of a GIF, APNG or WebP in order."""

    def __init__(self, file: Any, animation: Animation, limits: MediaLimits) -> None:
        self._file, self._animation, self._limits = file, animation, limits
        self._frame_file = {"gif": self._gif, "apng": self._png, "webp": self._webp}[animation.format]
        self._image = Image.new("RGBA", (animation.width, animation.height))
        self._index = -1
        self._replaced: Image.Image | None = None
        self._is_empty = True
        self.is_damaged = False
        """True when a part of the shown picture does not decode."""

    def show(self, index: int) -> Image.Image | None:
        """Returns the RGBA canvas while frame `index` is on screen, or None if nothing was drawn yet."""
        if index < self._index:
            self._index = -1
        first = next((i for i in range(index, self._index, -1) if self._covers_all(i)), 0)
        if first > self._index + 1 or self._index < 0:
            self._clear()
            self._index = first - 1
        while self._index < index:
            self._dispose()
            self._index += 1
            self._draw(self._animation.frames[self._index])
        return None if self._is_empty else self._image

    def _clear(self) -> None:
        self._image = Image.new("RGBA", self._image.size)
        self._replaced = None
        self._is_empty, self.is_damaged = True, False

    def _covers_all(self, index: int) -> bool:
        """Returns whether frame `index` hides everything drawn before it."""
        if index == 0:
            return True
        before, frame = self._animation.frames[index - 1 : index + 1]
        if before.disposal == "clear" and self._fills(before):
            return True
        is_opaque = not frame.is_blended or (self._animation.format == "gif" and not frame.control[0] & 1)
        return is_opaque and self._fills(frame) and frame.disposal != "restore" and not frame.is_cut

    def _fills(self, frame: AnimationFrame) -> bool:
        return _inside(frame.box, self._image.size) == (0, 0, *self._image.size)

    def _dispose(self) -> None:
        if self._index < 0:
            return
        frame = self._animation.frames[self._index]
        if frame.disposal == "clear":
            self._image.paste((0, 0, 0, 0), _inside(frame.box, self._image.size))
        elif self._replaced is not None:
            self._image.paste(self._replaced, _inside(frame.box, self._image.size))
        self._replaced = None

    def _draw(self, frame: AnimationFrame) -> None:
        if self._covers_all(self._index):
            self.is_damaged = False
        if frame.disposal == "restore":
            self._replaced = self._image.crop(_inside(frame.box, self._image.size))
        try:
            if frame.width * frame.height > self._limits.max_pixels:
                raise PictureError("the frame is over limits.max_pixels")
            loaded = load_picture(self._frame_file(frame), lambda *_: None)
            with picture_errors():
                image = with_8_bits(loaded.image).convert("RGBA")
                if frame.is_blended:
                    image = Image.alpha_composite(self._image.crop(frame.box), image)
                self._image.paste(image, frame.box)
        except PictureError:
            self.is_damaged = True
            return
        self._is_empty = False
        self.is_damaged |= loaded.is_damaged or frame.is_cut or self._is_faulty(frame)

    def _is_faulty(self, frame: AnimationFrame) -> bool:
        """Returns whether a frame breaks its format: only GIF's may exceed the canvas."""
        if self._animation.format == "gif":
            return False
        is_outside = _inside(frame.box, self._image.size) != frame.box
        is_png = self._animation.format == "apng"
        return is_outside or (is_png and has_wrong_checksum(io.BytesIO(PNG_SIGNATURE + self._read(frame))))

    def _read(self, frame: AnimationFrame) -> bytes:
        self._file.seek(frame.offset)
        return bytes(self._file.read(frame.end - frame.offset))

    def _gif(self, frame: AnimationFrame) -> io.BytesIO:
        data, header = self._read(frame), self._animation.header
        screen = header[:6] + struct.pack("<HH", frame.width, frame.height) + header[10:]
        control = b"\x21\xf9\x04" + bytes([frame.control[0] & 1]) + frame.control[1:] + b"\0"
        return io.BytesIO(screen + control + b"," + bytes(4) + data[4:] + b";" * (not frame.is_cut))

    def _png(self, frame: AnimationFrame) -> io.BytesIO:
        header = self._animation.header
        size = struct.pack(">II", frame.width, frame.height) + header[16:21]
        data = PNG_SIGNATURE + self._read(frame)
        file = io.BytesIO(data)
        content = b"".join(
            data[chunk.offset + (4 if chunk.kind == b"fdAT" else 0) : chunk.offset + chunk.length]  # less its number
            for chunk in png_chunks(file)
            if chunk.kind in (b"IDAT", b"fdAT")
        )
        chunks = _chunk(b"IHDR", size), header[25:], _chunk(b"IDAT", content), _chunk(b"IEND", b"")
        return io.BytesIO(PNG_SIGNATURE + b"".join(chunks))

    def _webp(self, frame: AnimationFrame) -> io.BytesIO:
        data = self._read(frame)
        size = b"".join((value - 1).to_bytes(3, "little") for value in (frame.width, frame.height))
        flags = b"\x10\0\0\0" if data.startswith(b"ALPH") else bytes(4)
        data = b"VP8X" + struct.pack("<I", 10) + flags + size + data
        return io.BytesIO(b"RIFF" + struct.pack("<I", len(data) + 4) + b"WEBP" + data)


class _AvifCanvas:
    """Frames of an AVIF sequence, which libavif decodes from the last keyframe on."""

    def __init__(self, file: Any, animation: Animation, limits: MediaLimits) -> None:
        file.seek(0)
        try:
            self._image = open_picture(file)
        except PictureError as error:
            raise DecodeError("decode_video", ErrorType.CORRUPT_FILE, str(error)) from error
        check_size(*self._image.size, limits, "decode_video", "the sequence")
        self.is_damaged = False

    def show(self, index: int) -> Image.Image | None:
        try:
            with picture_errors():
                self._image.seek(index)
                self._image.load()
                return self._image
        except PictureError:
            return None


def _inside(box: tuple[int, int, int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    width, height = size
    return min(box[0], width), min(box[1], height), min(box[2], width), min(box[3], height)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
