"""Sampling with decord, behind the same protocol as PyAV. Optional: decord has had no release since 2021.

Knows decord's reader alone. It decodes every frame up to each keyframe run, offers frame numbers rather than PTS ticks
(so PTS come as floats), and on bytes it would copy the file many times over: only local files are taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from timeviper_platform import storage
from timeviper_platform.data.decode import FrameBatch, check_size
from timeviper_platform.data.media import DecodeError, ErrorType, MediaLimits, is_local_file
from timeviper_platform.data.probe import probe_media

ROUNDING_SECONDS = 1e-5
"""decord states PTS as float32 seconds; at ten minutes they are 6e-5 apart, rounded by half of that."""


class DecordReader:
    """A VideoReader over decord.

    Raises:
        DecodeError: when the video cannot be opened, or is not a local file.
    """

    def __init__(self, source: str | bytes, image_size: int, *, limits: MediaLimits | None = None) -> None:
        import decord

        if isinstance(source, bytes) or not is_local_file(source):
            raise ValueError("decord copies file objects many times over; use backend pyav for remote files and bytes")
        self._name = source
        self._limits = limits or MediaLimits()
        probe = probe_media(source, self._limits)
        check_size(probe.width, probe.height, self._limits, "decode_video", source)
        path = storage.split_uri(source)[1]
        self._errors = (decord.DECORDError, decord.DECORDLimitReachedError)
        try:
            self._reader = decord.VideoReader(path, width=image_size, height=image_size, num_threads=1)
            starts = self._reader.get_frame_timestamp(range(len(self._reader)))[:, 0]
        except self._errors as error:
            raise DecodeError("decode_video", ErrorType.CORRUPT_FILE, f"{source}: {error}") from error
        self._pts = np.sort(starts.astype(np.float64))

    def sample(self, times: Sequence[Fraction]) -> FrameBatch:
        """See `VideoReader.sample`."""
        seconds = np.array([float(t) for t in times])
        tolerance = np.maximum(ROUNDING_SECONDS, np.abs(seconds) * np.finfo(np.float32).eps)
        numbers = np.maximum(0, np.searchsorted(self._pts, seconds + tolerance, side="right") - 1)
        try:
            frames = self._reader.get_batch(numbers).asnumpy()
        except self._errors as error:
            raise DecodeError("decode_video", ErrorType.CORRUPT_FILE, f"{self._name}: {error}") from error
        return FrameBatch(frames, self._pts[numbers], seconds)

    def close(self) -> None:
        """See `VideoReader.close`."""
        del self._reader
