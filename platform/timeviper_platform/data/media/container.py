"""Opens media with PyAV, and maps errors to `ErrorType`."""

from __future__ import annotations

import io
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import av
from PIL import Image, UnidentifiedImageError

from timeviper_platform.common import storage
from timeviper_platform.common.storage import open_file, plain_errors
from timeviper_platform.data.media.content import describe_content
from timeviper_platform.data.media.http_file import (
    BadUrlError,
    DomainNotAllowedError,
    TooManyBytesError,
    is_host,
    is_web,
    open_web,
)
from timeviper_platform.data.media.locations import open_location, parse_location
from timeviper_platform.data.media.signatures import HEAD_BYTES, sniff_modality

Modality = Literal["video", "image"]
Stage = Literal["download", "list", "probe", "decode_video", "decode_image"]

FORMAT_WHITELIST = (
    *("mov", "mp4", "m4a", "3gp", "3g2", "mj2", "matroska", "webm", "avi", "mpegts", "mpeg", "flv", "ogg"),
    *("asf", "mxf", "ivf", "mpegvideo", "h264", "hevc"),
)
"""Demuxers of single files: playlists would refer to other files and hosts."""

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM")
"""Pillow's readers of untrusted files."""

MEDIA_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".qt", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".vob"),
    *(".flv", ".f4v", ".3gp", ".3g2", ".ogv", ".wmv", ".asf", ".mxf", ".ivf"),
    *(".m1v", ".m2v", ".h264", ".264", ".hevc", ".h265", ".265"),
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".avif"),
    *(".heic", ".heif", ".jp2", ".j2k", ".ppm", ".pgm", ".pnm"),
)
"""Files selected in folders and tars. Globs and manifests may name others. The content decides what a file is."""


class ErrorType(StrEnum):
    NOT_FOUND = "not_found"
    PERMISSION_DENIED = "permission_denied"
    READ_FAILED = "read_failed"
    TIMED_OUT = "timed_out"
    UNKNOWN_HOST = "unknown_host"
    DOMAIN_NOT_ALLOWED = "domain_not_allowed"
    BAD_URI = "bad_uri"
    BAD_ROW = "bad_row"
    TOO_MANY_BYTES = "too_many_bytes"
    EMPTY_FILE = "empty_file"
    UNKNOWN_FORMAT = "unknown_format"
    CORRUPT_FILE = "corrupt_file"
    NO_VIDEO_STREAM = "no_video_stream"
    NO_DURATION = "no_duration"
    NO_DECODER = "no_decoder"
    EMPTY_RANGE = "empty_range"
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_NARROW = "too_narrow"
    TOO_MANY_FRAMES = "too_many_frames"
    FRAMES_MISSING = "frames_missing"
    FRAMES_DAMAGED = "frames_damaged"
    OUT_OF_MEMORY = "out_of_memory"
    DECODER_CRASHED = "decoder_crashed"
    DECODER_TIMEOUT = "decoder_timeout"


RETRYABLE = frozenset(
    {
        *(ErrorType.NOT_FOUND, ErrorType.PERMISSION_DENIED, ErrorType.READ_FAILED),
        *(ErrorType.TIMED_OUT, ErrorType.UNKNOWN_HOST, ErrorType.DOMAIN_NOT_ALLOWED),
    }
)
"""Errors of the environment, retried by every run."""


