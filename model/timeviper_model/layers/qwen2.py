"""Qwen2's decoder layer, with the interface of Nemotron-H's `Block`."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from timeviper_model.batching.segments import Segments
from timeviper_model.config import Qwen2Config
from timeviper_model.layers.attention import Attention, Rotary
from timeviper_model.layers.mamba2 import Mamba2State
from timeviper_model.layers.nemotron_h import LayerState
from timeviper_model.ops.linear import Linear
from timeviper_model.ops.norm import RMSNorm


class GatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`, no bias."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, h_TD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(h_TD)) * self.up_proj(h_TD))


class Qwen2Block(nn.Module):
    """`h += self_attn(input_layernorm(h))`, then `h += mlp(post_attention_layernorm(h))`."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, rotary=Rotary(config.head_dim, config.rope_theta, config.rope_scaling))
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)

    def forward(self, h_TD: Tensor, segments: Segments, state: LayerState = None, *, last_only: bool = False) -> Tensor:
        """(T, D), or with `last_only` its last row alone; every token enters `state`."""
        assert not isinstance(state, Mamba2State)
        normed = self.input_layernorm(h_TD)
        if last_only:
            assert state is not None
            h_TD = h_TD[-1:] + self.self_attn.last(normed, segments, state)
        else:
            h_TD = h_TD + self.self_attn(normed, segments, state)
        return h_TD + self.mlp(self.post_attention_layernorm(h_TD))

    def step(self, h_BD: Tensor, state: LayerState, positions_B: Tensor) -> Tensor:
        """(B, D)"""
        assert state is not None
        assert not isinstance(state, Mamba2State)
        h_BD = h_BD + self.self_attn.step(self.input_layernorm(h_BD), state, positions_B)
        return h_BD + self.mlp(self.post_attention_layernorm(h_BD))

    @property
    def attention(self) -> Attention:
        return self.self_attn

    @property
    def attention_norm(self) -> RMSNorm:
        return self.input_layernorm
