"""Decoded frames, and the protocol of video readers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Protocol

import numpy as np

MAX_TAIL_SECONDS = 1
"""Times this close after the last frame are not missing: sound often lasts longer."""


Resample = Literal["bilinear", "bicubic"]
"""Interpolation to the encoder's size, as its processor specifies."""


class BackendUnfitError(Exception):
    """Raised when a backend's frames would differ from PyAV's."""


@dataclass(frozen=True, slots=True)
class FrameBatch:
    """Frames of one medium, ascending in time."""

    frames: np.ndarray
    """(F, H, W, 3) uint8, RGB"""
    pts_seconds: np.ndarray
    """(F,) float64"""
    times_seconds: np.ndarray
    """(F,) float64 sampling times"""
    num_missing: int = 0
    """Frames that do not decode, or that the decoder flags as corrupt."""
    num_damaged: int = 0
    """Those of `frames` with visible damage: a cut picture, or frames after damage that the decoder reported, up to the
    next keyframe.
    """

    def __post_init__(self) -> None:
        count = len(self.frames)
        if self.frames.ndim != 4 or self.frames.shape[-1] != 3 or self.frames.dtype != np.uint8:
            raise ValueError(f"frames must be (F, H, W, 3) uint8, not {self.frames.shape} {self.frames.dtype}")
        if self.pts_seconds.shape != (count,) or self.times_seconds.shape != (count,):
            raise ValueError(f"{count} frames need as many PTS and times: {self.pts_seconds.shape}")
        if self.num_damaged > count:
            raise ValueError(f"{self.num_damaged = } frames cannot be among {count}")
        if count > 1 and bool((np.diff(self.times_seconds) < 0).any()):
            raise ValueError("frames must ascend in time")


class VideoReader(Protocol):
    """An open video; sampling is cheapest in ascending order."""

    def sample(self, times: Sequence[Fraction]) -> FrameBatch:
        """Returns the frames on screen at `times` (ascending).

        Raises:
            DecodeError: when reading fails.
        """

    def close(self) -> None:
        """Closes the file."""