class DecodeError(Exception):
    """An error of one medium, which does not end the job."""

    def __init__(self, stage: Stage, error_type: ErrorType, message: str) -> None:
        super().__init__(stage, error_type, message)  # all three, for pickling
        self.stage = stage
        self.error_type = error_type
        self.message = message

    def __str__(self) -> str:
        return f"{self.stage}: {self.error_type}: {self.message}"


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaLimits:
    max_pixels: int = 36_000_000
    """Maximum width x height of a frame. The default admits 8K UHD (7680 x 4320)."""
    max_aspect_ratio: int = 200
    """Maximum ratio of a frame's longer side to the shorter. The default is that of Qwen2-VL's preprocessing."""
    max_frames: int = 200_000
    """Maximum sampled frames of one medium. The default is 55 hours at 1 fps."""
    allowed_domains: tuple[str, ...] = ()
    """Allowed hosts of https URLs, with their subdomains. Empty = none."""
    max_download_bytes: int = 4 << 30
    """Maximum download from a web server without range support."""
    https_attempts: int = 4
    """Maximum attempts per https request."""
    https_backoff_seconds: float = 0.5
    """Wait before the second attempt. Later waits double; jitter adds up to 100 %."""

    def __post_init__(self) -> None:
        if self.max_pixels < 1 or self.max_frames < 1:
            raise ValueError(f"{self.max_pixels = } and {self.max_frames = } must be at least 1")
        if self.max_aspect_ratio < 1:
            raise ValueError(f"{self.max_aspect_ratio = } must be at least 1")
        if self.https_attempts < 1 or self.https_backoff_seconds < 0:
            raise ValueError(f"{self.https_attempts = } must be at least 1, {self.https_backoff_seconds = } at least 0")
        if wrong := [domain for domain in self.allowed_domains if not is_host(domain)]:
            raise ValueError(f"allowed_domains: {wrong} must be bare host names such as images.example.org")


def check_size(width: int, height: int, limits: MediaLimits, stage: Stage, name: str) -> None:
    """Raises DecodeError over `max_pixels` or `max_aspect_ratio`."""
    if width * height > limits.max_pixels:
        message = f"{name}: {width} x {height} is over {limits.max_pixels = }; raise it if there is enough memory"
        raise DecodeError(stage, ErrorType.TOO_MANY_PIXELS, message)
    if 0 < limits.max_aspect_ratio * min(width, height) < max(width, height):  # 0 = unknown
        message = f"{name}: {width} x {height} is over {limits.max_aspect_ratio = }; crop it, or raise the limit"
        raise DecodeError(stage, ErrorType.TOO_NARROW, message)


@contextmanager
def decode_errors(stage: Stage, source: str | bytes, limits: MediaLimits | None = None) -> Iterator[None]:
    """Converts errors of storage, FFmpeg and Pillow into a DecodeError."""
    name = source_name(source)
    try:
        with plain_errors():
            yield
    except DecodeError:
        raise
    except FileNotFoundError as error:
        raise DecodeError(stage, ErrorType.NOT_FOUND, f"{name}: no such file") from error
    except DomainNotAllowedError as error:
        raise DecodeError(stage, ErrorType.DOMAIN_NOT_ALLOWED, _named(name, error)) from error
    except BadUrlError as error:
        raise DecodeError(stage, ErrorType.BAD_URI, _named(name, error)) from error
    except TooManyBytesError as error:
        raise DecodeError(stage, ErrorType.TOO_MANY_BYTES, _named(name, error)) from error
    except TimeoutError as error:
        raise DecodeError(stage, ErrorType.TIMED_OUT, _named(name, error)) from error
    except socket.gaierror as error:
        raise DecodeError(stage, ErrorType.UNKNOWN_HOST, _named(name, error)) from error
    except av.error.PermissionError as error:  # about the contents: the file is already open
        message = f"{name}: its packets contradict its headers, or are encrypted; fetch it again"
        raise DecodeError(stage, ErrorType.CORRUPT_FILE, message) from error
    except PermissionError as error:
        raise DecodeError(stage, ErrorType.PERMISSION_DENIED, _named(name, error)) from error
    except av.error.DecoderNotFoundError as error:
        raise DecodeError(stage, ErrorType.NO_DECODER, _named(name, error)) from error
    except MemoryError as error:  # before FFmpegError: PyAV's MemoryError is both
        raise DecodeError(stage, ErrorType.OUT_OF_MEMORY, f"{name}: reading it exceeds the memory limit") from error
    except Image.DecompressionBombError as error:
        raise DecodeError(stage, ErrorType.TOO_MANY_PIXELS, _named(name, error)) from error
    except (av.error.FFmpegError, UnidentifiedImageError) as error:
        kind, fact = unreadable(source, limits)
        raise DecodeError(stage, kind, f"{name}: {fact or error}") from error
    except OSError as error:
        # Pillow raises OSError without an errno for truncated images
        kind = ErrorType.READ_FAILED if error.errno else ErrorType.CORRUPT_FILE
        raise DecodeError(stage, kind, _named(name, error)) from error
    except (ValueError, ArithmeticError, LookupError, EOFError, struct.error) as error:
        # raised by parsers for fields that make no sense
        raise DecodeError(stage, ErrorType.CORRUPT_FILE, f"{name}: {type(error).__name__}: {error}") from error


