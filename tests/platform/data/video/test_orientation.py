"""Every way of sampling applies the display matrix, as players do."""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from reference.synthetic_media import make_video
from timeviper_platform.data.video.keyframe_reader import KeyframeReader
from timeviper_platform.data.video.orientation import Orientation
from timeviper_platform.data.video.reader import open_video, read_frames

SIZE = 32
TURNS = list(product((0, 90, 180, 270), (False, True), (False, True)))


def shown(frames: np.ndarray, turned: tuple[int, bool, bool]) -> np.ndarray:
    """(F, S, S, 3) stored pixels as a player shows them."""
    degrees, is_mirrored, is_upended = turned
    frames = np.rot90(frames, degrees // 90, axes=(1, 2))
    return frames[:, :: -1 if is_upended else 1, :: -1 if is_mirrored else 1]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The same frames in a video without a display matrix."""
    path = tmp_path_factory.mktemp("plain") / "film.mp4"
    make_video(path, range(24), gop=8)
    return read_frames(str(path), SIZE).frames


@pytest.mark.parametrize("turned", TURNS)
def test_all_quarter_turns_and_mirrors_are_upright(
    tmp_path: Path, stored: np.ndarray, turned: tuple[int, bool, bool]
) -> None:
    path = tmp_path / "film.mp4"
    make_video(path, range(24), gop=8, turned=turned)
    dense = read_frames(str(path), SIZE).frames
    sparse = open_video(str(path), SIZE).sample([Fraction(2)]).frames
    keyframes = KeyframeReader(str(path), SIZE, step=Fraction(1)).sample([Fraction(k) for k in range(3)]).frames
    expected = shown(stored, turned)
    assert np.array_equal(dense, expected)
    assert np.array_equal(sparse, expected[2:])
    assert np.array_equal(keyframes, expected)


@pytest.mark.parametrize("format", ["matroska", "avi"])
def test_matroska_has_a_display_matrix_and_avi_does_not(tmp_path: Path, format: str) -> None:
    plain, turned = tmp_path / "plain", tmp_path / "turned"
    make_video(plain, range(24), format=format, b_frames=0)
    make_video(turned, range(24), format=format, b_frames=0, turned=(90, False, False))
    expected = read_frames(str(plain), SIZE).frames
    if format == "matroska":
        expected = shown(expected, (90, False, False))
    assert np.array_equal(read_frames(str(turned), SIZE).frames, expected)


def test_a_mirror_image_has_no_angle() -> None:
    angles = {
        Orientation(*flags): Orientation(*flags).counterclockwise_degrees for flags in product((False, True), repeat=3)
    }
    assert angles[Orientation()] == 0
    assert angles[Orientation(swaps_axes=True, reverses_rows=True)] == 90
    assert angles[Orientation(reverses_rows=True, reverses_columns=True)] == 180
    assert angles[Orientation(swaps_axes=True, reverses_columns=True)] == 270
    assert list(angles.values()).count(None) == 4
