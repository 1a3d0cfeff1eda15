"""An encoder's description without building its towers."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Dinov2Config, Dinov2Model

from reference.synthetic_media import make_encoder
from timeviper_model.layers.vision_transformer import VisionTransformer
from timeviper_platform.data.encode import tower_weights
from timeviper_platform.data.encode.frame_encoder import (
    FrameEncoder,
    TowerConfig,
    VisionTowerConfig,
    describe_encoder,
)
from timeviper_platform.data.encode.tower_weights import describe_tower


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(make_encoder(tmp_path))


def test_the_description_equals_that_of_the_built_encoder(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = VisionTowerConfig(model=folder, second=TowerConfig(model=folder, layer=-1, num_tokens_per_frame=3))
    built = FrameEncoder(config)
    monkeypatch.setattr(tower_weights, "VisionTransformer", None)  # building a tower would raise
    found = describe_encoder(config)
    assert found.recipe == built.recipe
    assert (found.image_size, found.dim) == (built.image_size, built.dim)
    assert found.num_tokens_per_frame == built.num_tokens_per_frame


def test_a_dinov2_tower_is_described_like_the_built_one(folder: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(tmp_path / "dino")
    processor = Path(folder, "preprocessor_config.json").read_text()
    (tmp_path / "dino" / "preprocessor_config.json").write_text(processor)
    name = str(tmp_path / "dino")
    expected = VisionTransformer.from_pretrained(name)
    found = describe_tower(name, -2)
    assert found.weights_hash == expected.weights_hash
    assert (found.image_size, found.num_patches) == (expected.image_size, expected.num_patches)


def test_errors_are_those_of_the_built_tower(folder: str) -> None:
    with pytest.raises(ValueError, match="no vision encoder at '/nowhere'"):
        describe_tower("/nowhere", -2)
    with pytest.raises(ValueError, match="layer"):
        describe_tower(folder, 99)
