"""Opens videos and animations, and reads whole media, as uint8 frames at the encoder's size.

The frame of time t is the last with PTS <= t, or the first. PTS are compared as integer ticks.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Literal

import numpy as np

from timeviper_platform.data.media.container import (
    DecodeError,
    ErrorType,
    MediaFile,
    MediaLimits,
    Modality,
    decode_errors,
    source_name,
)
from timeviper_platform.data.media.probe import probe_media
from timeviper_platform.data.media.signatures import sniff_modality
from timeviper_platform.data.video.frames import BackendUnfitError, FrameBatch, Resample, VideoReader
from timeviper_platform.data.video.pictures import read_image
from timeviper_platform.data.video.sampling import FrameSelection, count_frames, sample_times, select_frames

logger = logging.getLogger(__name__)

Backend = Literal["pyav", "decord", "torchcodec", "nvdec"]


def open_video(
    source: str | bytes,
    image_size: int,
    *,
    limits: MediaLimits | None = None,
    backend: Backend = "pyav",
    keyframe_step: Fraction | None = None,
    joined_parts: int | None = None,
    resample: Resample = "bicubic",
) -> VideoReader:
    """Opens a video with frames scaled to image_size x image_size.

    Args:
        backend: PyAV replaces it for keyframes and on BackendUnfitError, Pillow for animations.
        keyframe_step: see `KeyframeReader`; None = all frames. Ignored for animations.
        joined_parts: see `Medium`; 1 allows seeks in a transport stream.

    Raises:
        DecodeError: when the video cannot be opened.
    """
    with decode_errors("decode_video", source, limits):
        file = MediaFile(source, limits)
    if sniff_modality(file.head) == "image":
        from timeviper_platform.data.video.animation_reader import AnimationReader

        return AnimationReader(source, image_size, limits=limits, resample=resample, file=file)
    if keyframe_step is not None:
        from timeviper_platform.data.video.keyframe_reader import KeyframeReader

        return KeyframeReader(
            source,
            image_size,
            step=keyframe_step,
            limits=limits,
            joined_parts=joined_parts,
            resample=resample,
            file=file,
        )
    try:
        if backend == "decord":
            from timeviper_platform.data.video.decord_reader import DecordReader

            return DecordReader(source, image_size, limits=limits, resample=resample)
        if backend == "torchcodec" or backend == "nvdec":
            from timeviper_platform.data.video.torchcodec_reader import TorchcodecReader

            return TorchcodecReader(source, image_size, limits=limits, backend=backend, resample=resample)
    except BackendUnfitError as reason:
        logger.info("%s: falling back from %s to PyAV: %s", source_name(source), backend, reason)
    from timeviper_platform.data.video.pyav_reader import PyAVReader

    return PyAVReader(source, image_size, limits=limits, joined_parts=joined_parts, resample=resample, file=file)


def check_backend(backend: Backend) -> None:
    """Raises RuntimeError when the backend's library or device is missing."""
    if backend == "decord":
        from timeviper_platform.data.video.decord_reader import load_decord

        load_decord()
    if backend == "torchcodec" or backend == "nvdec":
        from timeviper_platform.data.video.torchcodec_reader import load_torchcodec

        load_torchcodec(backend)


def read_frames(
    source: str | bytes,
    image_size: int,
    *,
    fps: Fraction = Fraction(1),
    max_frames: int | None = None,
    frame_selection: FrameSelection = "uniform",
    limits: MediaLimits | None = None,
    backend: Backend = "pyav",
    resample: Resample = "bicubic",
) -> FrameBatch:
    """Returns a whole medium as one batch, thinned to `max_frames`.

    Raises:
        DecodeError: when it is not a medium, exceeds a limit, or no frame decodes.
    """
    medium = open_medium(
        source,
        image_size,
        fps=fps,
        max_frames=max_frames,
        frame_selection=frame_selection,
        limits=limits,
        backend=backend,
        resample=resample,
    )
    batches = list(medium.batches)
    return FrameBatch(
        np.concatenate([batch.frames for batch in batches]),
        np.concatenate([batch.pts_seconds for batch in batches]),
        np.concatenate([batch.times_seconds for batch in batches]),
        sum(batch.num_missing for batch in batches),
        sum(batch.num_damaged for batch in batches),
    )