def open_binary(source: str | bytes, limits: MediaLimits | None = None) -> Any:
    """Opens a seekable file. Remote files are read ahead, not copied."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if is_web(source):
        limits = limits or MediaLimits()
        retries = (limits.https_attempts, limits.https_backoff_seconds)
        return open_web(source, limits.allowed_domains, limits.max_download_bytes, *retries)
    location = parse_location(source)
    return open_file(source) if location is None else open_location(location)


def is_local_file(uri: str) -> bool:
    return not is_web(uri) and parse_location(uri) is None and storage.is_local(uri)


def _named(name: str, error: Exception) -> str:
    """Puts the medium's name before the error's text, once: storage errors already begin with it."""
    return f"{name}: {str(error).removeprefix(f'{name}: ')}"


def source_name(source: str | bytes) -> str:
    """Returns the URI for error messages, without possible secrets."""
    if isinstance(source, bytes):
        return f"{len(source)} bytes"
    return storage.shown_uri(source)


class MediaFile:
    """A medium opened once for both its first bytes and its first reader: opening a remote file fetches them."""

    def __init__(self, source: str | bytes, limits: MediaLimits | None = None) -> None:
        """Raises OSError."""
        self._source, self._limits = source, limits
        self._file = open_binary(source, limits)
        self.head = bytes(self._file.read(HEAD_BYTES))
        if isinstance(source, str) and is_local_file(source):
            self.close()

    def open(self) -> Any:
        """Returns a seekable file at its start."""
        file, self._file = self._file or open_binary(self._source, self._limits), None
        file.seek(0)
        return file

    def open_container(self) -> Any:
        """Opens a container. The prefix `file:` keeps local names from selecting a protocol. Tags need not be UTF-8."""
        options = {"format_whitelist": ",".join(FORMAT_WHITELIST), "protocol_whitelist": "file"}
        options["merge_pmt_versions"] = "1"  # MPEG-TS: a later recording may use other PIDs
        if isinstance(self._source, str) and is_local_file(self._source):
            path = "file:" + storage.split_uri(self._source)[1]
            return av.open(path, options=options, metadata_errors="replace")
        return av.open(self.open(), options=options, buffer_size=1 << 20, metadata_errors="replace")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def video_stream(container: Any, stage: Stage, name: str) -> Any:
    """Returns the video stream that players choose (av_find_best_stream); discards all others. Raises DecodeError."""
    videos = container.streams.video
    for stream in videos:
        if stream.disposition & av.stream.Disposition.attached_pic:  # a cover: the last choice
            stream.disposition = av.stream.Disposition.attached_pic | av.stream.Disposition.visual_impaired
    best = container.streams.best("video")
    if best is None or best.disposition & av.stream.Disposition.attached_pic:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "no streams"
        raise DecodeError(stage, ErrorType.NO_VIDEO_STREAM, f"{name}: no video stream, only {kinds}")
    if best.codec_context is None:
        raise DecodeError(stage, ErrorType.NO_DECODER, f"{name}: this FFmpeg has no decoder for its video stream")
    for stream in container.streams:
        if stream.index != best.index:
            stream.discard = av.stream.Discard.all
    return best


def unreadable(source: str | bytes, limits: MediaLimits | None) -> tuple[ErrorType, str | None]:
    """Returns the error type of a file that no decoder reads, and what it is if recognised."""
    try:
        with open_binary(source, limits) as file:
            head = file.read(HEAD_BYTES)
            file.seek(0)
            fact = describe_content(file)
    except OSError:
        return ErrorType.UNKNOWN_FORMAT, None
    return ErrorType.UNKNOWN_FORMAT if sniff_modality(head) is None else ErrorType.CORRUPT_FILE, fact
