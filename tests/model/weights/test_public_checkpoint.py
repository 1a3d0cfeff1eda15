from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from reference.small_models import SMALL, SMALL_QWEN, make_model
from timeviper_model.config import TimeViperConfig
from timeviper_model.weights.families import file_name
from timeviper_model.weights.public_checkpoint import load_public_checkpoint

PROJECTOR_PLACES = {"fc1": "0", "fc2": "2"}
TIED_QWEN = replace(SMALL_QWEN, text=replace(SMALL_QWEN.text, tie_word_embeddings=True))


def public_state_dict(config: TimeViperConfig, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A model's state dict, and the same as the public code would save it."""
    own = make_model(config, seed=seed, dtype=torch.float32).state_dict()
    inner = "backbone" if config is SMALL else "model"
    sites = [str(site.layer) for site in config.transv]
    public = {"vision_backbone.featurizer.norm.weight": torch.ones(3)}
    for name, tensor in own.items():
        head, _, rest = name.partition(".")
        if head == "projector":
            layer, kind = rest.split(".")
            public[f"projector.projector.{PROJECTOR_PLACES[layer]}.{kind}"] = tensor
        elif head == "transv":
            layer, _, parameter = rest.partition(".")
            if parameter != "alpha":
                public[f"llm_backbone.llm.{inner}.merge_modules.{sites.index(layer)}.{parameter}"] = tensor
        else:
            public["llm_backbone.llm." + file_name(name, config.text)] = tensor.clone()
    public[f"llm_backbone.llm.{inner}.alpha"] = torch.cat([own[f"transv.{layer}.alpha"] for layer in sites])
    return own, public


@pytest.mark.parametrize("form", ["bin", "safetensors"])
@pytest.mark.parametrize("config", [SMALL, SMALL_QWEN, TIED_QWEN], ids=["nano", "qwen2", "tied"])
def test_a_checkpoint_of_the_public_code_gives_its_weights(tmp_path: Path, config: TimeViperConfig, form: str) -> None:
    own, public = public_state_dict(config, seed=4)
    own["transv.1.alpha"] += 1.0  # unlike the other site's
    public[next(name for name in public if name.endswith(".alpha"))][0] += 1.0
    if form == "bin":
        torch.save(public, tmp_path / "pytorch_model.bin")
        path = tmp_path / "pytorch_model.bin"
    else:
        save_file(public, tmp_path / "model.safetensors")
        path = tmp_path
    model = make_model(config, seed=1, dtype=torch.float32)
    load_public_checkpoint(model, path)
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())


def test_all_mismatches_are_in_one_error(tmp_path: Path) -> None:
    _, public = public_state_dict(SMALL, seed=4)
    del public["llm_backbone.llm.backbone.norm_f.weight"]
    public["llm_backbone.llm.backbone.merge_modules.2.q_proj.weight"] = torch.zeros(2)
    public["projector.projector.4.weight"] = torch.zeros(2)
    save_file(public, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit the model") as caught:
        load_public_checkpoint(make_model(dtype=torch.float32), tmp_path)
    message = str(caught.value)
    assert "missing: backbone.norm_f.weight" in message
    assert "backbone.merge_modules.2.q_proj.weight" in message
    assert "projector.projector.4.weight" in message
