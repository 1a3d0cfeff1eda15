"""The sampling grid and the thinning of frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import numpy as np

FrameSelection = Literal["uniform", "first"]


def select_frames(
    pts_seconds: Sequence[float] | np.ndarray,
    *,
    max_frames: int | None,
    frame_selection: FrameSelection = "uniform",
    start_seconds: float | None = None,
    end_seconds: float | None = None,
) -> list[int]:
    """Returns indices of frames with start <= t < end, thinned to `max_frames` (None = all).

    `uniform` spreads them from first to last (the paper's training); `first` keeps the first (its evaluation).

        select_frames([0, 1, 2, 3, 4], max_frames=3)                    -> [0, 2, 4]
        select_frames([0, 1, 2, 3, 4], max_frames=2, start_seconds=1)   -> [1, 4]

    Raises:
        ValueError: when `max_frames` is below 1 or end is not after start.
    """
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"{max_frames = } must be at least 1, or None for every frame")
    if start_seconds is not None and end_seconds is not None and end_seconds <= start_seconds:
        raise ValueError(f"{end_seconds = } must be after {start_seconds = }")
    times = np.asarray(pts_seconds, dtype=np.float64)
    keep = np.ones(len(times), dtype=bool)
    if start_seconds is not None:
        keep &= times >= start_seconds
    if end_seconds is not None:
        keep &= times < end_seconds
    inside = np.flatnonzero(keep)
    count = len(inside)
    if max_frames is None or count <= max_frames:
        chosen = inside
    elif frame_selection == "first":
        chosen = inside[:max_frames]
    elif max_frames == 1:
        chosen = inside[(count - 1) // 2 :][:1]
    else:  # in integers: platforms round halves differently
        indices = (np.arange(max_frames) * (count - 1) + (max_frames - 1) // 2) // (max_frames - 1)
        chosen = inside[indices]
    return [int(index) for index in chosen]


def thin_to_fps(times_seconds: Sequence[float] | np.ndarray, fps: float) -> list[int]:
    """Returns the first index per step of 1 / fps: thin_to_fps([0, 1, 2, 3, 4], 0.5) -> [0, 2, 4]."""
    chosen: list[int] = []
    last_step = -1
    for index, seconds in enumerate(times_seconds):
        step = int((seconds - times_seconds[0]) * fps + 1e-9)
        if step > last_step:
            chosen.append(index)
            last_step = step
    return chosen


def sample_times(start_seconds: Fraction, fps: Fraction, first_frame: int, num_frames: int) -> list[Fraction]:
    """Returns t = start + k / fps for k from first_frame."""
    return [start_seconds + k / fps for k in range(first_frame, first_frame + num_frames)]


def count_frames(start_seconds: Fraction, end_seconds: Fraction, fps: Fraction) -> int:
    """Returns the number of k >= 0 with start + k / fps < end."""
    return max(0, math.ceil((end_seconds - start_seconds) * fps))
