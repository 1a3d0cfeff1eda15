"""Strategies to read the frames on screen at given times, each on one thread.

All except decord and `sample_keyframes` give the same bits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from timeviper_platform.data.video.frames import VideoReader
from timeviper_platform.data.video.pyav_reader import PyAVReader
from timeviper_platform.data.video.reader import open_video

FRAMES_PER_CALL = 64

Strategy = Callable[[Path, Sequence[Fraction], int], Iterator[np.ndarray]]
"""(file, times, image size) -> batches (F, S, S, 3) uint8."""


def sample_ours(path: Path, times: Sequence[Fraction], image_size: int) -> Iterator[np.ndarray]:
    yield from _sample(open_video(str(path), image_size), times)


def sample_keyframes(path: Path, times: Sequence[Fraction], image_size: int) -> Iterator[np.ndarray]:
    """The last keyframe of the second before each time, if any."""
    yield from _sample(open_video(str(path), image_size, keyframe_step=Fraction(1)), times)


def sample_with_decord(path: Path, times: Sequence[Fraction], image_size: int) -> Iterator[np.ndarray]:
    """Scales bilinearly, the only way decord can."""
    yield from _sample(open_video(str(path), image_size, backend="decord", resample="bilinear"), times)


def sample_selectively(path: Path, times: Sequence[Fraction], image_size: int) -> Iterator[np.ndarray]:
    """One pass from the start that skips unreferenced frames."""
    yield from _sample(_Walker(str(path), image_size), times)


def sample_sequentially(path: Path, times: Sequence[Fraction], image_size: int) -> Iterator[np.ndarray]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        yield from _pick(container.decode(stream), deque(times), Fraction(stream.time_base), image_size)


def sample_by_seeking(path: Path, times: Sequence[Fraction], image_size: int) -> Iterator[np.ndarray]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        time_base = Fraction(stream.time_base)
        for t in times:
            container.seek(int(t / time_base), stream=stream)
            yield from _pick(container.decode(stream), deque([t]), time_base, image_size)


STRATEGIES: dict[str, Strategy] = {
    "every frame": sample_sequentially,
    "references alone": sample_selectively,
    "seeks": sample_by_seeking,
    "decord": sample_with_decord,
}
"""Compared with ours."""


class _Walker(PyAVReader):
    def _is_due(self) -> bool:
        return True

    def _jump(self) -> bool:
        return False


def _sample(reader: VideoReader, times: Sequence[Fraction]) -> Iterator[np.ndarray]:
    for start in range(0, len(times), FRAMES_PER_CALL):
        yield reader.sample(times[start : start + FRAMES_PER_CALL]).frames
    reader.close()


def _pick(
    frames: Iterable[av.VideoFrame], times: deque[Fraction], time_base: Fraction, image_size: int
) -> Iterator[np.ndarray]:
    scaler = VideoReformatter()
    shown = None
    for frame in frames:
        while times and shown is not None and frame.pts * time_base > times[0]:
            times.popleft()
            yield _scale(scaler, shown, image_size)
        if not times:
            return
        shown = frame
    while times and shown is not None:
        times.popleft()
        yield _scale(scaler, shown, image_size)


def _scale(scaler: VideoReformatter, frame: av.VideoFrame, size: int) -> np.ndarray:
    scaled = scaler.reformat(frame, size, size, "rgb24", interpolation=Interpolation.BICUBIC, threads=1)
    return np.asarray(scaled.to_ndarray())[None]
