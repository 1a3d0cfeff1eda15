"""Requests for frames, and a source in this process."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal, Protocol

from timeviper_platform.common import storage
from timeviper_platform.data.media.container import DecodeError, ErrorType, MediaLimits, Modality, Stage
from timeviper_platform.data.media.http_file import is_web
from timeviper_platform.data.video.frames import FrameBatch, Resample
from timeviper_platform.data.video.pictures import read_image
from timeviper_platform.data.video.reader import Backend, DecoderPool


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeConfig:
    backend: Backend = "pyav"
    """Decoder library. pyav replaces the others for remote files, and where they would misread a file.
    nvdec uses the encoder's GPU: it needs execution.mode fused, rounds differently and ignores max_memory_bytes.
    """
    max_open_videos: int = 4
    """Open videos per worker; 4 take about 250 MB at 720p."""
    isolation: Literal["process", "none"] = "process"
    """process = a child process probes and decodes, so that a crash or hang is one error row."""
    deadline_seconds: float = 600.0
    """Maximum time to decode a segment (64 frames) in the child process."""
    probe_deadline_seconds: float = 120.0
    """Maximum time to probe one medium in the child process."""
    max_memory_bytes: int = 4 << 30
    """Memory limit of the child process."""

    def __post_init__(self) -> None:
        if self.max_open_videos < 1 or self.max_memory_bytes < 1 << 28:
            raise ValueError(
                f"{self.max_open_videos = } must be at least 1, and {self.max_memory_bytes = } at least 256 MiB for the"
                " libraries"
            )
        if self.deadline_seconds <= 0 or self.probe_deadline_seconds <= 0:
            raise ValueError(f"{self.deadline_seconds = } and {self.probe_deadline_seconds = } must be above 0")


@dataclass(frozen=True, slots=True)
class DecodeRequest:
    uri: str
    modality: Modality
    times: Sequence[Fraction]
    """Ascending sampling times; an image has one frame."""
    joined_parts: int | None = None
    """See `Medium`."""


@dataclass(frozen=True, slots=True)
class DecodeResult:
    frames: FrameBatch | DecodeError
    seconds: float
    """Wall-clock decoding time."""
    cpu_seconds: float = 0.0
    """CPU time of a child process."""


class FrameSource(Protocol):
    def decode(self, requests: Iterable[DecodeRequest]) -> Iterator[DecodeResult]:
        """Yields a result per request, in order. Errors are results."""


@dataclass(slots=True)
class LocalFrames:
    """FrameSource in this process."""

    image_size: int
    limits: MediaLimits
    config: DecodeConfig
    keyframe_step: Fraction | None = None
    """See `open_video`."""
    resample: Resample = "bicubic"
    _pool: DecoderPool = field(init=False)

    def __post_init__(self) -> None:
        self._pool = DecoderPool(
            self.image_size,
            limits=self.limits,
            backend=self.config.backend,
            max_open=self.config.max_open_videos,
            keyframe_step=self.keyframe_step,
            resample=self.resample,
        )

    def decode(self, requests: Iterable[DecodeRequest]) -> Iterator[DecodeResult]:
        for request in requests:
            started = time.perf_counter()
            try:
                frames: FrameBatch | DecodeError = self.frames(request)
            except DecodeError as error:
                frames = error
            yield DecodeResult(frames, time.perf_counter() - started)

    def frames(self, request: DecodeRequest) -> FrameBatch:
        """Raises DecodeError when the medium cannot be decoded."""
        if is_web(request.uri):  # `open_web` retries
            return self._read(request)
        try:
            return storage.retrying(lambda: self._read(request), request.uri)
        except storage.StorageUnavailableError as error:  # the next run retries
            raise DecodeError(decode_stage(request.modality), ErrorType.READ_FAILED, str(error)) from error

    def _read(self, request: DecodeRequest) -> FrameBatch:
        if request.modality == "image":
            return read_image(request.uri, self.image_size, limits=self.limits, resample=self.resample)
        return self._pool.sample(request.uri, request.times, request.joined_parts)


def decode_stage(modality: Modality) -> Stage:
    return "decode_image" if modality == "image" else "decode_video"
