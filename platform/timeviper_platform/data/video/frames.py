"""."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np

from timeviper_platform.data.media.container import (
    DecodeError,
    ErrorType,
    MediaLimits,
    Stage,
)

MAX_TAIL_SECONDS = 1
"""How much longer than its pictures a container may say it is (sound often is) before samples count as missing."""


class BackendUnfitError(Exception):
    """A backend would not show the frames of a file that PyAV does; says why."""


@dataclass(frozen=True, slots=True)
class FrameBatch:
    """Decoded frames of one medium, ascending in time; checks itself when built."""

    frames: np.ndarray
    """(F, H, W, 3) uint8, RGB"""
    pts_seconds: np.ndarray
    """(F,) float64: PTS of each frame"""
    times_seconds: np.ndarray
    """(F,) float64: the t it was sampled for"""
    num_missing: int = 0
    """samples that could not be decoded"""

    def __post_init__(self) -> None:
        count = len(self.frames)
        if self.frames.ndim != 4 or self.frames.shape[-1] != 3 or self.frames.dtype != np.uint8:
            raise ValueError(f"frames must be (F, H, W, 3) uint8, not {self.frames.shape} {self.frames.dtype}")
        if self.pts_seconds.shape != (count,) or self.times_seconds.shape != (count,):
            raise ValueError(f"{count} frames need as many PTS and times: {self.pts_seconds.shape}")
        if count > 1 and bool((np.diff(self.times_seconds) < 0).any()):
            raise ValueError("frames must ascend in time")


class VideoReader(Protocol):
    """An open video that can be sampled again and again; cheapest in ascending order."""

    def sample(self, times: Sequence[Fraction]) -> FrameBatch:
        """The frames on screen at `times` (ascending), those that decode; the others are counted as missing.

        Raises:
            DecodeError: when the file cannot be read any more.
        """

    def close(self) -> None:
        """Gives file and decoder back."""


def check_size(width: int, height: int, limits: MediaLimits, stage: Stage, name: str) -> None:
    """Passes for pictures within `limits`; a stream may change its size after the header.

    Raises:
        DecodeError: past `max_pixels`.
    """
    if width * height > limits.max_pixels:
        message = f"{name}: {width} x {height} is past {limits.max_pixels = }"
        raise DecodeError(stage, ErrorType.TOO_MANY_PIXELS, message)
