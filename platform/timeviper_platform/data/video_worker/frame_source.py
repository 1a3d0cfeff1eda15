"""Requests for frames, their results, and a source that decodes in this process."""

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
    """Backend and isolation of decoding."""

    backend: Backend = "pyav"
    """Decoder library. All but pyav need whole local files, and fall back to pyav where their frames would differ.
    nvdec uses the encoder's GPU: it needs execution.mode fused, rounds differently and ignores max_memory_bytes."""
    max_open_videos: int = 4
    """Videos that a worker keeps open; 4 take about 250 MB at 720p."""
    isolation: Literal["process", "none"] = "process"
    """process = media are probed and decoded in a child process, so that a crash or hang is one error row."""
    deadline_seconds: float = 600.0
    """Maximum time for a segment of 64 frames, with isolation process."""
    probe_deadline_seconds: float = 120.0
    """Maximum time for the headers of one medium, with isolation process."""
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
    """A request for frames of one medium."""

    uri: str
    modality: Modality
    times: Sequence[Fraction]
    """Sampling times, ascending; an image has one frame, whatever its time."""


@dataclass(frozen=True, slots=True)
class DecodeResult:
    """Frames or the error of a request, and their cost."""

    frames: FrameBatch | DecodeError
    seconds: float
    """Wall-clock time of decoding."""
    cpu_seconds: float = 0.0
    """CPU time in a child process."""


class FrameSource(Protocol):
    """Decodes frames."""

    def decode(self, requests: Iterable[DecodeRequest]) -> Iterator[DecodeResult]:
        """One result per request, in order; errors are results."""


@dataclass(slots=True)
class LocalFrames:
    """FrameSource in this process."""

    image_size: int
    limits: MediaLimits
    config: DecodeConfig
    keyframe_step: Fraction | None = None
    """See `open_video`."""
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
        for request in requests:
            started = time.perf_counter()
            try:
                frames: FrameBatch | DecodeError = self.frames(request)
            except DecodeError as error:
                frames = error
            yield DecodeResult(frames, time.perf_counter() - started)

    def frames(self, request: DecodeRequest) -> FrameBatch:
        """The frames of one request.

        Raises:
            DecodeError: when the medium cannot be decoded.
        """
        if is_web(request.uri):  # `open_web` retries
            return self._read(request)
        try:
            return storage.retrying(lambda: self._read(request), request.uri)
        except storage.StorageUnavailableError as error:  # the next run retries
            raise DecodeError(decode_stage(request.modality), ErrorType.READ_FAILED, str(error)) from error

    def _read(self, request: DecodeRequest) -> FrameBatch:
        if request.modality == "image":
            return read_image(request.uri, self.image_size, limits=self.limits)
        return self._pool.sample(request.uri, request.times)


def decode_stage(modality: Modality) -> Stage:
    """The stage named in decoding errors."""
    return "decode_image" if modality == "image" else "decode_video"
