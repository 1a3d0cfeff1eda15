"""Renders scenes to H.264 files and pictures to image files. Does not import torch: it runs in a process pool."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
from PIL import Image

from timeviper_platform.data.synthetic.backgrounds import Background, film_frames, generated_frames
from timeviper_platform.data.synthetic.pictures import Picture, Placement, draw_picture
from timeviper_platform.data.synthetic.scenes import Scene

X264_OPTIONS = {"preset": "ultrafast", "crf": "25", "g": "16", "threads": "1"}
"""One thread, so that bytes do not depend on the number of cores; frequent keyframes, for cheap seeking."""


def background_frames(
    background: Background, num_frames: int, *, side: int, fps: int, film: str
) -> Iterator[np.ndarray]:
    """uint8 (side, side, 3) frames. `film` is the path of the array of `read_film`, empty if unused."""
    if background.kind == "generated":
        return generated_frames(background.segments[0], num_frames, side)
    return film_frames(_film(film), background.segments, num_frames, fps)


def scene_frames(scene: Scene, *, side: int, fps: int, film: str = "") -> Iterator[np.ndarray]:
    frames = background_frames(scene.background, scene.duration_seconds * fps, side=side, fps=fps, film=film)
    for number, frame in enumerate(frames):
        appearance = scene.appearance_at(number / fps)
        if appearance is not None:
            draw_picture(frame, appearance.picture, appearance.placement)
        yield frame


def write_video(path: Path, frames: Iterator[np.ndarray], *, side: int, fps: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options=X264_OPTIONS)
        stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def write_image(
    path: Path, picture: Picture, placement: Placement, background: Background, *, side: int, fps: int, film: str
) -> None:
    frame = next(background_frames(background, 1, side=side, fps=fps, film=film))
    draw_picture(frame, picture, placement)
    Image.fromarray(frame).save(path, quality=92)


@lru_cache(maxsize=1)
def _film(path: str) -> np.ndarray:
    frames: np.ndarray = np.load(path, mmap_mode="r")
    return frames
