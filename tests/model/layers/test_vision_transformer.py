from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from timeviper_model.layers.vision_transformer import Preprocessing
from timeviper_model.weights.vision_tower import load_vision_tower

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
IMAGE: dict[str, Any] = {"image_size": 32, "patch_size": 8}


def _save(model: Any, folder: Path) -> Any:
    for parameter in model.parameters():  # initial norms of 1 and biases of 0 would hide an extra norm
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    values = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2]}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return model.eval()


def _siglip(folder: Path) -> Any:
    return _save(SiglipVisionModel(SiglipVisionConfig(**SIZES, **IMAGE, intermediate_size=64)), folder)


@pytest.mark.parametrize("layer", [-2, -1, -3, 2])
def test_features_are_the_whole_towers_hidden_state(tmp_path: Path, layer: int) -> None:
    tower = _siglip(tmp_path)
    pixels = torch.randn(2, 3, 32, 32)
    expected = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[layer]
    assert torch.equal(load_vision_tower(str(tmp_path), layer=layer)(pixels), expected)


def test_blocks_that_are_not_used_and_the_pooling_head_are_gone(tmp_path: Path) -> None:
    tower = _siglip(tmp_path)
    encoder = load_vision_tower(str(tmp_path))
    per_block = sum(p.numel() for p in tower.encoder.layers[0].parameters())
    removed = per_block + sum(p.numel() for p in tower.head.parameters())
    count = sum(p.numel() for p in encoder.parameters())
    assert count == sum(p.numel() for p in tower.parameters()) - removed
    assert not any(p.requires_grad for p in encoder.parameters())


def test_the_vision_half_of_a_two_tower_checkpoint_loads(tmp_path: Path) -> None:
    text = {**SIZES, "num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 50}
    vision = {**SIZES, **IMAGE, "intermediate_size": 64}
    model = _save(SiglipModel(SiglipConfig(text_config=text, vision_config=vision)), tmp_path)
    pixels = torch.randn(1, 3, 32, 32)
    expected = model.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(load_vision_tower(str(tmp_path))(pixels), expected)


def test_class_token_of_another_tower_is_left_out(tmp_path: Path) -> None:
    tower = _save(Dinov2Model(Dinov2Config(**SIZES, **IMAGE, mlp_ratio=2)), tmp_path)
    encoder = load_vision_tower(str(tmp_path))
    pixels = torch.randn(2, 3, 32, 32)
    expected = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert torch.equal(encoder(pixels), expected)
    assert (encoder.image_size, encoder.hidden_size, encoder.num_patches) == (32, 32, 16)


def test_pixels_are_normalised_as_in_the_processor_configuration(tmp_path: Path) -> None:
    _siglip(tmp_path)
    frames = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    frames[..., 2] = 255
    pixels = load_vision_tower(str(tmp_path)).preprocess(frames)
    assert pixels.shape == (1, 3, 32, 32)
    torch.testing.assert_close(pixels[0, :, 5, 7], torch.tensor([-1.0, -1.6, 3.5]))


def test_a_tower_in_bf16_gets_the_pixels_of_fp32_rounded_once(tmp_path: Path) -> None:
    _siglip(tmp_path)
    statistics = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}  # DINOv2's
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(statistics))
    frames = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    encoder = load_vision_tower(str(tmp_path))
    expected = encoder.preprocess(frames).bfloat16()
    assert torch.equal(encoder.bfloat16().preprocess(frames), expected)


@pytest.mark.parametrize(
    "values",
    [{"rescale_factor": 1 / 127.5}, {"do_normalize": False}, {"do_rescale": False}, {"do_rescale": True}],
)
def test_steps_that_a_processor_omits_or_changes_are_respected(tmp_path: Path, values: dict[str, Any]) -> None:
    _siglip(tmp_path)
    statistics = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2]}
    processor = SiglipImageProcessorPil(size={"height": 32, "width": 32}, **statistics, **values)
    processor.save_pretrained(tmp_path)
    frames = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    expected = processor([Image.fromarray(frame.numpy()) for frame in frames], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(load_vision_tower(str(tmp_path)).preprocess(frames), expected)


def test_register_tokens_are_left_out_too(tmp_path: Path) -> None:
    config = Dinov2WithRegistersConfig(**SIZES, **IMAGE, mlp_ratio=2, num_register_tokens=4)
    tower = _save(Dinov2WithRegistersModel(config), tmp_path)
    pixels = torch.randn(2, 3, 32, 32)
    expected = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][:, 5:]
    assert torch.equal(load_vision_tower(str(tmp_path))(pixels), expected)


