"""Damaged media through probing and decoding as a job does them, compared with a plain decode of the same bytes.

Small files of every container and picture format that a test can make are flipped, cut and spliced at random:

    PYTHONPATH=tests python -m reference.fuzz_media --files 10000 --seed 1

Prints the seed; file INDEX of a seed is `Fuzz(folder, seed).damaged(INDEX)`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import hashlib
import io
import multiprocessing
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image, ImageFile, ImageOps, ImageSequence

from reference.synthetic_media import make_video, picture
from timeviper_platform.data.media.container import DecodeError, ErrorType, MediaLimits
from timeviper_platform.data.media.medium import Medium
from timeviper_platform.data.plan.segments import PlanSpec, Segment, plan_page, segments_of
from timeviper_platform.data.preprocess.segment_rows import SegmentDecoder
from timeviper_platform.data.video.frames import FrameBatch
from timeviper_platform.data.video_worker.child_process import DecodeChild
from timeviper_platform.data.video_worker.frame_source import DecodeConfig
from timeviper_platform.data.video_worker.isolated import IsolatedProbes

IMAGE_SIZE = 32
FPS = Fraction(2)
PAGE_FILES = 50
DEADLINE_SECONDS = 20.0
SLACK_SECONDS = 2.0
"""A busy machine's delay in killing a child."""
LIMITS = MediaLimits(max_pixels=1 << 22, max_frames=192)
CASES = Path(__file__).parent / "cases"
RAW_SUFFIXES = (".m2v", ".h264")
"""Elementary streams, whose packets have no PTS."""
PICTURE_SUFFIXES = (".jpg", ".png", ".webp", ".gif", ".bmp", ".tiff", ".avif")

MAX_RUNS = 16
"""Broken packets before which a decode of a file is tried to end."""


# -- originals ---------------------------------------------------------------------------------------------------


@functools.cache
def make_originals() -> dict[str, bytes]:
    """Name -> bytes of a sound file of each format.

    Not of FFV1: it fills damage from whatever frame it decoded last, unnoticed, so that a seek shows another picture.
    """
    slow, fast = Fraction(1, 8), Fraction(1, 25)  # MPEG-1 and 2 have no 8 frames per second
    h264: dict[str, Any] = {"gop": 10}
    files = {
        "h264.mp4": _video("mp4", slow, audio_seconds=3.0, **h264),
        "hevc.mp4": _video("mp4", slow, codec="libx265", options={"x265-params": "log-level=none"}),
        "mpeg4.mov": _video("mov", slow, codec="mpeg4"),
        "mpeg4.3gp": _video("3gp", slow, codec="mpeg4"),
        "h264.mkv": _video("matroska", slow, **h264),
        "vp8.webm": _video("webm", slow, codec="libvpx"),
        "vp9.webm": _video("webm", slow, codec="libvpx-vp9"),
        "mpeg4.avi": _video("avi", slow, codec="mpeg4"),
        "huffyuv.avi": _video("avi", slow, codec="ffvhuff"),
        "h263.flv": _video("flv", slow, codec="flv"),
        "h264.flv": _video("flv", slow, **h264),
        "h264.ts": _video("mpegts", slow, **h264),
        "mpeg2.ts": _video("mpegts", fast, codec="mpeg2video"),
        "mpeg1.mpg": _video("mpeg", fast, codec="mpeg1video"),
        "mpeg2.mpg": _video("mpeg", fast, codec="mpeg2video"),
        "mpeg2.m2v": _video("mpeg2video", fast, codec="mpeg2video"),
        "raw.h264": _video("h264", slow, **h264),
        "wmv2.wmv": _video("asf", slow, codec="wmv2"),
        "vp8.ogv": _video("ogg", slow, codec="libvpx"),
        "theora.ogv": (CASES / "media" / "theora_dup.ogv").read_bytes(),
        **_pictures(),
    }
    return {"fragmented.mp4": _fragmented(files["h264.mp4"]), **files}


def _video(format: str, time_base: Fraction, **changes: Any) -> bytes:
    target = io.BytesIO()
    count = round(3 / time_base)
    same = {"fflags": "+bitexact"}  # no random ids
    make_video(target, range(count), time_base=time_base, format=format, container_options=same, **changes)
    return target.getvalue()


def _fragmented(whole: bytes) -> bytes:
    target = io.BytesIO()
    options = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
    with av.open(io.BytesIO(whole)) as source, av.open(target, "w", format="mp4", options=options) as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    return target.getvalue()


