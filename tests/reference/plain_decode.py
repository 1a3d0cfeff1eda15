"""Every frame that a plain decode of a file shows, and a comparison of sampled frames with them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image, ImageFile, ImageOps, ImageSequence

from timeviper_platform.data.video.frames import FrameBatch

IMAGE_SIZE = 32

MAX_RUNS = 16
"""Broken packets before which a decode of a file is tried to end."""

Frames = dict[bytes, list[float | None]]
"""Digest of a frame's pixels -> its presentation times on the container's own clock; None = the decoder has none."""


def digest(pixels: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(pixels).tobytes(), digest_size=12).digest()


PILLOW_READS_IT = b"a picture"
"""Key of the frames of files that Pillow reads."""

Shown = Iterator[tuple[np.ndarray, float | None]]


def plain_decode(path: str, *, enters: bool = False) -> Frames:
    """Every frame of a file: all packets of all video streams in turn, and all pictures that Pillow sees.

    Args:
        enters: also as a player shows them after a seek. Where a keyframe is damaged, decoders fill it from the frame
            before, which a seek leaves out.
    """
    found: Frames = {}
    pictures = list(_plain_pictures(path))
    for pixels, seconds in [*_plain_video(path, enters), *_plain_gif(path), *_webp_frames(path), *pictures]:
        found.setdefault(digest(pixels), []).append(seconds)
    return {**found, PILLOW_READS_IT: []} if pictures else found


def _plain_video(path: str, enters: bool) -> Shown:
    with (
        contextlib.suppress(av.error.FFmpegError, ValueError, OSError),
        av.open(path, metadata_errors="replace") as container,
    ):
        streams = [stream for stream in container.streams.video if stream.codec_context is not None]
        for stream in container.streams:
            if stream.type != "video":  # reading may end early at damaged sound
                stream.discard = av.stream.Discard.all
        for stream in streams:
            stream.thread_type = "NONE"
        packets = []
        with contextlib.suppress(av.error.FFmpegError, IndexError):  # PyAV's, when streams appear meanwhile
            packets.extend(container.demux(streams))
        for stream in streams:
            own = [packet for packet in packets if packet.stream_index == stream.index and packet.size]
            yield from (_shown_frame(frame, stream) for frame in _decoded(stream, own))
            keyframes = [index for index, packet in enumerate(own) if packet.is_keyframe] if enters else []
            for index in keyframes:
                yield from _entered(stream, own[index:])
                with av.open(path, metadata_errors="replace") as again:  # a flush leaves traces of other groups
                    yield from _entered(again.streams[stream.index], own[index:])


def _decoded(stream: Any, packets: Sequence[Any], silent: list[int] | None = None) -> Iterator[Any]:
    """Frames of packets; `silent` gets the indices of those that gave none."""
    stream.codec_context.flush_buffers()
    for index, packet in enumerate([*packets, None]):
        frames = []
        with contextlib.suppress(av.error.FFmpegError):
            frames = stream.codec_context.decode(packet)
        if not frames and silent is not None:
            silent.append(index)
        yield from frames


def _entered(stream: Any, packets: Sequence[Any]) -> Shown:
    """The frames from a keyframe on, if its own frame is one indeed and comes first.

    A broken packet may take the frame before it along; a decoder that ends before that packet shows it.
    """
    entry = packets[0].pts
    silent: list[int] = []
    frames = [frame for frame in _decoded(stream, packets, silent) if None not in (frame.pts, entry)]
    runs = [frames] + [list(_decoded(stream, packets[:end])) for end in silent[:MAX_RUNS] if end]
    for run in runs:
        frames = [frame for frame in run if None not in (frame.pts, entry) and frame.pts >= entry]
        if frames and frames[0].pts == entry and frames[0].pict_type == PictureType.I:
            yield from (_shown_frame(frame, stream) for frame in frames)


def _shown_frame(frame: Any, stream: Any) -> tuple[np.ndarray, float | None]:
    if "a" in frame.format.name:  # bgra and yuva420p: transparent
        pixels = _shown(Image.fromarray(frame.to_ndarray(format="rgba")))
    else:
        size = (IMAGE_SIZE, IMAGE_SIZE)
        pixels = _SCALER.reformat(frame, *size, "rgb24", interpolation=Interpolation.BICUBIC, threads=1).to_ndarray()
    time_base = Fraction(frame.time_base or stream.time_base)
    return pixels, None if frame.pts is None else float(frame.pts * time_base)


_SCALER = VideoReformatter()


def _plain_gif(path: str) -> Shown:
    """As browsers show it. FFmpeg fills what no frame covers with the background colour, whose index changes here."""
    content = bytearray(Path(path).read_bytes())
    if not content.startswith(b"GIF8") or len(content) < 13:
        return
    runs = []
    for content[11] in (0, 1):
        frames = []
        with (
            contextlib.suppress(av.error.FFmpegError, ValueError, OSError),
            av.open(io.BytesIO(bytes(content)), metadata_errors="replace") as container,
        ):
            stream = container.streams.video[0]
            frames = list(_decoded(stream, [packet for packet in container.demux(stream) if packet.size]))
        runs.append([(frame.to_ndarray(format="rgba"), float((frame.pts or 0) * frame.time_base)) for frame in frames])
    for (pixels, seconds), (other, _) in zip(*runs, strict=False):
        pixels[(pixels != other).any(-1)] = 0
        yield _shown(Image.fromarray(pixels)), seconds


def _webp_frames(path: str) -> Shown:
    """Each frame of an animation as a file of its own: Pillow shows none after one that does not decode.

    Also on a white canvas: Pillow's is black where no frame has drawn.
    """
    content = Path(path).read_bytes()
    if not (content.startswith(b"RIFF") and content[8:12] == b"WEBP"):
        return
    place, elapsed = content.find(b"ANMF"), 0.0
    while place >= 0:
        frame = content[place + 8 : place + 8 + int.from_bytes(content[place + 4 : place + 8], "little")]
        still = b"RIFF" + (len(frame) - 12).to_bytes(4, "little", signed=True) + b"WEBP" + frame[16:]
        with contextlib.suppress(Exception), Image.open(io.BytesIO(still)) as image:
            yield _shown(image), elapsed
            yield _shown(_on_canvas(image, content, frame)), elapsed
        elapsed += _played(int.from_bytes(frame[12:15], "little"))
        place = content.find(b"ANMF", place + 4)


def _on_canvas(image: Image.Image, content: bytes, frame: bytes) -> Image.Image:
    """The frame at its place on an empty canvas of the size in the VP8X chunk."""
    width, height, left, top = (
        int.from_bytes(data, "little") for data in (content[24:27], content[27:30], frame[:3], frame[3:6])
    )
    if width * height > 1 << 22:  # damage can make it huge
        return image
    canvas = Image.new("RGBA", (width + 1, height + 1))
    canvas.paste(image.convert("RGBA"), (2 * left, 2 * top))
    return canvas


def _plain_pictures(path: str) -> Shown:
    for is_lenient in (False, True):  # a lenient Pillow reads past damage
        ImageFile.LOAD_TRUNCATED_IMAGES = is_lenient
        with contextlib.suppress(Exception), Image.open(path) as image:
            elapsed = 0.0
            for frame in ImageSequence.Iterator(image):
                yield _shown(frame), elapsed
                elapsed += _shown_seconds(frame)


def _shown(frame: Image.Image) -> np.ndarray:
    """Upright, on white, at the encoder's size."""
    image = ImageOps.exif_transpose(frame)
    if image.mode in ("I;16", "I"):
        image = Image.fromarray((np.array(image) >> 8).astype(np.uint8))
    elif image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return np.array(image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))


