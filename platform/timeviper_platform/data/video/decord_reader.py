"""Samples with decord (optional), from local files whose timestamps it reads correctly.

decord itself scales bilinear only. For bicubic it returns full-size frames, one at a time, and Pillow scales them, as
in the public code.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image

from timeviper_platform.common import storage
from timeviper_platform.data.media.container import DecodeError, ErrorType, MediaLimits, is_local_file
from timeviper_platform.data.video.frames import MAX_TAIL_SECONDS, BackendUnfitError, FrameBatch, Resample
from timeviper_platform.data.video.orientation import UPRIGHT
from timeviper_platform.data.video.pictures import scaled
from timeviper_platform.data.video.stream_info import StreamInfo, read_stream_info

ROUNDING_SECONDS = 1e-5
"""Tolerance for decord's PTS, which are float32 seconds."""


def load_decord() -> Any:
    """Imports decord. Raises RuntimeError when it does not load."""
    try:
        import decord
    except (ImportError, OSError, RuntimeError) as error:
        raise RuntimeError(
            f"backend decord does not load ({error}); pip install decord (wheels exist for x86-64 only), or use pyav"
        ) from error
    return decord


class DecordReader:
    """VideoReader over decord. Raises BackendUnfitError for files that it would misread."""

    def __init__(
        self,
        source: str | bytes,
        image_size: int,
        *,
        limits: MediaLimits | None = None,
        resample: Resample = "bicubic",
    ) -> None:
        decord = load_decord()
        if isinstance(source, bytes) or not is_local_file(source):
            raise BackendUnfitError("decord copies all but whole local files many times over")
        self._name, self._size, self._resample = source, image_size, resample
        self._info = read_stream_info(source, limits or MediaLimits())
        _check_fit(self._info)
        path = storage.split_uri(source)[1]
        self._errors = (decord.DECORDError, decord.DECORDLimitReachedError)
        try:
            scaled_size = image_size if resample == "bilinear" else -1  # -1 = the frame's own
            self._reader = decord.VideoReader(path, width=scaled_size, height=scaled_size, num_threads=1)
            starts = self._reader.get_frame_timestamp(range(len(self._reader)))[:, 0]
        except self._errors as error:
            raise BackendUnfitError(f"decord cannot open it: {error}") from error
        _check_times(np.sort(starts.astype(np.float64)), self._info)

    def sample(self, times: Sequence[Fraction]) -> FrameBatch:
        info = self._info
        ticks = np.array([info.clock.tick(t) for t in times], np.int64)
        kept = ticks < info.end_tick
        indices = np.maximum(0, np.searchsorted(info.ticks, ticks[kept], side="right") - 1)
        try:
            frames = self._read(indices) if len(indices) else self._no_frames()
        except self._errors as error:
            raise DecodeError("decode_video", ErrorType.CORRUPT_FILE, f"{self._name}: {error}") from error
        return FrameBatch(
            frames,
            np.array([float(info.clock.seconds(int(tick))) for tick in info.ticks[indices]]),
            np.array([float(t) for t, is_kept in zip(times, kept, strict=True) if is_kept]),
            int((ticks >= info.end_tick + info.clock.ticks_in(MAX_TAIL_SECONDS)).sum()) if info.is_cut_short else 0,
        )

    def close(self) -> None:
        del self._reader

    def _read(self, indices: np.ndarray) -> np.ndarray:
        if self._resample == "bilinear":
            return np.asarray(self._reader.get_batch(indices).asnumpy())
        unique, positions = np.unique(indices, return_inverse=True)
        return np.stack([self._read_scaled(index) for index in unique])[positions]

    def _read_scaled(self, index: int) -> np.ndarray:
        full_size = self._reader.get_batch([index]).asnumpy()[0]
        return scaled(Image.fromarray(full_size), self._size, self._resample)

    def _no_frames(self) -> np.ndarray:
        return np.empty((0, self._size, self._size, 3), np.uint8)


def _check_fit(info: StreamInfo) -> None:
    if info.clock.may_jump:
        raise BackendUnfitError("decord cannot seek in formats whose clock does not start at 0")
    if info.num_video_streams > 1:
        raise BackendUnfitError("decord may select another video stream")
    if not len(info.ticks):
        raise BackendUnfitError("it has no packets")
    if info.orientation != UPRIGHT:
        raise BackendUnfitError("decord rotates few formats and mirrors none")


def _check_times(seconds: np.ndarray, info: StreamInfo) -> None:
    expected = info.ticks * float(info.clock.time_base)
    tolerance = np.maximum(ROUNDING_SECONDS, expected * np.finfo(np.float32).eps)
    if len(seconds) != len(expected) or bool((np.abs(seconds - expected) > tolerance).any()):
        raise BackendUnfitError("decord's timestamps differ from those of the packets")
