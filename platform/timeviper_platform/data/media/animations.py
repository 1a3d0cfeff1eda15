"""Lists the frames of animated GIF, APNG, WebP and AVIF files without decoding them.

Frames last as in browsers: a duration of at most 10 ms, which old GIFs use for "as fast as possible", plays as 100 ms.

    GIF   https://www.w3.org/Graphics/GIF/spec-gif89a.txt
    APNG  https://www.w3.org/TR/png-3/#apng-frame-based-animation
    WebP  https://developers.google.com/speed/webp/docs/riff_container
    AVIF  image sequences: tracks of an ISO base media file, listed by FFmpeg
"""

from __future__ import annotations

import io
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import accumulate
from typing import Any, Literal

import av

from timeviper_platform.data.media.pictures import png_chunks
from timeviper_platform.data.media.signatures import is_animated_webp, is_avif_sequence, is_gif, is_png

AnimationFormat = Literal["gif", "apng", "webp", "avif"]

MIN_SECONDS = Fraction(10, 1000)
"""Longest frame that is played for DEFAULT_SECONDS instead, as in Firefox, Chrome and Safari."""
DEFAULT_SECONDS = Fraction(100, 1000)

_GIF_DISPOSALS = {2: "clear", 3: "restore"}
_APNG_DISPOSALS = {1: "clear", 2: "restore"}


