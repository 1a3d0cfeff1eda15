"""Frames of segments, one after the other: in this process, or in one that may crash or hang (isolation.py).

Knows images, videos that stay open between segments, and storage that fails for a passing reason; not what a segment
is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal, Protocol

from timeviper_platform import storage
from timeviper_platform.data.decode import Backend, DecoderPool, FrameBatch, read_image
from timeviper_platform.data.media import DecodeError, ErrorType, MediaLimits, Modality, Stage


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeConfig:
    """How videos are opened."""

    backend: Backend = "pyav"
    """pyav takes everything; decord and torchcodec take local files; nvdec (extra of that name) decodes local files on
    the encoder's GPU and so wants execution.mode fused, rounds in its own way, and is not held by max_memory_bytes,
    which the driver's own memory would count against"""
    max_open_videos: int = 4
    """decoders that a worker keeps open; 4 cost about 250 MB at 720p"""
    isolation: Literal["process", "none"] = "process"
    """process = a child probes and decodes: a file that crashes or hangs FFmpeg is one error row"""
    deadline_seconds: float = 600.0
    """process alone: for the headers of one medium, and for one segment of at most 64 frames; past it the child is
    killed, and the medium given up"""
    max_memory_bytes: int = 4 << 30
    """process alone: that the child may take"""

    def __post_init__(self) -> None:
        if self.max_open_videos < 1 or self.deadline_seconds <= 0 or self.max_memory_bytes < 1 << 28:
            raise ValueError(
                f"{self.max_open_videos = } must be at least 1, {self.deadline_seconds = } above 0 and"
                f" {self.max_memory_bytes = } at least 256 MiB, which the libraries take"
            )


class FrameSource(Protocol):
    """Where frames come from."""

    def frames(self, uri: str, modality: Modality, times: Sequence[Fraction]) -> FrameBatch:
        """The frames on screen at `times`; a picture is one frame.

        Raises:
            DecodeError: when there are none to have.
        """


@dataclass(slots=True)
class LocalFrames:
    """A FrameSource in this process."""

    image_size: int
    limits: MediaLimits
    config: DecodeConfig
    _pool: DecoderPool = field(init=False)

    def __post_init__(self) -> None:
        self._pool = DecoderPool(
            self.image_size,
            limits=self.limits,
            backend=self.config.backend,
            max_open=self.config.max_open_videos,
        )

    def frames(self, uri: str, modality: Modality, times: Sequence[Fraction]) -> FrameBatch:
        """See `FrameSource.frames`."""
        try:
            return storage.retrying(lambda: self._read(uri, modality, times), uri)
        except storage.StorageUnavailableError as error:  # not for good: the next run tries again
            raise DecodeError(decode_stage(modality), ErrorType.READ_FAILED, str(error)) from error

    def _read(self, uri: str, modality: Modality, times: Sequence[Fraction]) -> FrameBatch:
        if modality == "image":
            return read_image(uri, self.image_size, limits=self.limits)
        return self._pool.sample(uri, times)


def decode_stage(modality: Modality) -> Stage:
    """The stage that errors of decoding name."""
    return "decode_image" if modality == "image" else "decode_video"
