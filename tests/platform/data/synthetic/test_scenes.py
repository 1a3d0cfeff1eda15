from __future__ import annotations

import itertools

import numpy as np
import pytest

from timeviper_platform.data.synthetic.backgrounds import Background, film_segments
from timeviper_platform.data.synthetic.pictures import ALL_PICTURES, COLORS, Picture, Placement, draw_picture
from timeviper_platform.data.synthetic.scenes import Appearance, Scene, SceneKind, draw_scenes

COUNTS: dict[SceneKind, int] = {"needle": 60, "order": 60, "count": 60}


def _scenes(split: str = "train", **changes: object) -> list[Scene]:
    values: dict[str, object] = {"duration_seconds": 24, "seed": 7, **changes}
    return list(draw_scenes(split, COUNTS, **values))  # type: ignore[arg-type]


def test_a_seed_determines_the_scenes() -> None:
    assert _scenes() == _scenes()
    assert _scenes() != _scenes(seed=8)


def test_scenes_match_their_kind() -> None:
    for scene in _scenes():
        pictures = [appearance.picture for appearance in scene.appearances]
        if scene.kind == "needle":
            assert len(pictures) == 1
        elif scene.kind == "order":
            assert len(set(pictures)) == 4
        else:
            assert len(set(pictures)) == 1
            assert 1 <= len(pictures) <= 4


def test_at_least_a_second_separates_two_appearances() -> None:
    for scene in _scenes():
        for before, after in itertools.pairwise(scene.appearances):
            assert after.start_seconds > before.end_seconds
        assert scene.appearances[0].start_seconds >= 0
        assert scene.appearances[-1].end_seconds <= 24


def test_needles_start_anywhere_in_the_video() -> None:
    starts = {scene.appearances[0].start_seconds for scene in _scenes()[:60]}
    assert min(starts) <= 1
    assert max(starts) >= 16
    assert len(starts) >= 15


def test_overlapping_appearances_are_refused() -> None:
    placement = Placement(left=0, top=0, side=0.6)
    touching = [
        Appearance(picture=ALL_PICTURES[0], placement=placement, start_seconds=a, end_seconds=b)
        for a, b in ((2, 5), (5, 8))
    ]
    with pytest.raises(ValueError, match="overlap"):
        Scene(
            media_id="x",
            split="train",
            kind="count",
            duration_seconds=24,
            background=Background(kind="generated", segments=(1,)),
            appearances=tuple(touching),
        )


def test_train_and_held_out_share_no_background_segment() -> None:
    film = {split: film_segments(600 * 4, 4, split) for split in ("train", "held_out")}  # type: ignore[arg-type]
    names = {}
    for split, segments in film.items():
        scenes = _scenes(split, film_segments=segments, film_share=0.5)
        names[split] = {name for scene in scenes for name in scene.background.segment_names}
        kinds = {scene.background.kind for scene in scenes}
        assert kinds == {"film", "generated"}
    assert not names["train"] & names["held_out"]
    assert {scene.media_id for scene in _scenes()}.isdisjoint(scene.media_id for scene in _scenes("held_out"))


def test_generated_backgrounds_of_the_splits_differ() -> None:
    seeds = {split: {scene.background.segments[0] % 2 for scene in _scenes(split)} for split in ("train", "held_out")}
    assert seeds == {"train": {0}, "held_out": {1}}


@pytest.mark.parametrize("picture", ALL_PICTURES, ids=str)
def test_a_picture_changes_only_its_own_pixels(picture: Picture) -> None:
    frame = np.full((96, 96, 3), 128, dtype=np.uint8)
    draw_picture(frame, picture, Placement(left=0.2, top=0.2, side=0.6))
    assert tuple(frame[50, 48]) == COLORS[picture.color]
    changed = (frame != 128).any(-1)
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    assert 18 <= rows.min() <= rows.max() <= 77
    assert 18 <= columns.min() <= columns.max() <= 77


def test_shapes_of_one_colour_differ_by_many_pixels() -> None:
    frames = []
    for picture in ALL_PICTURES[:4]:
        frame = np.full((96, 96, 3), 128, dtype=np.uint8)
        draw_picture(frame, picture, Placement(left=0.2, top=0.2, side=0.6))
        frames.append(frame)
    for first, second in itertools.combinations(frames, 2):
        assert (first != second).any(-1).sum() > 300


def test_unknown_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="no picture pink circle"):
        Picture("pink", "circle")