@dataclass(frozen=True, slots=True)
class OpenMedium:
    """A probed medium whose frames are yet to be decoded."""

    modality: Modality
    duration_seconds: Fraction
    """0 for a picture."""
    num_frames: int
    """Sampled frames; those that do not decode are missing in `batches`."""
    batches: Iterator[FrameBatch]
    """Decodes while iterating; raises DecodeError."""


def open_medium(
    source: str | bytes,
    image_size: int,
    *,
    fps: Fraction = Fraction(1),
    max_frames: int | None = None,
    frame_selection: FrameSelection = "uniform",
    limits: MediaLimits | None = None,
    backend: Backend = "pyav",
    resample: Resample = "bicubic",
    frames_per_batch: int = 64,
) -> OpenMedium:
    """Probes a medium and chooses its frames, which `batches` decodes.

    Raises:
        DecodeError: when it is not a medium or exceeds a limit.
    """
    limits = limits or MediaLimits()
    probe = probe_media(source, limits)
    if probe.modality == "image":
        pictures = (read_image(source, image_size, limits=limits, resample=resample) for _ in range(1))
        return OpenMedium("image", probe.duration_seconds, 1, pictures)
    count = count_frames(Fraction(0), probe.duration_seconds, fps)
    if count > limits.max_frames:
        message = f"{count} frames at {float(fps)} fps are over {limits.max_frames = }"
        raise DecodeError("decode_video", ErrorType.TOO_MANY_FRAMES, message)
    grid = sample_times(Fraction(0), fps, 0, count)
    times = [
        grid[k] for k in select_frames([float(t) for t in grid], max_frames=max_frames, frame_selection=frame_selection)
    ]

    def batches() -> Iterator[FrameBatch]:
        reader = open_video(
            source, image_size, limits=limits, backend=backend, joined_parts=probe.joined_parts, resample=resample
        )
        num_frames = 0
        try:
            for start in range(0, len(times), frames_per_batch):
                batch = reader.sample(times[start : start + frames_per_batch])
                num_frames += len(batch.frames)
                yield batch
        finally:
            reader.close()
        if num_frames == 0:
            message = f"none of the {len(times)} sampled frames decodes"
            raise DecodeError("decode_video", ErrorType.FRAMES_MISSING, message)

    return OpenMedium("video", probe.duration_seconds, len(times), batches())


class DecoderPool:
    """LRU pool of open videos: opening a film may take seconds."""

    def __init__(
        self,
        image_size: int,
        *,
        limits: MediaLimits | None = None,
        backend: Backend = "pyav",
        max_open: int = 4,
        keyframe_step: Fraction | None = None,
        resample: Resample = "bicubic",
    ) -> None:
        if max_open < 1:
            raise ValueError(f"{max_open = } must be at least 1")
        self._open = partial(
            open_video,
            image_size=image_size,
            limits=limits,
            backend=backend,
            keyframe_step=keyframe_step,
            resample=resample,
        )
        self._max_open = max_open
        self._readers: OrderedDict[str, VideoReader] = OrderedDict()

    def sample(self, uri: str, times: Sequence[Fraction], joined_parts: int | None = None) -> FrameBatch:
        if uri not in self._readers:
            while len(self._readers) >= self._max_open:
                self._readers.popitem(last=False)[1].close()
            self._readers[uri] = self._open(uri, joined_parts=joined_parts)
        self._readers.move_to_end(uri)
        try:
            return self._readers[uri].sample(times)
        except DecodeError:
            self._readers.pop(uri).close()
            raise

    def close(self) -> None:
        while self._readers:
            self._readers.popitem()[1].close()
