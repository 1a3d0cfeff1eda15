"""Rebuilds the initial weights of a phase, for frozen tensors that training in bfloat16 only keeps rounded."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from timeviper_model.config import TimeViperConfig
from timeviper_model.timeviper import TimeViper
from timeviper_model.weights.weights_folder import from_pretrained, load_backbone
from timeviper_platform.common.machine_cache import local_copy

logger = logging.getLogger(__name__)


class InitialWeights(NamedTuple):
    weights: str | None = None
    """Weights folder; None for seeded random weights."""
    replaces_sites: bool = False
    """Whether the model has other TransV sites than `weights`."""
    seed: int = 0
    backbone: str | None = None
    """Language model that replaces the random one."""
    revision: str | None = None
    """Revision of the backbone."""

    def build(self, config: TimeViperConfig) -> TimeViper:
        """Raises ValueError if the weights cannot be loaded."""
        if self.weights is not None:
            model = load_weights(self.weights).train()
            model = model.with_transv(config.transv) if self.replaces_sites else model
            model.config = replace(model.config, chat_template=config.chat_template)
            return model
        model = TimeViper(config)
        model.init_weights(torch.Generator().manual_seed(self.seed))
        if self.backbone is not None:
            load_backbone(model, self.backbone, revision=self.revision)
        return model.train()

    def unrounded(
        self, tensors: dict[str, Tensor], frozen: Collection[str], config: TimeViperConfig
    ) -> dict[str, Tensor]:
        """Replaces frozen tensors by the float32 ones that round to them."""
        try:
            initial = self.build(config).state_dict()
        except (ValueError, OSError, RuntimeError) as error:
            logger.warning(
                "%d frozen tensors are exported as rounded to bfloat16, because their source is gone: %s",
                *(len(frozen), error),
            )
            return tensors
        same = {
            name: initial[name].float()
            for name in frozen
            if name in initial and torch.equal(initial[name].bfloat16(), tensors[name].bfloat16())
        }
        if len(same) < len(frozen):
            logger.warning(
                "%d of %d frozen tensors are exported as rounded to bfloat16, because %s has changed",
                *(len(frozen) - len(same), len(frozen), self.weights or self.backbone),
            )
        return tensors | same


def load_weights(uri: str) -> TimeViper:
    """Loads a weights folder in float32."""
    return from_pretrained(local_copy(uri))
