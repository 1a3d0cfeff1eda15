"""State dicts as TimeViper's public code saves them."""

from __future__ import annotations

import torch
from torch import Tensor

from reference.small_models import make_model
from timeviper_model.config import HybridConfig, TimeViperConfig
from timeviper_model.weights.families import file_name

PROJECTOR_INDEX = {"fc1": "0", "fc2": "2"}


def public_state_dict(config: TimeViperConfig, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A random model's state dict, under our names and under the public ones."""
    own = make_model(config, seed=seed, dtype=torch.float32).state_dict()
    inner = "backbone" if isinstance(config.text, HybridConfig) else "model"
    sites = [str(site.layer) for site in config.transv]
    public = {"vision_backbone.featurizer.norm.weight": torch.ones(3)}
    for name, tensor in own.items():
        head, _, rest = name.partition(".")
        if head == "projector":
            layer, kind = rest.split(".")
            public[f"projector.projector.{PROJECTOR_INDEX[layer]}.{kind}"] = tensor
        elif head == "transv":
            layer, _, parameter = rest.partition(".")
            if parameter != "alpha":
                public[f"llm_backbone.llm.{inner}.merge_modules.{sites.index(layer)}.{parameter}"] = tensor
        else:
            public["llm_backbone.llm." + file_name(name, config.text)] = tensor.clone()
    public[f"llm_backbone.llm.{inner}.alpha"] = torch.cat([own[f"transv.{layer}.alpha"] for layer in sites])
    return own, public
