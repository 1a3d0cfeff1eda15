"""Samples frames of a video or picture file, for notebooks; the platform's readers serve everything else."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from timeviper_model.layers.vision_transformer import Resample


def read_video(
    path: str,
    image_size: int,
    *,
    fps: float = 1.0,
    max_frames: int = 256,
    frame_selection: Literal["uniform", "first"] = "uniform",
    resample: Resample = "bicubic",
) -> tuple[Tensor, float]:
    """Returns uint8 frames (F, S, S, 3) and the duration in seconds.

    The frame of time t = k / fps is the last with PTS <= t, as in preprocessing.

    Raises:
        ValueError: if the file has no frame.
    """
    import av

    with av.open(path) as container:
        if not container.streams.video:
            raise ValueError(f"{path} has no video stream")
        stream = container.streams.video[0]
        seconds = _duration(container, stream)
        times = [index / fps for index in _selected(max(1, math.ceil(seconds * fps)), max_frames, frame_selection)]
        frames: list[np.ndarray] = []
        shown: Any = None
        origin = 0.0
        for frame in container.decode(stream):
            if frame.time is None:
                continue
            origin = frame.time if shown is None else origin
            while shown is not None and len(frames) < len(times) and times[len(frames)] < frame.time - origin:
                frames.append(_scaled(shown, image_size, resample))
            shown = frame
            if len(frames) == len(times):
                break
    if shown is None:
        raise ValueError(f"{path}: no frame could be decoded")
    seconds = max(seconds, shown.time - origin)
    frames += [_scaled(shown, image_size, resample) for _ in times[len(frames) :]]
    return torch.from_numpy(np.stack(frames)), seconds


def read_picture(picture: Any, image_size: int, *, resample: Resample = "bicubic") -> Tensor:
    """Returns a path or a Pillow image as one uint8 frame (1, S, S, 3)."""
    from PIL import Image, ImageOps

    image = picture if isinstance(picture, Image.Image) else Image.open(picture)
    method = Image.Resampling.BICUBIC if resample == "bicubic" else Image.Resampling.BILINEAR
    upright = ImageOps.exif_transpose(image).convert("RGB")
    return torch.from_numpy(np.array(upright.resize((image_size, image_size), method)))[None]


def _duration(container: Any, stream: Any) -> float:
    """The longer of stream and container: a stream's may end with the start of its last frame."""
    return max(float((stream.duration or 0) * stream.time_base), float(container.duration or 0) / 1e6)


def _selected(count: int, max_frames: int, frame_selection: Literal["uniform", "first"]) -> list[int]:
    if count <= max_frames or frame_selection == "first":
        return list(range(min(count, max_frames)))
    if max_frames == 1:
        return [(count - 1) // 2]
    return [(k * (count - 1) + (max_frames - 1) // 2) // (max_frames - 1) for k in range(max_frames)]


def _scaled(frame: Any, image_size: int, resample: Resample) -> np.ndarray:
    from av.video.reformatter import Interpolation

    method = Interpolation.BICUBIC if resample == "bicubic" else Interpolation.BILINEAR
    pixels = frame.reformat(image_size, image_size, "rgb24", interpolation=method).to_ndarray()
    return np.ascontiguousarray(np.rot90(pixels, k=round(frame.rotation / 90)))
