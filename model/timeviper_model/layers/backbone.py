"""Language model without its output matrix, with the same outer parameter names for both families."""

from __future__ import annotations

import torch
from torch import nn

from timeviper_model.config import BlockType, HybridConfig, TextConfig
from timeviper_model.layers.mamba2 import Mamba2Mixer
from timeviper_model.layers.nemotron_h import Block, init_mamba
from timeviper_model.layers.qwen2 import Qwen2Block
from timeviper_model.ops.norm import RMSNorm

DecoderBlock = Block | Qwen2Block


class Backbone(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([make_block(config, block_type) for block_type in config.block_types])
        eps = config.layer_norm_epsilon if isinstance(config, HybridConfig) else config.rms_norm_eps
        self.norm_f = RMSNorm(config.hidden_size, eps)

    def block(self, layer: int) -> DecoderBlock:
        block = self.layers[layer]
        assert isinstance(block, DecoderBlock)
        return block


def make_block(config: TextConfig, block_type: BlockType) -> DecoderBlock:
    return Block(config, block_type) if isinstance(config, HybridConfig) else Qwen2Block(config)


@torch.no_grad()
def init_backbone(backbone: Backbone, config: TextConfig, generator: torch.Generator) -> None:
    """Initialises as transformers does: matrices normal(0, initializer_range), biases 0, norms 1; Mamba by
    `init_mamba`.
    """
    backbone.embeddings.weight.normal_(0.0, config.initializer_range, generator=generator)
    for module in backbone.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(0.0, config.initializer_range, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, RMSNorm):
            module.weight.fill_(1.0)
    for module in backbone.modules():
        if isinstance(module, Mamba2Mixer):
            assert isinstance(config, HybridConfig)
            init_mamba(module, config, generator)