def _shown_seconds(frame: Image.Image) -> float:
    return _played(float(frame.info.get("duration", 0)))


def _played(milliseconds: float) -> float:
    """Seconds as browsers play them."""
    return 0.1 if milliseconds <= 10 else milliseconds / 1e3


def merged(frames: Frames, others: Frames | None) -> Frames:
    return {key: [*frames.get(key, []), *(others or {}).get(key, [])] for key in [*frames, *(others or {})]}


def times_of(frames: Frames, pixels: np.ndarray) -> list[float | None]:
    """Times of these pixels in any of eight orientations, as damage may turn them; [] = not in the file."""
    sides = (pixels, pixels[:, ::-1])
    turned = (np.rot90(side, turns) for side in sides for turns in range(4))
    return next((times for view in turned if (times := frames.get(digest(view)))), [])


def not_in(batch: FrameBatch, expected: Frames, *, is_timed: bool = True, num_parts: int = 1) -> list[str]:
    """Names frames whose pixels are not in the file, and a batch whose times are not those of its frames, shifted.

    Not so many as the batch counts as damaged: those are filled with what a decoder has at hand, which depends on the
    frames that it decoded before.

    Args:
        num_parts: recordings with a clock, and so a shift, of their own.
    """
    foreign = list(_foreign(batch, expected, is_timed and not batch.num_damaged, num_parts))
    return foreign if len(foreign) > batch.num_damaged else []


def _foreign(batch: FrameBatch, expected: Frames, is_timed: bool, num_parts: int) -> Iterator[str]:
    origins: set[float] | None = None
    num_shifts = 0
    for pixels, pts, seconds in zip(batch.frames, batch.pts_seconds, batch.times_seconds, strict=True):
        times = times_of(expected, pixels)
        if not times:
            yield f"the frame for t = {seconds:g} s, PTS {pts:g} s"
        elif None not in times and is_timed:
            shifts = {round(time - float(pts), 4) for time in times if time is not None}
            origins = shifts & (origins or set())
            if not origins:
                origins, num_shifts = shifts, num_shifts + 1
    if num_shifts > num_parts:
        yield f"the times {batch.pts_seconds.tolist()}"


class PlainDecodes:
    """Plain decodes in another process, which damaged files may crash."""

    def __init__(self) -> None:
        self._pool = self._new_pool()
        self._started: dict[str, Future[Frames]] = {}
        self._frames: dict[str, Frames | None] = {}

    def start(self, path: str) -> None:
        if path not in self._started:
            self._started[path] = self._pool.submit(plain_decode, path)

    def frames(self, path: str) -> Frames | None:
        """None if the file crashes or hangs a plain decoder."""
        if path not in self._frames:
            self.start(path)
            self._frames[path] = self._result(self._started[path])
        return self._frames[path]

    def entered(self, path: str) -> Frames | None:
        return self._result(self._pool.submit(plain_decode, path, enters=True))

    def _result(self, future: Future[Frames]) -> Frames | None:
        try:
            return future.result(timeout=60)
        except (BrokenProcessPool, TimeoutError):
            self.close()
            self._pool = self._new_pool()
            waiting = [path for path in self._started if path not in self._frames]
            self._started = {path: self._pool.submit(plain_decode, path) for path in waiting}
            return None

    def clear(self) -> None:
        self._started, self._frames = {}, {}

    def close(self) -> None:
        for process in list((self._pool._processes or {}).values()):
            process.kill()
        self._pool.shutdown(cancel_futures=True)

    @staticmethod
    def _new_pool() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
