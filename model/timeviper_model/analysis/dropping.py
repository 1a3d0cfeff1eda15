"""Other drop plans for a trained model (Figure 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from timeviper_model.config import TransVSite
from timeviper_model.timeviper import TimeViper


def with_plan(model: TimeViper, sites: Sequence[TransVSite]) -> TimeViper:
    """Returns a model that shares `model`'s parameters and cross-attentions."""
    config = replace(model.config, transv=tuple(sites))
    missing = [s.layer for s in sites if s.transfer == "cross_attention" and str(s.layer) not in model.transv]
    if missing:
        raise ValueError(
            f"the model has no cross-attention at layers {missing}, only at {sorted(map(int, model.transv))};"
            ' drop there with transfer="none"'
        )
    with torch.device("meta"):
        twin = TimeViper(config)
    twin.backbone, twin.lm_head, twin.projector = model.backbone, model.lm_head, model.projector
    twin.transv = nn.ModuleDict({name: model.transv[name] for name in twin.transv})
    twin.gradient_checkpointing = model.gradient_checkpointing
    return twin.train(model.training)
