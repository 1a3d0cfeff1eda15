"""Sampling with decord, behind the same protocol as PyAV. Optional: decord has had no release since 2021.

Knows decord's reader, and which files it shows as they are: whole local ones whose every frame it gives the time that
the packets say. It decodes every frame up to each keyframe run, and on bytes it would copy the file many times over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from timeviper_platform.common import storage
from timeviper_platform.data.media.container import DecodeError, ErrorType, MediaLimits, is_local_file
from timeviper_platform.data.video.frames import MAX_TAIL_SECONDS, BackendUnfitError, FrameBatch
from timeviper_platform.data.video.orientation import UPRIGHT
from timeviper_platform.data.video.stream_info import StreamInfo, read_stream_info

ROUNDING_SECONDS = 1e-5
"""decord states PTS as float32 seconds; at ten minutes they are 6e-5 apart, rounded by half of that."""


def load_decord() -> Any:
    """The module decord.

    Raises:
        RuntimeError: when it is not installed, or does not load.
    """
    try:
        import decord
    except (ImportError, OSError, RuntimeError) as error:
        raise RuntimeError(
            f"backend decord does not load ({error}); pip install decord (it has wheels for x86-64 alone), or use pyav"
        ) from error
    return decord


class DecordReader:
    """A VideoReader over decord.

    Raises:
        BackendUnfitError: when decord would not show the frames of this file that PyAV does.
        DecodeError: when the video cannot be opened.
        RuntimeError: see `load_decord`.
    """

    def __init__(self, source: str | bytes, image_size: int, *, limits: MediaLimits | None = None) -> None:
        decord = load_decord()
        if isinstance(source, bytes) or not is_local_file(source):
            raise BackendUnfitError("decord is given whole local files alone, as it copies all others many times over")
        self._name, self._size = source, image_size
        self._facts = read_stream_info(source, limits or MediaLimits())
        _check_fit(self._facts)
        path = storage.split_uri(source)[1]
        self._errors = (decord.DECORDError, decord.DECORDLimitReachedError)
        try:
            self._reader = decord.VideoReader(path, width=image_size, height=image_size, num_threads=1)
            starts = self._reader.get_frame_timestamp(range(len(self._reader)))[:, 0]
        except self._errors as error:
            raise BackendUnfitError(f"decord does not open it: {error}") from error
        _check_times(np.sort(starts.astype(np.float64)), self._facts)

    def sample(self, times: Sequence[Fraction]) -> FrameBatch:
        """See `VideoReader.sample`."""
        facts = self._facts
        ticks = np.array([int(t // facts.time_base) for t in times], np.int64)
        kept = ticks < facts.end_tick
        numbers = np.maximum(0, np.searchsorted(facts.ticks, ticks[kept], side="right") - 1)
        try:
            frames = self._reader.get_batch(numbers).asnumpy() if len(numbers) else self._no_frames()
        except self._errors as error:
            raise DecodeError("decode_video", ErrorType.CORRUPT_FILE, f"{self._name}: {error}") from error
        return FrameBatch(
            frames,
            np.array([float(int(tick) * facts.time_base) for tick in facts.ticks[numbers]]),
            np.array([float(t) for t, is_kept in zip(times, kept, strict=True) if is_kept]),
            int((ticks >= facts.end_tick + math.ceil(MAX_TAIL_SECONDS / facts.time_base)).sum()),
        )

    def close(self) -> None:
        """See `VideoReader.close`."""
        del self._reader

    def _no_frames(self) -> np.ndarray:
        return np.empty((0, self._size, self._size, 3), np.uint8)


def _check_fit(facts: StreamInfo) -> None:
    """Passes for what decord may be right about."""
    if facts.starts_anywhere:
        raise BackendUnfitError("decord does not find frames in a format whose clock starts anywhere")
    if facts.num_video_streams > 1:
        raise BackendUnfitError("decord may take another of its video streams")
    if not facts.is_timed or not len(facts.ticks):
        raise BackendUnfitError("its packets do not say when their frames are shown")
    if facts.orientation != UPRIGHT:
        raise BackendUnfitError("decord turns few kinds of files upright, and mirrors none")


def _check_times(seconds: np.ndarray, facts: StreamInfo) -> None:
    """Passes when decord's times are those of the packets."""
    expected = facts.ticks * float(facts.time_base)
    tolerance = np.maximum(ROUNDING_SECONDS, expected * np.finfo(np.float32).eps)
    if len(seconds) != len(expected) or bool((np.abs(seconds - expected) > tolerance).any()):
        raise BackendUnfitError("decord gives its frames other times than the packets say")
