from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from reference.public_checkpoints import public_state_dict
from reference.small_models import SMALL, SMALL_QWEN
from timeviper_model.config import TimeViperConfig
from timeviper_model.weights.families import text_config_to_dict
from timeviper_model.weights.public_checkpoint import load_public_checkpoint, public_config

TIED_QWEN = replace(SMALL_QWEN, text=replace(SMALL_QWEN.text, tie_word_embeddings=True))


@pytest.mark.parametrize("form", ["bin", "safetensors"])
@pytest.mark.parametrize("config", [SMALL, SMALL_QWEN, TIED_QWEN], ids=["nano", "qwen2", "tied"])
def test_a_checkpoint_of_the_public_code_gives_its_weights(tmp_path: Path, config: TimeViperConfig, form: str) -> None:
    own, public = public_state_dict(config, seed=4)
    own["transv.1.alpha"] += 1.0  # differs from the other site
    public[next(name for name in public if name.endswith(".alpha"))][0] += 1.0
    if form == "bin":
        torch.save(public, tmp_path / "pytorch_model.bin")
        path = tmp_path / "pytorch_model.bin"
    else:
        save_file(public, tmp_path / "model.safetensors")
        path = tmp_path
    model = load_public_checkpoint(path, config)
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())


def test_all_mismatches_are_in_one_error(tmp_path: Path) -> None:
    _, public = public_state_dict(SMALL, seed=4)
    del public["llm_backbone.llm.backbone.norm_f.weight"]
    public["llm_backbone.llm.backbone.merge_modules.2.q_proj.weight"] = torch.zeros(2)
    public["projector.projector.4.weight"] = torch.zeros(2)
    save_file(public, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit the model") as caught:
        load_public_checkpoint(tmp_path, SMALL)
    message = str(caught.value)
    assert "missing: backbone.norm_f.weight" in message
    assert "backbone.merge_modules.2.q_proj.weight" in message
    assert "projector.projector.4.weight" in message


def test_a_folder_as_the_public_training_leaves_it_is_read(tmp_path: Path) -> None:
    """The language model alone is saved beside the whole model, and its index is the folder's."""
    own, public = public_state_dict(SMALL, seed=4)
    torch.save(public, tmp_path / "pytorch_model.bin")
    inner = {name.removeprefix("llm_backbone.llm."): value for name, value in public.items() if "llm_backbone" in name}
    save_file(inner, tmp_path / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(inner, "model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps(text_config_to_dict(SMALL.text)))
    preset = replace(SMALL, text=replace(SMALL.text, hidden_size=48))
    config = public_config(tmp_path, preset)
    assert config == SMALL
    model = load_public_checkpoint(tmp_path, config)
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"no file has tensors of llm_backbone\.llm\.\*"):
        load_public_checkpoint(tmp_path, config)
