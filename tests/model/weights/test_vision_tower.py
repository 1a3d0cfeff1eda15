"""Vision towers load as transformers loads them, or are refused with what does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from reference.synthetic_media import make_encoder
from timeviper_model.weights import vision_tower
from timeviper_model.weights.vision_tower import TowerDescription, describe_vision_tower, load_vision_tower

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
VISION = SIZES | {"intermediate_size": 64}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
PROCESSOR = {
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "rescale_factor": 0.00392156862745098,
    "resample": 3,
    "size": {"height": 32, "width": 32},
}


def siglip() -> Any:
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=TEXT, vision_config=VISION))


def siglip_vision() -> Any:
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION, hidden_act="gelu_pytorch_tanh"))


def clip() -> Any:
    configs = {"text_config": TEXT, "vision_config": VISION, "projection_dim": 16}
    return transformers.CLIPModel(transformers.CLIPConfig(**configs))


def clip_vision() -> Any:
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION, hidden_act="quick_gelu"))


def dinov2() -> Any:
    return transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, mlp_ratio=2))


def dinov2_classifier() -> Any:
    return transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**SIZES, mlp_ratio=2, num_labels=3))


def dinov2_registers() -> Any:
    config = transformers.Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2, num_register_tokens=4)
    return transformers.Dinov2WithRegistersModel(config)


def dinov3() -> Any:
    return transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**VISION, num_register_tokens=4))


def vit() -> Any:
    return transformers.ViTModel(transformers.ViTConfig(**VISION))


def vit_classifier() -> Any:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VISION, num_labels=3))


def deit() -> Any:
    return transformers.DeiTModel(transformers.DeiTConfig(**VISION))


def vit_msn() -> Any:
    return transformers.ViTMSNModel(transformers.ViTMSNConfig(**VISION))


def ijepa() -> Any:
    return transformers.IJepaModel(transformers.IJepaConfig(**VISION))


TOWERS = [
    siglip,
    siglip_vision,
    clip,
    clip_vision,
    dinov2,
    dinov2_classifier,
    dinov2_registers,
    dinov3,
    vit,
    vit_classifier,
    deit,
    vit_msn,
    ijepa,
]


def saved(folder: Path, make: Callable[[], Any] = siglip_vision, **processor: Any) -> Any:
    torch.manual_seed(7)
    model = make()
    for parameter in model.parameters():  # initial norms of 1 and biases of 0 would hide a missing one
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | processor))
    return model.eval()


def part_of(model: Any) -> Any:
    return next(
        (getattr(model, name) for name in ("vision_model", "dinov2", "vit") if hasattr(model, name)),
        model,
    )


@pytest.mark.parametrize("make", TOWERS)
def test_a_tower_gives_the_hidden_state_of_transformers(tmp_path: Path, make: Callable[[], Any]) -> None:
    model = saved(tmp_path, make)
    tower = load_vision_tower(str(tmp_path))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = part_of(model)(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][:, -16:]
    assert torch.equal(tower(pixels), expected)
    assert describe_vision_tower(str(tmp_path)) == TowerDescription.of(tower)


def test_a_description_needs_no_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for make in (siglip, clip, clip_vision):
        (tmp_path / make.__name__).mkdir()
        saved(tmp_path / make.__name__, make)
    monkeypatch.setattr(vision_tower, "load_vision_tower", None)  # building a tower would raise
    for make in (siglip, clip, clip_vision):
        assert describe_vision_tower(str(tmp_path / make.__name__)).num_patches == 16


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def prefixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"vision_tower.{name}": tensor for name, tensor in tensors.items()}


def as_timm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("encoder.layers.", "blocks."): tensor for name, tensor in tensors.items()}


def one_missing(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.fc1.bias" not in name}


def one_misshaped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor[:5].clone() if "layers.0.mlp.fc1.bias" in name else tensor for name, tensor in tensors.items()}


def one_block_more(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    more = {name.replace("layers.1.", "layers.3."): value.clone() for name, value in tensors.items()}
    return more | tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (prefixed, r"missing: .*unexpected: vision_tower\."),
        (as_timm, r"missing: encoder\.layers\..*unexpected: .*blocks\.0"),
        (one_missing, r"1 missing: .*encoder\.layers\.1\.mlp\.fc1\.bias"),
        (one_misshaped, r"1 misshaped: .*layers\.0\.mlp\.fc1\.bias is \(5,\), should be \(64,\)"),
        (one_block_more, r"unexpected: .*layers\.3\."),
    ],
)
@pytest.mark.parametrize("load", [load_vision_tower, describe_vision_tower])
def test_tensors_that_do_not_fit_are_an_error_that_lists_them(
    tmp_path: Path, load: Callable[[str], Any], change: Callable[..., Any], message: str
) -> None:
    saved(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=message) as caught:
        load(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("make", "lacking"), [(vit, "pooler."), (siglip_vision, "head."), (dinov2, "layer.2.")])
def test_parts_that_features_do_not_need_may_be_missing(tmp_path: Path, make: Callable[[], Any], lacking: str) -> None:
    saved(tmp_path, make)
    whole = load_vision_tower(str(tmp_path))
    rewrite(tmp_path, lambda tensors: {name: value for name, value in tensors.items() if lacking not in name})
    tower = load_vision_tower(str(tmp_path))
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(tower(pixels), whole(pixels))
    assert describe_vision_tower(str(tmp_path)).weights_hash == tower.weights_hash  # no random value is hashed
    assert load_vision_tower(str(tmp_path)).weights_hash == tower.weights_hash


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", r"model\.safetensors is a Git LFS pointer"),
        (b"", r"model\.safetensors is empty"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    saved(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    for load in (load_vision_tower, describe_vision_tower):
        with pytest.raises(ValueError, match=message):
            load(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "timm_thing"}, "model_type 'timm_thing' is not one that transformers reads"),
        ({"model_type": "qwen2"}, "is not a vision transformer: its config.json lacks image_size, patch_size"),
        ({"model_type": "siglip2_vision_model"}, "variable resolution"),
        ({"model_type": "dinov2", "quantization_config": {"quant_method": "fp8"}}, "quant_method 'fp8'"),
    ],
)
def test_foreign_folders_are_refused_in_one_line(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as caught:
        describe_vision_tower(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_size_past_the_towers_grid_is_refused_at_load(tmp_path: Path) -> None:
    saved(tmp_path, size={"height": 48, "width": 48})
    for load in (load_vision_tower, describe_vision_tower):
        with pytest.raises(ValueError, match=r"resizes frames to 48 px, but the tower takes 32 px; set the size to 32"):
            load(str(tmp_path))
    (tmp_path / "dino").mkdir()
    saved(tmp_path / "dino", dinov2, size={"height": 48, "width": 48})  # interpolates its positions
    assert describe_vision_tower(str(tmp_path / "dino")).num_patches == 36


def test_the_processor_file_of_transformers_5_is_read(tmp_path: Path) -> None:
    saved(tmp_path)
    values = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"has no preprocessor_config\.json"):
        load_vision_tower(str(tmp_path))
    content = {"image_processor": values | {"resample": 2}, "processor_class": "SiglipProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(content))
    assert load_vision_tower(str(tmp_path)).preprocessing.resample == "bilinear"
    assert describe_vision_tower(str(tmp_path)).resample == "bilinear"


def test_a_layer_that_is_not_a_blocks_output_is_refused(tmp_path: Path) -> None:
    folder = str(make_encoder(tmp_path))
    with pytest.raises(ValueError, match="layer = 99 is not the output of one of this tower's 2 blocks"):
        describe_vision_tower(folder, layer=99)


def test_a_revision_reaches_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = make_encoder(tmp_path), []

    def snapshot(name: str, **options: Any) -> str:
        asked.append((name, options["revision"]))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    described = describe_vision_tower("google/siglip", revision="4d7a")
    assert load_vision_tower("google/siglip", revision="4d7a").weights_hash == described.weights_hash
    assert set(asked) == {("google/siglip", "4d7a")}
