"""Frames of segments, one after the other: in this process, or in one that may crash or hang (isolated_sources.py).

Knows images, videos that stay open between segments, and storage that fails for a passing reason; not what a segment
is.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal, Protocol

from timeviper_platform.common import storage
from timeviper_platform.data.media.container import DecodeError, ErrorType, MediaLimits, Modality, Stage
from timeviper_platform.data.media.http_file import is_web
from timeviper_platform.data.video.frames import FrameBatch
from timeviper_platform.data.video.reader import Backend, DecoderPool, read_image


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeConfig:
    """How videos are opened."""

    backend: Backend = "pyav"
    """pyav takes everything; the others take whole local files, and leave to pyav those of which they would show other
    frames (by format, clock, mirror image); nvdec (extra of that name) decodes on the encoder's GPU and so wants
    execution.mode fused, rounds in its own way, and is not held by max_memory_bytes, which the driver's own memory
    would count against"""
    max_open_videos: int = 4
    """decoders that a worker keeps open; 4 cost about 250 MB at 720p"""
    isolation: Literal["process", "none"] = "process"
    """process = a child probes and decodes: a file that crashes or hangs FFmpeg is one error row"""
    deadline_seconds: float = 600.0
    """process alone: for one segment of at most 64 frames; past it the child is killed, and the medium given up"""
    probe_deadline_seconds: float = 120.0
    """the same for the headers of one medium"""
    max_memory_bytes: int = 4 << 30
    """process alone: that the child may take"""

    def __post_init__(self) -> None:
        if self.max_open_videos < 1 or self.max_memory_bytes < 1 << 28:
            raise ValueError(
                f"{self.max_open_videos = } must be at least 1, and {self.max_memory_bytes = } at least 256 MiB, which"
                " the libraries take"
            )
        if self.deadline_seconds <= 0 or self.probe_deadline_seconds <= 0:
            raise ValueError(f"{self.deadline_seconds = } and {self.probe_deadline_seconds = } must be above 0")


@dataclass(frozen=True, slots=True)
class DecodeRequest:
    """Frames that are wanted of one medium."""

    uri: str
    modality: Modality
    times: Sequence[Fraction]
    """ascending; a picture has one frame, whatever its time"""


@dataclass(frozen=True, slots=True)
class DecodeResult:
    """What became of a request."""

    frames: FrameBatch | DecodeError
    seconds: float
    """that it took where it was decoded"""
    cpu_seconds: float = 0.0
    """of CPU in another process than the caller's"""


class FrameSource(Protocol):
    """Where frames come from."""

    def decode(self, requests: Iterable[DecodeRequest]) -> Iterator[DecodeResult]:
        """The frames on screen at the times of each request, in order, or why there are none to have."""


@dataclass(slots=True)
class LocalFrames:
    """A FrameSource in this process."""

    image_size: int
    limits: MediaLimits
    config: DecodeConfig
    keyframe_step: Fraction | None = None
    """see `open_video`"""
    _pool: DecoderPool = field(init=False)

    def __post_init__(self) -> None:
        self._pool = DecoderPool(
            self.image_size,
            limits=self.limits,
            backend=self.config.backend,
            max_open=self.config.max_open_videos,
            keyframe_step=self.keyframe_step,
        )

    def decode(self, requests: Iterable[DecodeRequest]) -> Iterator[DecodeResult]:
        """See `FrameSource.decode`."""
        for request in requests:
            started = time.perf_counter()
            try:
                found: FrameBatch | DecodeError = self.frames(request)
            except DecodeError as error:
                found = error
            yield DecodeResult(found, time.perf_counter() - started)

    def frames(self, request: DecodeRequest) -> FrameBatch:
        """The frames of one request.

        Raises:
            DecodeError: when there are none to have.
        """
        if is_web(request.uri):  # has been tried again where a status is known from a passing one
            return self._read(request)
        try:
            return storage.retrying(lambda: self._read(request), request.uri)
        except storage.StorageUnavailableError as error:  # not for good: the next run tries again
            raise DecodeError(decode_stage(request.modality), ErrorType.READ_FAILED, str(error)) from error

    def _read(self, request: DecodeRequest) -> FrameBatch:
        if request.modality == "image":
            return read_image(request.uri, self.image_size, limits=self.limits)
        return self._pool.sample(request.uri, request.times)


def decode_stage(modality: Modality) -> Stage:
    """The stage that errors of decoding name."""
    return "decode_image" if modality == "image" else "decode_video"