def _pictures() -> dict[str, bytes]:
    stills = [Image.fromarray(picture(number)) for number in range(6)]
    first = stills[0]
    exif = Image.Exif()
    exif[0x0112] = 6
    alpha = first.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(first.size))
    deep = Image.fromarray(np.arange(64 * 48, dtype=np.uint16).reshape(48, 64) * 21)
    film: dict[str, Any] = {"save_all": True, "append_images": stills[1:], "duration": 400, "loop": 0}
    saved: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "turned.jpg": (first, "JPEG", {"exif": exif}),
        "progressive.jpg": (first, "JPEG", {"progressive": True}),
        "grey.jpg": (first.convert("L"), "JPEG", {}),
        "cmyk.jpg": (first.convert("CMYK"), "JPEG", {}),
        "rgb.png": (first, "PNG", {}),
        "palette.png": (first.convert("P"), "PNG", {}),
        "alpha.png": (alpha, "PNG", {}),
        "deep.png": (deep, "PNG", {}),
        "film.png": (first, "PNG", film),
        "rgb.webp": (first, "WEBP", {}),
        "alpha.webp": (alpha, "WEBP", {"lossless": True}),
        "film.webp": (first, "WEBP", film),
        "still.gif": (first, "GIF", {}),
        "film.gif": (first, "GIF", film),
        "rgb.bmp": (first, "BMP", {}),
        "rgb.tiff": (first, "TIFF", {}),
        "lzw.tiff": (first, "TIFF", {"compression": "tiff_lzw"}),
        "rgb.avif": (first, "AVIF", {}),
    }
    return {name: _saved(image, format, options) for name, (image, format, options) in saved.items()}


def _saved(image: Image.Image, format: str, options: dict[str, Any]) -> bytes:
    target = io.BytesIO()
    image.save(target, format, **options)
    return target.getvalue()


# -- damage ------------------------------------------------------------------------------------------------------


def damage(data: bytes, other: bytes, drawn: random.Random) -> bytes:
    """Applies one to three changes; `other` is a file to splice from."""
    changed = bytearray(data)
    for _ in range(drawn.choice((1, 1, 2, 3))):
        start = _position(len(changed), drawn)
        length = min(drawn.choice((1, 4, 16, 64, 256, 1024)), len(changed) - start)
        match drawn.choice(("flip", "flip", "flip", "write", "zero", "cut", "remove", "repeat", "splice")):
            case "flip":
                for _ in range(drawn.choice((1, 1, 2, 4, 16))):
                    changed[_position(len(changed), drawn)] ^= 1 << drawn.randrange(8)
            case "write":
                changed[start : start + length] = drawn.randbytes(length)
            case "zero":
                changed[start : start + length] = bytes(length)
            case "cut":
                del changed[max(1, start) :]
            case "remove":
                del changed[start : start + length]
            case "repeat":
                changed[start:start] = changed[start : start + length]
            case "splice":
                begin = drawn.randrange(len(other))
                changed[start:start] = other[begin : begin + max(64, length)]
        if len(changed) < 2:
            changed += data[:16]
    return bytes(changed)


def _position(length: int, drawn: random.Random) -> int:
    """Prefers headers, which are at the start or the end."""
    region = drawn.choice(("anywhere", "anywhere", "start", "end"))
    if region == "anywhere" or length <= 512:
        return drawn.randrange(length)
    return drawn.randrange(512) if region == "start" else length - 1 - drawn.randrange(512)


# -- plain decode ------------------------------------------------------------------------------------------------


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
    for pixels, seconds in [*_plain_video(path, enters), *pictures]:
        found.setdefault(digest(pixels), []).append(seconds)
    return {**found, PILLOW_READS_IT: []} if pictures else found


def _plain_video(path: str, enters: bool) -> Shown:
    with (
        contextlib.suppress(av.error.FFmpegError, ValueError, OSError),
        av.open(path, metadata_errors="replace") as container,
    ):
        streams = [stream for stream in container.streams.video if stream.codec_context is not None]
        for stream in streams:
            stream.thread_type = "NONE"
        packets = []
        with contextlib.suppress(av.error.FFmpegError):
            packets.extend(container.demux(streams))
        for stream in streams:
            own = [packet for packet in packets if packet.stream_index == stream.index and packet.size]
            yield from (_shown_frame(frame, stream) for frame in _decoded(stream, own))
            keyframes = [index for index, packet in enumerate(own) if packet.is_keyframe] if enters else []
            for index in keyframes:
                yield from _entered(stream, own[index:])


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
    scaled = _SCALER.reformat(frame, IMAGE_SIZE, IMAGE_SIZE, "rgb24", interpolation=Interpolation.BICUBIC, threads=1)
    time_base = Fraction(frame.time_base or stream.time_base)
    return scaled.to_ndarray(), None if frame.pts is None else float(frame.pts * time_base)


