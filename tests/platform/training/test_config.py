from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from timeviper_model.config import PRESETS, QWEN2_5_7B, HybridConfig, TextConfig, TransVSite, VisionConfig
from timeviper_model.weights.families import text_config_to_dict
from timeviper_platform.common.config import load_config
from timeviper_platform.training.config import InitConfig, TrainConfig

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_configured(name: str) -> None:
    assert TypeAdapter(InitConfig).validate_python({"preset": name}).model_config() == PRESETS[name]


LARGER = replace(PRESETS["tiny"].text, hidden_size=192, vocab_size=600)


def backbone(folder: Path, text: TextConfig = LARGER, **values: Any) -> str:
    (folder / "config.json").write_text(json.dumps(text_config_to_dict(text) | values))
    return str(folder)


def test_a_backbones_sizes_replace_those_of_the_preset(tmp_path: Path) -> None:
    config = InitConfig(preset="tiny", backbone=backbone(tmp_path)).model_config()
    assert config == replace(PRESETS["tiny"], text=LARGER)


def test_a_backbone_needs_no_preset(tmp_path: Path) -> None:
    site = TransVSite(layer=3, select="attention", keep=0.5)
    config = InitConfig(backbone=backbone(tmp_path), transv=(site,)).model_config()
    assert (config.text, config.vision, config.transv) == (LARGER, VisionConfig(), (site,))
    assert config.chat_template == "nemotron"
    qwen = InitConfig(preset="9b", transv=(), backbone=backbone(tmp_path, QWEN2_5_7B)).model_config()
    assert (qwen.text, qwen.transv, qwen.chat_template) == (QWEN2_5_7B, (), "chatml")


def test_sites_that_do_not_fit_the_backbone_are_an_error_with_its_attention_blocks(tmp_path: Path) -> None:
    assert isinstance(LARGER, HybridConfig)
    folder = backbone(tmp_path, replace(LARGER, hybrid_override_pattern="M-M-M*-M-M*-"))
    with pytest.raises(
        ValueError, match=r"preset 'tiny' does not fit .*attention blocks are at \[5, 10\]; name its sites"
    ):
        InitConfig(preset="tiny", backbone=folder).model_config()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hybrid_override_pattern": "ME*E"}, "expert blocks"),
        ({"quantization_config": {"quant_method": "fp8"}}, "the weights are quantised"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
    ],
)
def test_backbones_that_cannot_be_trained_are_found_in_their_config(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        InitConfig(preset="tiny", backbone=backbone(tmp_path, **values)).model_config()


def test_a_chat_template_is_chosen_for_the_family(tmp_path: Path) -> None:
    assert InitConfig(preset="tiny", chat_template="tokenizer").model_config().chat_template == "tokenizer"
    assert InitConfig(preset="qwen2.5-7b", chat_template="paper").model_config().chat_template == "chatml"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("name: first", 'name: ".."', "'..' .* must name a folder"),
        ("name: first", "name: sample-tables", "is the folder of a cache"),
        ("  instruct:", '  "../instruct":', "'../instruct' .* must name a folder"),
    ],
)
def test_names_of_runs_and_phases_are_names_of_folders(tmp_path: Path, before: str, after: str, message: str) -> None:
    """Weights of a phase named `..` replaced the run."""
    text = (ROOT / "ray_configs" / "train.yaml").read_text()
    name = re.search(r"^name: .*$", text, re.MULTILINE)
    assert name is not None
    text = text.replace(name[0], "name: first")
    assert before in text
    (tmp_path / "train.yaml").write_text(text.replace(before, after, 1))
    with pytest.raises(ValueError, match=message):
        load_config(TrainConfig, str(tmp_path / "train.yaml"), [])


def test_an_init_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="init needs weights, a preset or a backbone"):
        InitConfig()
    with pytest.raises(ValueError, match=r"needs init\.backbone, which is not given"):
        InitConfig(preset="tiny", revision="main")
