from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from timeviper_model.weights.vision_tower import load_vision_tower
from timeviper_platform.data.synthetic.encoder import (
    IMAGE_SIZE,
    NOTHING,
    picture_label,
    save_encoder,
    train_encoder,
    used_features,
)
from timeviper_platform.data.synthetic.pictures import ALL_PICTURES, SHAPES, Placement, draw_picture
from timeviper_platform.data.synthetic.scenes import draw_placement


def _frames(number: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Red pictures of every shape on grey, and their labels."""
    rng = np.random.default_rng(seed)
    frames = np.full((number, IMAGE_SIZE, IMAGE_SIZE, 3), 120, dtype=np.uint8)
    labels = np.arange(number) % len(SHAPES)
    for frame, label in zip(frames, labels, strict=True):
        draw_picture(frame, ALL_PICTURES[label], draw_placement(rng))
    return frames, labels


def test_features_are_centred_with_mean_square_one() -> None:
    frames, labels = _frames(32)
    features = used_features(train_encoder(frames, labels, steps=0, seed=3), frames).detach()
    assert features.mean((0, 1)).abs().max() < 1e-3
    assert abs(float(features.square().mean()) - 1) < 1e-3


def test_the_saved_folder_gives_the_same_features(tmp_path: Path) -> None:
    frames, labels = _frames(8)
    model = train_encoder(frames, labels, steps=2, seed=0)
    save_encoder(model, tmp_path)
    encoder = load_vision_tower(str(tmp_path))
    loaded = encoder(encoder.preprocess(torch.from_numpy(frames)))
    torch.testing.assert_close(loaded, used_features(model, frames).detach(), atol=1e-5, rtol=1e-5)


def test_the_same_seed_gives_the_same_weights_without_touching_the_global_generator() -> None:
    frames, labels = _frames(8)
    torch.manual_seed(5)
    first = train_encoder(frames, labels, steps=2, seed=0).state_dict()
    after = torch.rand(1)
    second = train_encoder(frames, labels, steps=2, seed=0).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after)


@pytest.mark.slow
def test_shapes_are_separable_after_short_training() -> None:
    frames, labels = _frames(256)
    fresh, fresh_labels = _frames(64, seed=1)
    model = train_encoder(frames, labels, steps=60, seed=0)
    with torch.no_grad():
        known, queried = used_features(model, frames).mean(1), used_features(model, fresh).mean(1)
    centres = torch.stack([known[labels == n].mean(0) for n in range(len(SHAPES))])
    nearest = torch.cdist(queried, centres).argmin(1).numpy()
    assert (nearest == fresh_labels).mean() > 0.6  # chance is 0.25


def test_every_picture_has_a_label_and_so_does_no_picture() -> None:
    assert [picture_label(picture) for picture in ALL_PICTURES] == list(range(32))
    assert picture_label(None) == NOTHING == 32
    frame = np.zeros((64, 64, 3), dtype=np.uint8)
    draw_picture(frame, ALL_PICTURES[0], Placement(left=0.1, top=0.1, side=0.6))
    assert frame.any()
