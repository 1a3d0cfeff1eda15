"""."""

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
    """Numbers of the frames that a reader takes, ascending: those in start <= t < end, thinned to `max_frames`.

    `uniform` keeps the first and the last and spreads the others evenly (the paper's training: at most 256);
    `first` takes the first ones (its evaluation). Training, serving and evaluation all thin here.

        select_frames([0, 1, 2, 3, 4], max_frames=3)                    -> [0, 2, 4]
        select_frames([0, 1, 2, 3, 4], max_frames=2, start_seconds=1)   -> [1, 4]

    Args:
        pts_seconds: (F,) ascending; a medium's `times_seconds` where the sampled t rather than the PTS shall count.
        max_frames: None keeps all.
        frame_selection: how to thin.
        start_seconds: None = from the beginning.
        end_seconds: None = to the end.

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
    else:  # integers, so that no platform rounds a half differently
        places = (np.arange(max_frames) * (count - 1) + (max_frames - 1) // 2) // (max_frames - 1)
        chosen = inside[places]
    return [int(number) for number in chosen]


def thin_to_fps(times_seconds: Sequence[float] | np.ndarray, fps: float) -> list[int]:
    """Numbers of the first frame at or after each 1 / fps from the first frame on: a lower rate from a stored one.

    thin_to_fps([0, 1, 2, 3, 4], 0.5) -> [0, 2, 4]; a rate above the stored one keeps every frame.
    """
    chosen: list[int] = []
    slot = -1
    for number, seconds in enumerate(times_seconds):
        reached = int((seconds - times_seconds[0]) * fps + 1e-9)
        if reached > slot:
            chosen.append(number)
            slot = reached
    return chosen


def sample_times(start_seconds: Fraction, fps: Fraction, first_frame: int, num_frames: int) -> list[Fraction]:
    """t of samples first_frame, first_frame + 1, ...: sample k lies at start + k / fps."""
    return [start_seconds + k / fps for k in range(first_frame, first_frame + num_frames)]


def count_frames(start_seconds: Fraction, end_seconds: Fraction, fps: Fraction) -> int:
    """How many k >= 0 have start + k / fps < end: 597 for 596.46 s at 1 fps from 0."""
    return max(0, math.ceil((end_seconds - start_seconds) * fps))