_SCALER = VideoReformatter()


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
    milliseconds = float(frame.info.get("duration", 0))
    return 0.1 if milliseconds <= 10 else milliseconds / 1e3  # as browsers play them


def merged(frames: Frames, others: Frames | None) -> Frames:
    return {key: [*frames.get(key, []), *(others or {}).get(key, [])] for key in [*frames, *(others or {})]}


def times_of(frames: Frames, pixels: np.ndarray) -> list[float | None]:
    """Times of these pixels in any of eight orientations, as damage may turn them; [] = not in the file."""
    sides = (pixels, pixels[:, ::-1])
    turned = (np.rot90(side, turns) for side in sides for turns in range(4))
    return next((times for view in turned if (times := frames.get(digest(view)))), [])


# -- the run -----------------------------------------------------------------------------------------------------


@dataclass
class FuzzResult:
    seed: int
    files: int = 0
    frames: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    """ok, partial or error type -> files"""
    job_ends: list[str] = field(default_factory=list)
    overdue: list[str] = field(default_factory=list)
    """replies that took longer than their deadline"""
    alive: list[int] = field(default_factory=list)
    """children that were not ended"""
    invented: list[str] = field(default_factory=list)
    """frames that the plain decode does not have"""
    exceptions: list[str] = field(default_factory=list)
    """exceptions of a library that are not a reason of their own"""
    salvaged: int = 0
    """frames of damaged animations that Pillow refuses, other than those of the undamaged file"""
    uncompared: int = 0
    """files whose plain decode itself crashed or hung"""

    def lines(self) -> list[str]:
        return [
            f"seed {self.seed}: {self.files} files, {self.frames} frames; "
            + ", ".join(f"{count} {name}" for name, count in self.outcomes.most_common()),
            f"job ends {len(self.job_ends)}, replies past their deadline {len(self.overdue)}, children alive"
            f" {len(self.alive)}, frames that a plain decode does not have {len(self.invented)},"
            f" unknown exceptions {len(self.exceptions)}, salvaged {self.salvaged}, not compared {self.uncompared}",
            *self.job_ends,
            *self.overdue,
            *self.invented,
            *self.exceptions,
        ]

    def label(self, kind: str, message: str) -> str:
        """Returns the error type; notes an exception that no reason stands for."""
        if kind == ErrorType.DECODER_CRASHED and not message.endswith("twice"):
            self.exceptions.append(message)
        return kind

    @property
    def is_good(self) -> bool:
        """Frames that a plain decode does not have are tolerated in 1 of 100 files.

        Where a decoder fills damage without a word, by frames that were decoded before, another order shows others.
        """
        failures = [*self.job_ends, *self.overdue, *self.alive, *self.exceptions]
        return not failures and len(self.invented) <= self.files // 100


