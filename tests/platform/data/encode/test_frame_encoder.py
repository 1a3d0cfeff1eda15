"""A frame's tokens depend neither on the other frames of its batch nor on the other tower."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reference.counted_files import LOG_VARIABLE, reads
from reference.synthetic_media import make_encoder
from timeviper_model.layers.projector import combine_towers
from timeviper_model.layers.vision_transformer import Resample
from timeviper_platform.data.encode.frame_encoder import (
    FrameEncoder,
    TowerConfig,
    VisionTowerConfig,
    describe_encoder,
    resize_frames,
)
from timeviper_platform.data.encode.recipe import recipe_hash


def synthetic_frames(count: int, size: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
def test_a_single_frame_has_the_same_bytes_as_in_a_full_batch_at_width_1152(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path, hidden_size=1152)
    encoder = FrameEncoder(VisionTowerConfig(model=str(folder), num_tokens_per_frame=4, encode_batch_frames=8))
    frames = synthetic_frames(11, encoder.image_size)
    together = encoder.encode(frames)
    assert together.shape == (11, 4, 1152)
    assert together.dtype == torch.bfloat16
    for number in (0, 7, 10):
        alone = encoder.encode(frames[number : number + 1])
        assert torch.equal(alone[0].view(torch.int16), together[number].view(torch.int16))
    backwards = encoder.encode(frames.flip(0)).flip(0)
    assert torch.equal(backwards.view(torch.int16), together.view(torch.int16))


def test_the_batch_shape_is_fixed_and_no_frame_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = FrameEncoder(VisionTowerConfig(model=str(make_encoder(tmp_path)), merge_heads=4, encode_batch_frames=4))
    shapes = []
    vision = encoder.towers[0].vision
    forward = vision.forward
    monkeypatch.setattr(vision, "forward", lambda pixels: shapes.append(len(pixels)) or forward(pixels))
    for count in (0, 1, 4, 9):
        assert encoder.encode(synthetic_frames(count, 32).numpy()).shape == (count, 16, 16)
    assert shapes == [4] * 5


def test_the_recipe_has_everything_that_determines_the_values(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, other = make_encoder(tmp_path / "a", seed=0), make_encoder(tmp_path / "b", seed=1)
    recipe = FrameEncoder(VisionTowerConfig(model=str(one))).recipe
    assert recipe == FrameEncoder(VisionTowerConfig(model=str(one))).recipe
    for changed in (
        VisionTowerConfig(model=str(other)),
        VisionTowerConfig(model=str(one), layer=-1),
        VisionTowerConfig(model=str(one), num_tokens_per_frame=4),
        VisionTowerConfig(model=str(one), merge_heads=4),
        VisionTowerConfig(model=str(one), dtype="bfloat16"),
        VisionTowerConfig(model=str(one), encode_batch_frames=7),
        VisionTowerConfig(model=str(one), compile=True),
    ):
        assert FrameEncoder(changed).recipe != recipe
    with pytest.raises(ValueError, match="at least 1"):
        VisionTowerConfig(encode_batch_frames=0)


def test_towers_may_be_remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOG_VARIABLE, str(tmp_path / "log"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "a").mkdir()
    config = VisionTowerConfig(model=str(make_encoder(tmp_path / "a", seed=0)))
    remote = replace(config, model=f"counted://{config.model}")
    assert describe_encoder(remote).recipe == FrameEncoder(remote).recipe == describe_encoder(config).recipe
    assert [path.endswith(".safetensors") for path, _ in reads(tmp_path / "log")].count(True) == 1


def test_an_encoder_of_other_weights_than_the_recipes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    config = VisionTowerConfig(model=str(make_encoder(tmp_path / "a", seed=0)))
    recipe = {**describe_encoder(config).recipe, "sampling": {"fps": 1.0}}
    FrameEncoder(config).check_recipe(recipe)
    make_encoder(tmp_path / "a", seed=1)  # another node's copy of the folder
    with pytest.raises(RuntimeError, match=r"is not the one of the recipe \(encoder\.weights_hash: .*pin encoder\.rev"):
        FrameEncoder(config).check_recipe(recipe)


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> VisionTowerConfig:
    """A first tower of 32 px and width 16, and a second one of 48 px and width 24."""
    folder = tmp_path_factory.mktemp("towers")
    for name in ("first", "second"):
        (folder / name).mkdir()
    first = make_encoder(folder / "first", seed=0)
    second = make_encoder(folder / "second", image_size=48, hidden_size=24, seed=1)
    return VisionTowerConfig(
        model=str(first),
        num_tokens_per_frame=4,
        merge_heads=4,
        encode_batch_frames=4,
        second=TowerConfig(model=str(second), num_tokens_per_frame=3, merge_heads=8, layer=-1),
    )


def alone(config: VisionTowerConfig, tower: TowerConfig) -> FrameEncoder:
    fields = {name: getattr(tower, name) for name in ("model", "layer", "num_tokens_per_frame", "merge_heads")}
    return FrameEncoder(replace(config, second=None, **fields))


@pytest.mark.parametrize("second_is_larger", [True, False])
@pytest.mark.parametrize("num_second", [3, 4])
def test_two_towers_give_the_combination_of_what_each_gives_alone(
    towers: VisionTowerConfig, num_second: int, second_is_larger: bool
) -> None:
    assert towers.second is not None
    small, large = TowerConfig(model=towers.model, num_tokens_per_frame=4, merge_heads=4), towers.second
    ours, second = (small, large) if second_is_larger else (large, small)
    second = replace(second, num_tokens_per_frame=num_second)
    names = ("model", "layer", "num_tokens_per_frame", "merge_heads")
    config = replace(towers, second=second, **{name: getattr(ours, name) for name in names})
    both = FrameEncoder(config)
    assert both.image_size == 48
    frames = synthetic_frames(6, 48)
    tokens = both.encode(frames)
    assert tokens.shape == (6, both.num_tokens_per_frame, both.dim) == (6, ours.num_tokens_per_frame + num_second, 24)
    one, other = alone(towers, ours), alone(towers, second)
    parts = [encoder.encode(resize_frames(frames, encoder.image_size)) for encoder in (one, other)]
    assert {part.shape[2] for part in parts} == {16, 24}
    assert torch.equal(tokens.view(torch.int16), combine_towers(*parts).view(torch.int16))


def test_a_single_frame_of_two_towers_has_the_same_bytes_as_in_a_full_batch(
    towers: VisionTowerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = FrameEncoder(towers)
    frames = synthetic_frames(6, 48)
    together = encoder.encode(frames).view(torch.int16)
    shapes = []
    for tower in encoder.towers:
        forward = tower.vision.forward
        monkeypatch.setattr(
            tower.vision, "forward", lambda pixels, own=forward: shapes.append(tuple(pixels.shape)) or own(pixels)
        )
    for number in (0, 3, 5):
        assert torch.equal(encoder.encode(frames[number : number + 1])[0].view(torch.int16), together[number])
    assert shapes == [(4, 3, 32, 32), (4, 3, 48, 48)] * 3


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_frames_are_resized_for_the_other_tower_as_by_pillow(resample: Resample) -> None:
    frames = synthetic_frames(2, 48) // 2 + 64  # no overshoot, which Pillow clips after each of its two passes
    resized = resize_frames(frames, 32, resample)
    assert resized.dtype == torch.uint8
    for frame, small in zip(frames.numpy(), resized.numpy(), strict=True):
        expected = np.asarray(Image.fromarray(frame).resize((32, 32), Image.Resampling[resample.upper()]), int)
        assert abs(small - expected).max() <= 1


def test_the_recipe_names_the_processors_interpolation(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path)
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | {"resample": 2}))
    encoder = FrameEncoder(VisionTowerConfig(model=str(folder)))
    assert encoder.resample == describe_encoder(encoder.config).resample == "bilinear"
    assert encoder.recipe["preprocessing"]["resize"] == "bilinear"


def test_a_recipe_has_extra_keys_only_for_two_towers(towers: VisionTowerConfig) -> None:
    assert towers.second is not None
    one, two = FrameEncoder(replace(towers, second=None)), FrameEncoder(towers)
    hashes = [tower.vision.weights_hash for tower in two.towers]
    expected = {
        "recipe_version": 3,
        "encoder": {"weights_hash": hashes[0], "layer": -2},
        "preprocessing": {"image_size": 32, "resize": "bicubic", "aspect": "squeezed"},
        "merge": {"method": "tome", "num_tokens_per_frame": 4, "heads": 4},
        "dtype": {"compute": "float32", "stored": "bfloat16"},
        "encode_batch_frames": 4,
    }
    assert one.recipe == expected  # unchanged since before second towers, except for the version
    second = {
        "encoder": {"weights_hash": hashes[1], "layer": -1},
        "preprocessing": {"image_size": 48, "resize": "bicubic", "aspect": "squeezed"},
        "merge": {"method": "tome", "num_tokens_per_frame": 3, "heads": 8},
        "hidden_size": 24,
    }
    assert two.recipe == {**expected, "hidden_size": 16, "second": second}
    assert hashes[0] != hashes[1]
    others = [
        replace(towers, second=replace(towers.second, model=towers.model)),
        replace(towers, second=replace(towers.second, layer=-2)),
        replace(towers, second=replace(towers.second, num_tokens_per_frame=4)),
        replace(towers, second=replace(towers.second, merge_heads=4)),
    ]
    recipes = [one.recipe, *(FrameEncoder(config).recipe for config in [towers, *others])]
    assert len({recipe_hash(recipe) for recipe in recipes}) == len(recipes)
    with pytest.raises(ValueError, match="num_tokens_per_frame = 0 must be at least 1"):
        TowerConfig(model="x", num_tokens_per_frame=0)


@pytest.mark.slow
def test_a_compiled_encoder_gives_the_same_tokens_within_rounding(tmp_path: Path) -> None:
    folder = str(make_encoder(tmp_path))
    config = VisionTowerConfig(model=folder, num_tokens_per_frame=4, merge_heads=4, encode_batch_frames=4)
    plain, compiled = FrameEncoder(config), FrameEncoder(replace(config, compile=True))
    frames = synthetic_frames(6, plain.image_size)
    torch.testing.assert_close(compiled.encode(frames), plain.encode(frames), rtol=2**-6, atol=2**-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
