"""Frames that the model sees for a question."""

from __future__ import annotations

from typing import Literal

from timeviper_platform.data.store.reader import MediaInfo

Protocol = Literal["paper", "whole", "without_video"]
"""paper           the public code's: the first 256 frames at 1 fps, the last one repeated up to a multiple of 4
whole           `answering.max_frames` spread over the whole video
without_video   the question alone
"""

PAPER_MAX_FRAMES = 256
FRAME_MULTIPLE = 4
PAPER_MIN_FRAMES = 32
"""Fewer frames are sampled again, by `sampling.min_frames` of preprocessing."""


def protocol_frames(
    info: MediaInfo,
    protocol: Protocol,
    *,
    max_frames: int | None,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
) -> list[int]:
    """Returns indices of stored frames; the last may repeat. `max_frames` limits protocol `whole`."""
    if protocol == "without_video":
        return []
    if protocol == "whole":
        return info.select(max_frames=max_frames, start_seconds=start_seconds, end_seconds=end_seconds)
    frames = info.select(
        max_frames=PAPER_MAX_FRAMES, frame_selection="first", start_seconds=start_seconds, end_seconds=end_seconds
    )
    return frames + frames[-1:] * (-len(frames) % FRAME_MULTIPLE)
