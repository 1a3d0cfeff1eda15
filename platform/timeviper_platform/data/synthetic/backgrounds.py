"""Moving backgrounds: generated patterns or film segments, each used by one split only."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import av
import numpy as np

logger = logging.getLogger(__name__)

Split = Literal["train", "held_out"]
FILM_SEGMENT_SECONDS = 6
HELD_OUT_EVERY = 4
MAX_FILM_SECONDS = 900
"""150 segments, decoded in half a minute."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Background:
    kind: Literal["generated", "film"]
    segments: tuple[int, ...]
    """One seed of a generated pattern, or indices of film segments."""

    @property
    def segment_names(self) -> list[str]:
        return [f"{self.kind}:{number}" for number in self.segments]


def generated_frames(seed: int, num_frames: int, side: int) -> Iterator[np.ndarray]:
    """uint8 (side, side, 3) frames that pan over a seeded pattern."""
    rng = np.random.default_rng(seed)
    canvas = _PATTERNS[int(rng.integers(len(_PATTERNS)))](rng, 2 * side)
    start, stop = rng.uniform(0, side, size=(2, 2))
    for number in range(num_frames):
        top, left = np.rint(start + (stop - start) * number / max(1, num_frames - 1)).astype(int)
        yield canvas[top : top + side, left : left + side].copy()


def film_segments(num_film_frames: int, fps: int, split: Split) -> list[int]:
    numbers = range(num_film_frames // (FILM_SEGMENT_SECONDS * fps))
    return [n for n in numbers if (n % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == (split == "held_out")]


def film_frames(film_FHWC: np.ndarray, segments: tuple[int, ...], num_frames: int, fps: int) -> Iterator[np.ndarray]:
    """`num_frames` frames of the given segments, repeated if too short."""
    segment_frames = FILM_SEGMENT_SECONDS * fps
    for number in range(num_frames):
        segment, offset = divmod(number, segment_frames)
        yield film_FHWC[segments[segment % len(segments)] * segment_frames + offset].copy()


def read_film(path: Path, fps: int, side: int) -> np.ndarray:
    """Frames at 0, 1/fps, 2/fps ... seconds, at most MAX_FILM_SECONDS: uint8 (F, side, side, 3).

    Raises:
        ValueError: if the file is not a readable video, or too short for two held-out segments.
    """
    frames: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                seconds = float(frame.pts * stream.time_base) if frame.pts is not None else len(frames) / fps
                if seconds >= MAX_FILM_SECONDS:
                    break
                if seconds * fps >= len(frames):
                    small = frame.to_ndarray(format="rgb24", width=side, height=side, interpolation="AREA")
                    # a gap is filled with the frame that follows it
                    frames += [small] * (int(seconds * fps) + 1 - len(frames))
    except (OSError, av.FFmpegError, IndexError) as error:
        raise ValueError(f"cannot cut backgrounds from {path}: {error}; pass a film that FFmpeg reads") from error
    needed = 2 * HELD_OUT_EVERY * FILM_SEGMENT_SECONDS
    if len(frames) < needed * fps:
        raise ValueError(f"{path} is {len(frames) / fps:.0f} s long; backgrounds need {needed} s: leave `film` out")
    logger.info("film %s: %d frames at %d fps for backgrounds", path.name, len(frames), fps)
    return np.stack(frames)


def _waves(rng: np.random.Generator, size: int) -> np.ndarray:
    x, y = np.meshgrid(np.arange(size), np.arange(size))
    canvas = np.zeros((size, size, 3))
    for _ in range(4):
        fx, fy = rng.uniform(-0.12, 0.12, size=2)
        canvas += np.sin(x * fx + y * fy + rng.uniform(0, 6.28))[..., None] * rng.uniform(10, 30, size=3)
    return _muted(canvas + rng.uniform(80, 170, size=3))


def _checker(rng: np.random.Generator, size: int) -> np.ndarray:
    cell = int(rng.integers(6, 20))
    odd = (np.indices((size, size)) // cell).sum(0) % 2
    return _muted(np.where(odd[..., None] == 1, rng.uniform(40, 215, size=3), rng.uniform(40, 215, size=3)))


def _blocks(rng: np.random.Generator, size: int) -> np.ndarray:
    cell = int(rng.integers(8, 24))
    count = -(-size // cell)
    coarse = rng.uniform(40, 215, size=(count, count, 3))
    return _muted(coarse.repeat(cell, 0).repeat(cell, 1)[:size, :size])


def _bands(rng: np.random.Generator, size: int) -> np.ndarray:
    x, y = np.meshgrid(np.arange(size), np.arange(size))
    phase = np.sin((x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1)) * rng.uniform(0.05, 0.3))[..., None]
    first, second = rng.uniform(40, 215, size=(2, 3))
    return _muted(first + (second - first) * (phase + 1) / 2)


def _muted(canvas: np.ndarray) -> np.ndarray:
    """Desaturates by half, so that pictures stand out."""
    grey = canvas.mean(-1, keepdims=True)
    return np.clip((canvas + grey) / 2, 0, 255).astype(np.uint8)


_PATTERNS = (_waves, _checker, _blocks, _bands)