def test_image_size_is_the_processors_crop(tmp_path: Path) -> None:
    tower = _save(Dinov2Model(Dinov2Config(**SIZES, **IMAGE, mlp_ratio=2)), tmp_path)
    BitImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 24, "width": 24}, do_center_crop=True
    ).save_pretrained(tmp_path)
    encoder = load_vision_tower(str(tmp_path))
    assert (encoder.image_size, encoder.num_patches, encoder.preprocessing.resample) == (24, 9, "bicubic")
    pixels = torch.randn(1, 3, 24, 24)  # the tower interpolates its position embeddings
    expected = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert torch.equal(encoder(pixels), expected)


@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize("shape", [(57, 90), (20, 32), (32, 32)])
def test_pixels_equal_those_of_transformers_processor(tmp_path: Path, shape: tuple[int, int], resample: int) -> None:
    _siglip(tmp_path)
    processor = SiglipImageProcessorPil(
        size={"height": 32, "width": 32}, resample=resample, image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.25, 0.2]
    )
    processor.save_pretrained(tmp_path)
    frames = torch.randint(0, 256, (2, *shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    images = [Image.fromarray(frame.numpy()) for frame in frames]
    expected = processor(images, return_tensors="pt")["pixel_values"]
    found = load_vision_tower(str(tmp_path)).preprocess(frames)
    one_level = 1.0 / 255.0 / 0.2  # Pillow rounds between its two passes
    assert (found - expected).abs().max() <= one_level * 1.01
    assert (found - expected).abs().mean() <= one_level / 5


def test_unsupported_processors_are_refused(tmp_path: Path) -> None:
    values = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    assert Preprocessing.from_processor(values, image_size=8, where="x").image_size == 8
    for changes, message in (
        ({"resample": 1}, "resample = 1 is not supported"),
        ({"size": {"height": 8, "width": 9}}, "must be square"),
        ({"size": {"longest_edge": 9}}, "must be square"),
        ({"do_resize": False}, "do_resize = False"),
        ({"rescale_factor": 0}, "rescale_factor = 0"),
        ({"image_mean": [0.5]}, "image_mean = .* must hold three values"),
    ):
        with pytest.raises(ValueError, match=message):
            Preprocessing.from_processor(values | changes, image_size=8, where="x")
    with pytest.raises(ValueError, match="lacks image_std"):
        Preprocessing.from_processor({"image_mean": [0.5] * 3}, image_size=8, where="x")
    Siglip2VisionConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="variable resolution"):
        load_vision_tower(str(tmp_path))


@pytest.mark.parametrize(
    ("values", "side"),
    [
        ({"size": 24}, 24),
        ({"size": [24, 24]}, 24),
        ({"size": {"shortest_edge": 28}, "crop_size": 24, "do_center_crop": True}, 24),
        ({"size": {"shortest_edge": 24}, "crop_size": None, "do_center_crop": None}, 24),
        ({"size": {"height": 24, "width": 24, "shortest_edge": None}}, 24),
        ({"size": None}, 32),
        ({"image_mean": 0.5, "image_std": 0.25}, 32),
        ({"do_resize": None, "do_rescale": None, "do_normalize": None, "rescale_factor": None, "resample": None}, 32),
    ],
)
def test_spellings_of_processors_are_read(values: dict[str, Any], side: int) -> None:
    raw = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3} | values
    for spelling in (raw, {"image_processor": raw}):
        found = Preprocessing.from_processor(spelling, image_size=32, where="x")
        assert found == Preprocessing(image_size=side, resample="bicubic", mean=(0.5,) * 3, std=(0.25,) * 3)


def test_wrong_frames_are_refused(tmp_path: Path) -> None:
    _siglip(tmp_path)
    encoder = load_vision_tower(str(tmp_path))
    for frames in (torch.zeros(1, 32, 32, 3), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            encoder.preprocess(frames)


def test_hash_changes_with_any_weight_and_only_then(tmp_path: Path) -> None:
    tower = _siglip(tmp_path)
    first = load_vision_tower(str(tmp_path)).weights_hash
    assert load_vision_tower(str(tmp_path)).weights_hash == first
    with torch.no_grad():
        tower.encoder.layers[0].mlp.fc1.bias[3] += 1.0
    tower.save_pretrained(tmp_path)
    assert load_vision_tower(str(tmp_path)).weights_hash != first


def test_missing_encoder_or_layer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        load_vision_tower(str(tmp_path / "nothing"))
    _siglip(tmp_path)
    for layer in (7, 0):
        with pytest.raises(ValueError, match=f"layer = {layer} is not the output of one of this tower's 3 blocks"):
            load_vision_tower(str(tmp_path), layer=layer)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
        load_vision_tower(str(tmp_path))
