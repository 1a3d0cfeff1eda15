"""Opens media with PyAV, and maps errors to `ErrorType`."""

from __future__ import annotations

import io
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import av
from PIL import Image, UnidentifiedImageError

from timeviper_platform.common import storage
from timeviper_platform.common.storage import open_file
from timeviper_platform.data.media.http_file import (
    BadUrlError,
    DomainNotAllowedError,
    TooManyBytesError,
    is_host,
    is_web,
    open_web,
)
from timeviper_platform.data.media.locations import open_location, parse_location

Modality = Literal["video", "image"]
Stage = Literal["download", "list", "probe", "decode_video", "decode_image"]

FORMAT_WHITELIST = ("mov", "mp4", "m4a", "3gp", "3g2", "mj2", "matroska", "webm", "avi", "mpegts", "mpeg", "flv", "ogg")
"""Demuxers of single files: playlists would refer to other files and hosts."""

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")

MEDIA_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mpg", ".mpeg", ".flv", ".3gp", ".ogv"),
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp"),
)
"""Files selected in folders and tars. Globs and manifests may name others."""


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
    TOO_MANY_FRAMES = "too_many_frames"
    FRAMES_MISSING = "frames_missing"
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
        if self.https_attempts < 1 or self.https_backoff_seconds < 0:
            raise ValueError(f"{self.https_attempts = } must be at least 1, {self.https_backoff_seconds = } at least 0")
        if wrong := [domain for domain in self.allowed_domains if not is_host(domain)]:
            raise ValueError(f"allowed_domains: {wrong} must be bare host names such as images.example.org")


def sniff_modality(head: bytes) -> Modality:
    """Returns "image" for the first bytes of a known image, else "video"."""
    is_image = head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM")) or (
        head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    )
    return "image" if is_image else "video"


def looks_like_video(head: bytes) -> bool:
    return (
        head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip")
        or head.startswith((b"\x1aE\xdf\xa3", b"FLV", b"OggS", b"\x00\x00\x01\xba"))
        or (head.startswith(b"\x47") and not head.startswith(b"GIF8"))
        or (head[:4] == b"RIFF" and head[8:11] == b"AVI")
    )


@contextmanager
def decode_errors(stage: Stage, source: str | bytes, limits: MediaLimits | None = None) -> Iterator[None]:
    """Converts errors of storage, FFmpeg and Pillow into a DecodeError."""
    name = source_name(source)
    try:
        yield
    except FileNotFoundError as error:
        raise DecodeError(stage, ErrorType.NOT_FOUND, f"{name}: no such file") from error
    except DomainNotAllowedError as error:
        raise DecodeError(stage, ErrorType.DOMAIN_NOT_ALLOWED, f"{name}: {error}") from error
    except BadUrlError as error:
        raise DecodeError(stage, ErrorType.BAD_URI, f"{name}: {error}") from error
    except TooManyBytesError as error:
        raise DecodeError(stage, ErrorType.TOO_MANY_BYTES, f"{name}: {error}") from error
    except TimeoutError as error:
        raise DecodeError(stage, ErrorType.TIMED_OUT, f"{name}: {error}") from error
    except socket.gaierror as error:
        raise DecodeError(stage, ErrorType.UNKNOWN_HOST, f"{name}: {error}") from error
    except PermissionError as error:
        raise DecodeError(stage, ErrorType.PERMISSION_DENIED, f"{name}: {error}") from error
    except av.error.DecoderNotFoundError as error:
        raise DecodeError(stage, ErrorType.NO_DECODER, f"{name}: {error}") from error
    except MemoryError as error:  # before FFmpegError: PyAV's MemoryError is both
        raise DecodeError(stage, ErrorType.OUT_OF_MEMORY, f"{name}: reading it exceeds the memory limit") from error
    except Image.DecompressionBombError as error:
        raise DecodeError(stage, ErrorType.TOO_MANY_PIXELS, f"{name}: {error}") from error
    except (av.error.FFmpegError, UnidentifiedImageError, SyntaxError) as error:
        # Pillow raises SyntaxError for some broken PNG chunks
        kind = ErrorType.CORRUPT_FILE if _known_head(source, limits) else ErrorType.UNKNOWN_FORMAT
        raise DecodeError(stage, kind, f"{name}: {error}") from error
    except OSError as error:
        # Pillow raises OSError without an errno for truncated images
        kind = ErrorType.READ_FAILED if error.errno else ErrorType.CORRUPT_FILE
        raise DecodeError(stage, kind, f"{name}: {error}") from error


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


def source_name(source: str | bytes) -> str:
    """Returns the URI for error messages, without possible secrets."""
    if isinstance(source, bytes):
        return f"{len(source)} bytes"
    return storage.shown_uri(source)


def read_head(source: str | bytes, limits: MediaLimits | None = None) -> bytes:
    with open_binary(source, limits) as file:
        return bytes(file.read(16))


def open_container(source: str | bytes, limits: MediaLimits | None = None) -> Any:
    """Opens a container. The prefix `file:` keeps local names from selecting a protocol."""
    options = {"format_whitelist": ",".join(FORMAT_WHITELIST), "protocol_whitelist": "file"}
    if isinstance(source, str) and is_local_file(source):
        return av.open("file:" + storage.split_uri(source)[1], options=options)
    return av.open(open_binary(source, limits), options=options, buffer_size=1 << 20)


def video_stream(container: Any, stage: Stage, name: str) -> Any:
    """Returns the first video stream except cover pictures, and discards all others. Raises DecodeError."""
    videos = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not videos:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "no streams"
        raise DecodeError(stage, ErrorType.NO_VIDEO_STREAM, f"{name}: no video stream, only {kinds}")
    for stream in container.streams:
        if stream.index != videos[0].index:
            stream.discard = av.stream.Discard.all
    return videos[0]


def clock_origin(container: Any, stream: Any) -> int:
    """Returns the tick at 0 s: 0, or the first PTS of MPEG-TS and MPEG-PS."""
    if container.format.flags & av.format.Flags.ts_discont.value:
        return int(stream.start_time or 0)
    return 0


def _known_head(source: str | bytes, limits: MediaLimits | None) -> bool:
    try:
        head = read_head(source, limits)
    except OSError:
        return False
    return looks_like_video(head) or sniff_modality(head) == "image"