@dataclass(frozen=True, kw_only=True, slots=True)
class AnimationFrame:
    """A rectangle to draw on the canvas."""

    seconds: Fraction
    box: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Left, top, right and bottom; may exceed the canvas."""
    disposal: str = "keep"
    """What happens to the rectangle before the next frame: keep, clear to transparency, or restore what was there."""
    is_blended: bool = False
    """True = drawn over the canvas; False = replaces the rectangle, with its transparency."""
    offset: int = 0
    """Start of the frame's data in the file."""
    end: int = 0
    control: bytes = b""
    """GIF: the graphic control extension."""
    is_cut: bool = False
    """True when the file ends inside the frame."""

    @property
    def width(self) -> int:
        return self.box[2] - self.box[0]

    @property
    def height(self) -> int:
        return self.box[3] - self.box[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Animation:
    """Two or more frames on a canvas; the first starts at 0 s."""

    format: AnimationFormat
    width: int
    height: int
    frames: Sequence[AnimationFrame]
    header: bytes = b""
    """Start of a file that holds one frame: GIF's screen and global palette, PNG's IHDR, palette and transparency."""
    _ends: list[Fraction] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ends", list(accumulate(frame.seconds for frame in self.frames)))

    @property
    def duration_seconds(self) -> Fraction:
        return self._ends[-1]

    def index_at(self, seconds: Fraction) -> int:
        """Returns the frame on screen; `len(frames)` at and after the end."""
        return bisect_right(self._ends, seconds)

    def start(self, index: int) -> Fraction:
        return self._ends[index] - self.frames[index].seconds


def scan_animation(file: Any, head: bytes) -> Animation | None:
    """Returns the animation in a file that begins with `head`, or None for a still picture or another format."""
    found = _canvas(file, head)
    if found is None:
        return None
    kind, width, height, header, frames = found
    listed = list(frames)
    if len(listed) < 2:
        return None
    return Animation(format=kind, width=width, height=height, frames=listed, header=header)


_Canvas = tuple[AnimationFormat, int, int, bytes, Iterator[AnimationFrame]]


def _canvas(file: Any, head: bytes) -> _Canvas | None:
    file.seek(0)
    if is_gif(head):
        return _gif(file)
    if is_png(head):
        return _apng(file)
    if is_animated_webp(head):
        width, height = (int.from_bytes(head[at : at + 3], "little") + 1 for at in (24, 27))
        return "webp", width, height, b"", _webp_frames(file)
    return _avif(file) if is_avif_sequence(head) else None


def _played(seconds: Fraction) -> Fraction:
    return DEFAULT_SECONDS if seconds <= MIN_SECONDS else seconds


def _gif(file: Any) -> _Canvas | None:
    header = file.read(13)
    if len(header) < 13:
        return None
    width, height = struct.unpack_from("<HH", header, 6)
    if header[10] & 0x80:
        header += file.read(3 << ((header[10] & 7) + 1))
    frames = _gif_frames(file)
    first = next(frames, None)
    if first is None:
        return None
    width, height = max(width, first.box[2]), max(height, first.box[3])  # as browsers do
    return "gif", width, height, header, _chained(first, frames)


def _chained(first: AnimationFrame, frames: Iterator[AnimationFrame]) -> Iterator[AnimationFrame]:
    yield first
    yield from frames


def _gif_frames(file: Any) -> Iterator[AnimationFrame]:
    control = bytes(4)  # flags, delay, transparent index
    while kind := file.read(1):
        if kind == b"!":
            label, size = file.read(1), file.read(1)
            block = file.read(size[0]) if size else b""
            if label == b"\xf9" and len(block) >= 4:
                control = block[:4]
            if size and size[0]:
                _skip_blocks(file)
        elif kind == b",":
            offset = file.tell()
            place = file.read(9)
            if len(place) < 9:
                return
            x, y, width, height, flags = struct.unpack("<HHHHB", place)
            file.seek((3 << ((flags & 7) + 1) if flags & 0x80 else 0) + 1, io.SEEK_CUR)  # palette, code size
            is_whole = _skip_blocks(file)
            yield AnimationFrame(
                seconds=_played(Fraction(int.from_bytes(control[1:3], "little"), 100)),
                box=(x, y, x + width, y + height),
                disposal=_GIF_DISPOSALS.get(control[0] >> 2 & 7, "keep"),
                is_blended=True,
                offset=offset,
                end=file.tell(),
                control=control,
                is_cut=not is_whole,
            )
            control = bytes(4)
        elif kind == b";":
            return


def _skip_blocks(file: Any) -> bool:
    """Skips sub-blocks and their terminator. Returns False at the end of the file."""
    while size := file.read(1):
        if size == b"\0":
            return True
        file.seek(size[0], io.SEEK_CUR)
    return False


def _apng(file: Any) -> _Canvas | None:
    header, is_animated = b"", False
    width = height = 0
    for chunk in png_chunks(file):
        if chunk.kind == b"IHDR":
            width, height = struct.unpack(">II", file.read(8).ljust(8, b"\0"))
        if chunk.kind in (b"IHDR", b"PLTE", b"tRNS"):
            file.seek(chunk.offset - 8)
            header += file.read(min(chunk.length, 1 << 16) + 12)
        is_animated |= chunk.kind == b"acTL"
        if chunk.kind == b"IDAT":
            break
    return ("apng", width, height, header, _apng_frames(file)) if is_animated and width and height else None


def _apng_frames(file: Any) -> Iterator[AnimationFrame]:
    """A default image before the first control chunk is not a frame."""
    size = file.seek(0, io.SEEK_END)
    control, offset, end = b"", 0, 0
    is_first = True
    for chunk in png_chunks(file):
        if chunk.kind in (b"fcTL", b"IEND"):
            if control and end:
                yield _apng_frame(control, offset, end, size, is_first=is_first)
                is_first = False
            file.seek(chunk.offset)
            control, end = file.read(26), 0
            if len(control) < 26:
                return
        elif chunk.kind in (b"IDAT", b"fdAT") and control:
            offset, end = (offset if end else chunk.offset - 8), chunk.offset + chunk.length + 4
    if control and end:
        yield _apng_frame(control, offset, end, size, is_first=is_first)


def _apng_frame(control: bytes, offset: int, end: int, size: int, *, is_first: bool) -> AnimationFrame:
    _, width, height, x, y, delay, per_second, disposal, blend = struct.unpack(">IIIIIHHBB", control)
    name = _APNG_DISPOSALS.get(disposal, "keep")
    return AnimationFrame(
        seconds=_played(Fraction(delay, per_second or 100)),
        box=(x, y, x + width, y + height),
        disposal="clear" if is_first and name == "restore" else name,
        is_blended=blend == 1,
        offset=offset,
        end=min(end, size),
        is_cut=end > size,
    )


def _webp_frames(file: Any) -> Iterator[AnimationFrame]:
    size = file.seek(0, io.SEEK_END)
    file.seek(4)
    end_of_chunks = 8 + int.from_bytes(file.read(4), "little")
    offset = 12
    last: AnimationFrame | None = None
    while offset + 8 <= size:
        file.seek(offset)
        kind, length = struct.unpack("<4sI", file.read(8))
        is_chunk = kind.replace(b" ", b"").isalnum() or offset >= end_of_chunks
        if last is not None:  # what follows a frame shows whether its length is right
            yield last if is_chunk else replace(last, is_cut=True)
            last = None
        if not is_chunk:
            return
        end = offset + 8 + length + length % 2
        if kind == b"ANMF" and len(frame := file.read(16)) == 16:
            x, y, width, height, milliseconds = (
                int.from_bytes(frame[at : at + 3], "little") for at in (0, 3, 6, 9, 12)
            )  # half of x and y, and width and height less 1
            last = AnimationFrame(
                seconds=_played(Fraction(milliseconds, 1000)),
                box=(2 * x, 2 * y, 2 * x + width + 1, 2 * y + height + 1),
                disposal="clear" if frame[15] & 1 else "keep",
                is_blended=not frame[15] & 2,
                offset=offset + 24,
                end=min(end, size),
                is_cut=end > size + 1,  # the last padding byte may be missing
            )
        offset = end
    if last is not None:
        yield replace(last, is_cut=last.is_cut or offset + 8 <= end_of_chunks)


def _avif(file: Any) -> _Canvas | None:
    with av.open(file, options={"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2"}) as container:
        if not container.streams.video:
            return None
        stream = max(container.streams.video, key=lambda stream: stream.frames)  # others: a cover, transparency
        shown = [packet for packet in container.demux(stream) if packet.pts is not None]
        frames = [
            AnimationFrame(seconds=_played((packet.duration or 0) * Fraction(stream.time_base)))
            for packet in sorted(shown, key=lambda packet: packet.pts)
        ]
        return "avif", stream.codec_context.width, stream.codec_context.height, b"", iter(frames)
