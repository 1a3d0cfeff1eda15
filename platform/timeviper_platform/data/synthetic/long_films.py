"""Samples about long films: clips of many training videos in a row, of which one shows a picture.

A film is a list of media, whose tokens are consecutive in the prompt, like those of one video; nothing is rendered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from timeviper_platform.data.synthetic.questions import sample_row, which_question
from timeviper_platform.data.synthetic.scenes import Appearance, Scene

FILM_SECONDS = (16, 256)
"""Shortest and longest film; also in frames, at 1 fps."""


class Clip(NamedTuple):
    media_id: str
    start_seconds: int
    end_seconds: int

    @property
    def seconds(self) -> int:
        return self.end_seconds - self.start_seconds

    def as_medium(self) -> dict[str, Any]:
        return {
            "media_id": self.media_id,
            "start_seconds": float(self.start_seconds),
            "end_seconds": float(self.end_seconds),
        }


def empty_clips(scene: Scene) -> Iterator[Clip]:
    """The parts of a video that are at least a second away from its pictures."""
    ends = [0, *(appearance.end_seconds + 1 for appearance in scene.appearances)]
    starts = [*(appearance.start_seconds - 1 for appearance in scene.appearances), scene.duration_seconds]
    for end, start in zip(ends, starts, strict=True):
        if start > end:
            yield Clip(scene.media_id, end, start)


def long_film_samples(scenes: Sequence[Scene], count: int, *, seed: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yields `count` SAMPLES rows with a 'which' question each; the same arguments give the same rows.

    Lengths are uniform in FILM_SECONDS. The picture shows for a second up to the whole of an appearance, at any depth.
    """
    clips = [clip for scene in scenes for clip in empty_clips(scene)]
    pictures = [(scene.media_id, appearance) for scene in scenes for appearance in scene.appearances]
    for number in range(count if clips else 0):
        rng = np.random.default_rng([*seed, number])
        media_id, appearance = pictures[int(rng.integers(len(pictures)))]
        shown = _part(media_id, appearance, rng)
        rest = int(rng.integers(*FILM_SECONDS, endpoint=True)) - shown.seconds
        before = int(rng.integers(rest, endpoint=True))
        media = [*_fill(clips, before, rng), shown, *_fill(clips, rest - before, rng)]
        row = sample_row(f"long-{number:05d}", [which_question(appearance.picture, rng)], media_id=None)
        yield row | {"media": [clip.as_medium() for clip in media]}


def _part(media_id: str, appearance: Appearance, rng: np.random.Generator) -> Clip:
    length = int(rng.integers(1, appearance.end_seconds - appearance.start_seconds, endpoint=True))
    start = int(rng.integers(appearance.start_seconds, appearance.end_seconds - length, endpoint=True))
    return Clip(media_id, start, start + length)


def _fill(clips: Sequence[Clip], seconds: int, rng: np.random.Generator) -> Iterator[Clip]:
    while seconds > 0:
        clip = clips[int(rng.integers(len(clips)))]
        yield clip._replace(end_seconds=min(clip.end_seconds, clip.start_seconds + seconds))
        seconds -= clip.seconds
