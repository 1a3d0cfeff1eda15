"""Draws scenes from a seed: which pictures appear in a video, when, and on which background."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from timeviper_platform.data.synthetic.backgrounds import FILM_SEGMENT_SECONDS, Background, Split
from timeviper_platform.data.synthetic.pictures import ALL_PICTURES, Picture, Placement

SceneKind = Literal["needle", "order", "count"]
NUM_ORDER_PICTURES = 4
MAX_COUNT = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Appearance:
    picture: Picture
    placement: Placement
    start_seconds: int
    end_seconds: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One video, with at least a second between its appearances.

    Raises:
        ValueError: if appearances touch, or end after the video.
    """

    media_id: str
    split: Split
    kind: SceneKind
    duration_seconds: int
    background: Background
    appearances: tuple[Appearance, ...]

    def __post_init__(self) -> None:
        ends = [0, *(a.end_seconds + 1 for a in self.appearances)]
        starts = [*(a.start_seconds for a in self.appearances), self.duration_seconds + 1]
        if any(start < end for end, start in zip(ends, starts, strict=True)):
            raise ValueError(f"{self.media_id}: appearances overlap or leave the {self.duration_seconds} s video")

    def appearance_at(self, seconds: float) -> Appearance | None:
        return next((a for a in self.appearances if a.start_seconds <= seconds < a.end_seconds), None)


def draw_scenes(
    split: Split,
    counts: dict[SceneKind, int],
    *,
    duration_seconds: int,
    seed: int,
    film_segments: Sequence[int] = (),
    film_share: float = 0.0,
    needle_seconds: tuple[int, int] = (3, 8),
) -> Iterator[Scene]:
    """Draws `counts` scenes of each kind; the same arguments give the same scenes.

    Args:
        needle_seconds: shortest and longest appearance in scenes of the kind `needle`.
    """
    for kind_number, (kind, count) in enumerate(counts.items()):
        for number in range(count):
            split_number = 0 if split == "train" else 1
            rng = np.random.default_rng([seed, split_number, kind_number, number])
            background = _draw_background(
                rng, duration_seconds, film_segments if rng.random() < film_share else (), split_number
            )
            yield Scene(
                media_id=f"{split.replace('_', '-')}-{kind}-{number:05d}",
                split=split,
                kind=kind,
                duration_seconds=duration_seconds,
                background=background,
                appearances=tuple(_draw_appearances(rng, kind, duration_seconds, needle_seconds)),
            )


def draw_placement(rng: np.random.Generator) -> Placement:
    """A large picture at a random position. At half the side the tiny encoder confused 25 % of the shapes."""
    side = float(rng.uniform(0.6, 0.7))
    left, top = rng.uniform(0, 1 - side, size=2)
    return Placement(left=float(left), top=float(top), side=side)


def _draw_background(
    rng: np.random.Generator, duration_seconds: int, film_segments: Sequence[int], split_number: int
) -> Background:
    if not film_segments:
        # the lowest bit is the split, so that splits never share a seed
        return Background(kind="generated", segments=(int(rng.integers(2**30)) * 2 + split_number,))
    count = min(len(film_segments), -(-duration_seconds // FILM_SEGMENT_SECONDS))
    first = int(rng.integers(len(film_segments) - count + 1))
    return Background(kind="film", segments=tuple(film_segments[first : first + count]))


def _draw_appearances(
    rng: np.random.Generator, kind: SceneKind, duration_seconds: int, needle_seconds: tuple[int, int]
) -> Iterator[Appearance]:
    if kind == "needle":
        lengths = [int(rng.integers(*needle_seconds, endpoint=True))]
        pictures = [_draw_pictures(rng, 1)[0]]
    elif kind == "order":
        lengths = [int(n) for n in rng.integers(2, 5, size=NUM_ORDER_PICTURES)]
        pictures = _draw_pictures(rng, NUM_ORDER_PICTURES)
    else:
        lengths = [int(n) for n in rng.integers(2, 5, size=int(rng.integers(1, MAX_COUNT + 1)))]
        pictures = _draw_pictures(rng, 1) * len(lengths)
    starts = _draw_starts(rng, lengths, duration_seconds)
    for picture, start, length in zip(pictures, starts, lengths, strict=True):
        yield Appearance(
            picture=picture, placement=draw_placement(rng), start_seconds=start, end_seconds=start + length
        )


def _draw_pictures(rng: np.random.Generator, count: int) -> list[Picture]:
    return [ALL_PICTURES[int(n)] for n in rng.choice(len(ALL_PICTURES), size=count, replace=False)]


def _draw_starts(rng: np.random.Generator, lengths: Sequence[int], duration_seconds: int) -> list[int]:
    """Integer start times, uniform over all arrangements with an empty second between intervals."""
    # stars and bars: choose which of the free seconds are followed by an interval
    free = duration_seconds - sum(lengths) - (len(lengths) - 1)
    gaps = np.sort(rng.choice(free + len(lengths), size=len(lengths), replace=False))
    starts = [int(gaps[0])]
    for length, (before, after) in zip(lengths, pairwise(gaps), strict=False):
        starts.append(starts[-1] + length + int(after - before))
    return starts
