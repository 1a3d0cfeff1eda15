"""The 32 pictures (8 colours x 4 shapes), drawn onto frames."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 30),
    "green": (20, 160, 40),
    "blue": (30, 60, 225),
    "yellow": (245, 225, 30),
    "orange": (250, 140, 20),
    "purple": (140, 40, 180),
    "cyan": (40, 215, 225),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "cross")

OUTLINE = (15, 15, 15)
OUTLINE_SHARE = 0.14
"""Outline width as a share of half the side: 2-4 pixels survive 4:2:0 and scaling."""
OVERSAMPLING = 4
"""Sub-pixels along each side, for soft edges."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A coloured shape; questions and answers use `str(picture)`.

    Raises:
        ValueError: for an unknown colour or shape.
    """

    color: str
    shape: str

    def __post_init__(self) -> None:
        if self.color not in COLORS or self.shape not in SHAPES:
            raise ValueError(f"no picture {self}; colours are {', '.join(COLORS)}, shapes {', '.join(SHAPES)}")

    def __str__(self) -> str:
        return f"{self.color} {self.shape}"


ALL_PICTURES = tuple(Picture(color, shape) for color in COLORS for shape in SHAPES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    left: float
    top: float
    side: float


def draw_picture(frame_HWC: np.ndarray, picture: Picture, placement: Placement) -> None:
    side_px = frame_HWC.shape[0]
    side = round(placement.side * side_px)
    top, left = round(placement.top * side_px), round(placement.left * side_px)
    fill, whole = _masks(picture.shape, side)
    window = frame_HWC[top : top + side, left : left + side].astype(np.float32)
    outline = np.array(OUTLINE, dtype=np.float32)
    window += whole * (outline - window)
    window += fill * (np.array(COLORS[picture.color], dtype=np.float32) - window)
    frame_HWC[top : top + side, left : left + side] = np.rint(window).astype(np.uint8)


@lru_cache(maxsize=512)
def _masks(shape: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Coverage (side, side, 1) in 0..1 of the coloured part, without and with its outline."""
    steps = side * OVERSAMPLING
    axis = (np.arange(steps) + 0.5) / steps * 2 - 1
    x, y = axis[None, :], axis[:, None]
    inside = [_inside(shape, x, y, margin) for margin in (OUTLINE_SHARE, 0.0)]
    fill, whole = (
        m.reshape(side, OVERSAMPLING, side, OVERSAMPLING).mean((1, 3), dtype=np.float32)[..., None] for m in inside
    )
    return fill, whole


def _inside(shape: str, x: np.ndarray, y: np.ndarray, margin: float) -> np.ndarray:
    """Whether points of the square [-1, 1]^2 (y downwards) lie in the shape, `margin` away from its edge."""
    if shape == "circle":
        return x**2 + y**2 <= (1 - margin) ** 2
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 0.88 - margin
    if shape == "triangle":  # tip up: its sides run from (0, -1) to (+-1, 1), their normal has length sqrt(5) / 2
        return (y <= 1 - margin) & (abs(x) * 2 - y <= 1 - margin * np.sqrt(5))
    arm = 0.36 - margin / 2
    return (np.minimum(abs(x), abs(y)) <= arm) & (np.maximum(abs(x), abs(y)) <= 1 - margin)
