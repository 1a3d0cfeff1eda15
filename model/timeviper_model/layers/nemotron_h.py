"""Nemotron-H's blocks: norm, mixer, residual."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timeviper_model.batching.segments import Segments
from timeviper_model.config import BlockType, HybridConfig
from timeviper_model.layers.attention import Attention, KeyValueStore
from timeviper_model.layers.mamba2 import Mamba2Mixer, Mamba2State
from timeviper_model.ops.linear import Linear
from timeviper_model.ops.norm import RMSNorm

LayerState = Mamba2State | KeyValueStore | None


class MLP(nn.Module):
    """`down(relu(up(x))^2)`, no bias."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, h_TD: Tensor) -> Tensor:
        return self.down_proj(F.relu(self.up_proj(h_TD)).square())


MIXERS: dict[BlockType, type[Mamba2Mixer] | type[Attention] | type[MLP]] = {
    "mamba": Mamba2Mixer,
    "attention": Attention,
    "mlp": MLP,
}


class Block(nn.Module):
    """`h + mixer(norm(h))`."""

    def __init__(self, config: HybridConfig, block_type: BlockType) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = MIXERS[block_type](config)

    def forward(self, h_TD: Tensor, segments: Segments, state: LayerState = None, *, last_only: bool = False) -> Tensor:
        """(T, D), or with `last_only` its last row alone; every token enters `state`."""
        normed = self.norm(h_TD)
        if last_only and isinstance(self.mixer, Attention):
            assert state is not None
            assert not isinstance(state, Mamba2State)
            return h_TD[-1:] + self.mixer.last(normed, segments, state)
        mixed = self.mixer(normed) if isinstance(self.mixer, MLP) else self.mixer(normed, segments, state)
        return (h_TD + mixed)[-1:] if last_only else h_TD + mixed

    def step(self, h_BD: Tensor, state: LayerState, positions_B: Tensor) -> Tensor:
        """(B, D)"""
        normed = self.norm(h_BD)
        if isinstance(self.mixer, MLP):
            return h_BD + self.mixer(normed)
        if isinstance(self.mixer, Mamba2Mixer):
            assert isinstance(state, Mamba2State)
            return h_BD + self.mixer.step(normed, state)
        assert state is not None
        assert not isinstance(state, Mamba2State)
        return h_BD + self.mixer.step(normed, state, positions_B)

    @property
    def attention(self) -> Attention:
        assert isinstance(self.mixer, Attention)
        return self.mixer

    @property
    def attention_norm(self) -> RMSNorm:
        return self.norm


@torch.no_grad()
def init_mamba(mixer: Mamba2Mixer, config: HybridConfig, generator: torch.Generator) -> None:
    """Initialises Mamba's own parameters.

    A = 1..H, D = 1, dt log-uniform in [time_step_min, time_step_max] (arXiv 2405.21060, reference code), output
    projection scaled by 1 / sqrt(number of blocks). Convolution uniform in +-1/sqrt(taps) as in Mamba's code;
    normal(0, 0.02) would nearly close it.
    """
    bound = config.conv_kernel**-0.5
    mixer.conv1d.weight.uniform_(-bound, bound, generator=generator)
    if mixer.conv1d.bias is not None:
        mixer.conv1d.bias.zero_()
    mixer.A_log.copy_(torch.arange(1, config.mamba_num_heads + 1).log())
    mixer.D.fill_(1.0)
    low, high = math.log(config.time_step_min), math.log(config.time_step_max)
    uniform = torch.empty_like(mixer.dt_bias).uniform_(low, high, generator=generator)
    dt = uniform.exp().clamp(min=config.time_step_floor)
    mixer.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
    mixer.norm.weight.fill_(1.0)
    bound = mixer.out_proj.in_features**-0.5 / math.sqrt(config.num_hidden_layers)
    mixer.out_proj.weight.uniform_(-bound, bound, generator=generator)