class Fuzz:
    """Damaged files of one seed."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._seed = folder, seed
        self._originals = make_originals()
        self._names = sorted(self._originals)

    def damaged(self, index: int) -> tuple[str, bytes]:
        """Name and bytes of file `index`; every format has its turn."""
        drawn = random.Random(f"{self._seed}/{index}")
        name = self._names[index % len(self._names)]
        return f"{index:06d}-{name}", damage(self._originals[name], self._originals[drawn.choice(self._names)], drawn)

    def run(self, num_files: int, *, progress: Callable[[FuzzResult], None] | None = None) -> FuzzResult:
        result = FuzzResult(self._seed)
        with _watched_children(result):
            plain = _PlainDecodes()
            probes = IsolatedProbes(LIMITS, _CONFIG)
            decoder = _new_decoder()
            for start in range(0, num_files, PAGE_FILES):
                paths = [self._write(index) for index in range(start, min(num_files, start + PAGE_FILES))]
                try:
                    self._run_page(paths, probes, decoder, plain, result)
                except Exception:  # noqa: BLE001 - whatever it is, it would end a job
                    result.job_ends.append(f"files {start}..{start + len(paths) - 1}: {traceback.format_exc()}")
                    decoder = _new_decoder()
                plain.clear()
                for path in paths:
                    path.unlink()
                result.files += len(paths)
                if progress is not None:
                    progress(result)
            plain.close()
            del probes, decoder
        return result

    def _original(self, name: str) -> str:
        path = self._folder / name.partition("-")[2]
        path.write_bytes(self._originals[path.name])
        return str(path)

    def _write(self, index: int) -> Path:
        name, data = self.damaged(index)
        path = self._folder / name
        path.write_bytes(data)
        return path

    def _run_page(
        self,
        paths: list[Path],
        probes: IsolatedProbes,
        decoder: SegmentDecoder,
        plain: _PlainDecodes,
        result: FuzzResult,
    ) -> None:
        spec = PlanSpec(fps=FPS, recipe_hash="", limits=LIMITS, decode=_CONFIG)
        media = [Medium(str(path), path.name) for path in paths]
        segments: list[Segment] = []
        for table in plan_page(media, spec, probes):
            segments += segments_of(table)
            for kind, message in zip(table["error_type"].to_pylist(), table["error_message"].to_pylist(), strict=True):
                if kind:
                    result.outcomes[result.label(kind, message)] += 1
        for segment in segments:
            plain.start(segment.uri)
        outcomes: dict[str, set[str]] = {}
        for segment, decoded in zip(segments, decoder.decode(segments), strict=True):
            frames, labels = decoded.frames, outcomes.setdefault(segment.uri, set())
            if isinstance(frames, DecodeError):
                labels.add(result.label(frames.error_type.value, frames.message))
                continue
            labels.add("partial" if frames.num_missing else "ok")
            result.frames += len(frames.frames)
            expected = plain.frames(segment.uri)
            if expected is None:
                result.uncompared += 1
                continue
            name = Path(segment.uri).name
            is_picture = name.endswith(PICTURE_SUFFIXES)
            is_timed = not name.endswith(RAW_SUFFIXES)
            foreign = not_in(frames, expected, is_timed=is_timed)
            if foreign and is_picture:  # salvaged from an animation of which Pillow shows nothing
                foreign = not_in(frames, merged(expected, plain.frames(self._original(name))))
                if PILLOW_READS_IT not in expected:
                    result.salvaged += len(foreign)
                    foreign = []
            elif foreign:
                foreign = not_in(frames, plain.entered(segment.uri) or {}, is_timed=is_timed)
            result.invented += [f"seed {self._seed}, {name}: {what}" for what in foreign]
        result.outcomes.update("+".join(sorted(kinds)) for kinds in outcomes.values())


def not_in(batch: FrameBatch, expected: Frames, *, is_timed: bool = True) -> list[str]:
    """Names frames whose pixels are not in the file, and a batch whose times are not those of its frames, shifted.

    Not so many as the batch counts as damaged: those are filled with what a decoder has at hand, which depends on the
    frames that it decoded before.
    """
    foreign = list(_foreign(batch, expected, is_timed and not batch.num_damaged))
    return foreign if len(foreign) > batch.num_damaged else []


def _foreign(batch: FrameBatch, expected: Frames, is_timed: bool) -> Iterator[str]:
    origins: set[float | None] | None = None
    for pixels, pts, seconds in zip(batch.frames, batch.pts_seconds, batch.times_seconds, strict=True):
        times = times_of(expected, pixels)
        if not times:
            yield f"the frame for t = {seconds:g} s, PTS {pts:g} s"
        elif None not in times and is_timed:
            shifts = {round(time - float(pts), 4) for time in times if time is not None}
            origins = shifts if origins is None else origins & shifts
    if origins is not None and not origins:
        yield f"the times {batch.pts_seconds.tolist()}"


_CONFIG = DecodeConfig(deadline_seconds=DEADLINE_SECONDS, probe_deadline_seconds=DEADLINE_SECONDS)


def _new_decoder() -> SegmentDecoder:
    return SegmentDecoder(IMAGE_SIZE, FPS, LIMITS, _CONFIG)


@contextlib.contextmanager
def _watched_children(result: FuzzResult) -> Iterator[None]:
    """Notes late replies, and children that still run at the end."""
    pids: list[int] = []
    start, reply = DecodeChild.__init__, DecodeChild.reply

    def watched_start(self: DecodeChild, *arguments: Any, **named: Any) -> None:
        start(self, *arguments, **named)
        pids.append(self.pid)

    def watched_reply(self: DecodeChild, deadline_seconds: float, *arguments: Any) -> dict[str, Any]:
        began = time.monotonic()
        try:
            return reply(self, deadline_seconds, *arguments)
        finally:
            seconds = time.monotonic() - began
            if seconds > deadline_seconds + SLACK_SECONDS:
                result.overdue.append(f"a reply took {seconds:.1f} s")

    with mock.patch.multiple(DecodeChild, __init__=watched_start, reply=watched_reply):
        yield
    gc.collect()
    result.alive = [pid for pid in pids if Path(f"/proc/{pid}").exists()]


class _PlainDecodes:
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    options = parser.parse_args()

    num_shown = 0

    def show(result: FuzzResult) -> None:
        nonlocal num_shown
        counts, problems, *details = result.lines()
        sys.stdout.write("\n".join([counts, problems, *details[num_shown:], ""]))
        sys.stdout.flush()
        num_shown = len(details)

    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        result = Fuzz(Path(folder), options.seed).run(options.files, progress=show)
    sys.stdout.write("\n".join(result.lines()) + "\n")
    return 0 if result.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
