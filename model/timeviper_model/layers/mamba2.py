"""Mamba-2 mixer of Nemotron-H: projection, short convolution, scan, gated norm, projection."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timeviper_model.batching.segments import Segments
from timeviper_model.config import HybridConfig
from timeviper_model.ops.causal_conv import causal_conv_silu, causal_conv_silu_step
from timeviper_model.ops.kernels import Convolve, ConvolveStep, Scan, ScanStep
from timeviper_model.ops.linear import Linear
from timeviper_model.ops.norm import GatedRMSNorm
from timeviper_model.ops.precision import wide_dtype, widen
from timeviper_model.ops.ssd import ssd_scan, ssd_step

MAX_PROJECTION_ELEMENTS = 2**21
"""Elements projected per pass on a CPU: 8 MiB in fp32; glibc returns buffers over 32 MiB to the system."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mamba2State:
    """State of B sequences, updated in place."""

    window_BKD: Tensor
    """Last K - 1 inputs of the convolution, oldest first."""
    ssm_BHPN: Tensor
    """State in fp32."""


class Mamba2Mixer(nn.Module):
    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.mamba_num_heads, config.mamba_head_dim
        self.num_groups, self.state_size = config.n_groups, config.ssm_state_size
        self.intermediate_size = config.mamba_intermediate_size
        self.chunk_size = config.chunk_size
        self.time_step_limit = config.time_step_limit
        self.is_unlimited = config.time_step_limit == (0.0, math.inf)
        """True if dt needs no clamping: softplus is never negative."""
        self.conv_dim = config.conv_dim
        self.in_proj = Linear(config.hidden_size, self.intermediate_size + self.conv_dim + self.num_heads, bias=False)
        self.conv1d = nn.Conv1d(
            self.conv_dim, self.conv_dim, config.conv_kernel, groups=self.conv_dim, bias=config.use_conv_bias
        )  # holds the parameters under NVIDIA's names; causal_conv_silu computes
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.norm = GatedRMSNorm(self.intermediate_size, self.num_groups, config.layer_norm_epsilon)
        self.out_proj = Linear(self.intermediate_size, config.hidden_size, bias=False)
        self.max_projection_elements = MAX_PROJECTION_ELEMENTS
        self.convolve: Convolve = causal_conv_silu
        self.scan: Scan = ssd_scan
        self.convolve_step: ConvolveStep = causal_conv_silu_step
        self.scan_step: ScanStep = ssd_step

    def forward(
        self, h_TD: Tensor, segments: Segments, state: Mamba2State | None = None, *, scan_inputs: bool = False
    ) -> Tensor:
        """(T, D); continues and updates `state` (one segment, B = 1).

        With `scan_inputs`: B, C and dt instead, (T, 2 * G * N + H).
        """
        if scan_inputs:  # a call of the module, so that ZeRO-3 gathers its parameters
            _, channels, dt = self.project(h_TD)
            taps = self.conv1d.weight.squeeze(1), self.conv1d.bias
            convolved = self.convolve(channels, *taps, positions_T=segments.positions_T)
            return torch.cat([convolved[:, self.intermediate_size :].to(dt.dtype), dt], dim=-1)
        length = self._tokens_per_pass(h_TD)
        if len(h_TD) <= length or segments.seq_idx_T is not None:
            return self._mix(h_TD, segments, state)
        state = state or self._new_state(h_TD)
        mixed = torch.empty_like(h_TD)
        for start in range(0, len(h_TD), length):
            tokens = slice(start, start + length)
            mixed[tokens] = self._mix(h_TD[tokens], Segments(segments.ids[tokens], segments.num_segments), state)
        return mixed

    def _mix(self, h_TD: Tensor, segments: Segments, state: Mamba2State | None) -> Tensor:
        gate, channels, dt = self.project(h_TD)
        convolved = self.convolve(
            channels,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            positions_T=segments.positions_T,
            initial_KD=None if state is None else state.window_BKD[0],
        )
        x, B, C = self.split(convolved)
        y, last = self.scan(
            x,
            dt,
            self.decay_rates(),
            B,
            C,
            D_H=self.D,
            chunk_size=self.chunk_size,
            initial_state_HPN=None if state is None else state.ssm_BHPN[0],
            seq_idx_T=segments.seq_idx_T,
        )
        if state is not None:
            shift_window(state.window_BKD[0], channels)
            state.ssm_BHPN[0] = last
        return self.out_proj(self.norm(y.flatten(1), gate))

    def step(self, h_BD: Tensor, state: Mamba2State) -> Tensor:
        """(B, D); updates `state`."""
        gate, channels, dt = self.project(h_BD)
        convolved = self.convolve_step(channels, self.conv1d.weight.squeeze(1), self.conv1d.bias, state.window_BKD)
        x, B, C = self.split(convolved)
        y = self.scan_step(x, dt, self.decay_rates(), B, C, D_H=self.D, state_BHPN=state.ssm_BHPN)
        return self.out_proj(self.norm(y.flatten(1), gate))

    def _tokens_per_pass(self, h_TD: Tensor) -> int:
        """Splits long inputs in CPU inference only."""
        if h_TD.device.type != "cpu" or torch.is_grad_enabled():
            return len(h_TD)
        num_chunks = self.max_projection_elements // (self.in_proj.out_features * self.chunk_size)
        return max(1, num_chunks) * self.chunk_size

    def _new_state(self, h_TD: Tensor) -> Mamba2State:
        dtype = wide_dtype(h_TD.dtype)
        return Mamba2State(
            window_BKD=h_TD.new_zeros(1, self.conv1d.kernel_size[0] - 1, self.conv_dim),
            ssm_BHPN=h_TD.new_zeros(1, self.num_heads, self.head_dim, self.state_size, dtype=dtype),
        )

    def project(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sizes = [self.intermediate_size, self.conv_dim, self.num_heads]
        gate, channels, dt = torch.split(self.in_proj(h), sizes, dim=-1)
        dt = widen(dt)
        dt = F.softplus(dt + self.dt_bias.to(dt.dtype))
        return gate, channels, dt if self.is_unlimited else dt.clamp(*self.time_step_limit)

    def split(self, convolved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size = self.num_groups * self.state_size
        x, B, C = torch.split(convolved, [self.intermediate_size, size, size], dim=-1)
        return (
            x.view(len(x), self.num_heads, self.head_dim),
            B.view(len(x), self.num_groups, self.state_size),
            C.view(len(x), self.num_groups, self.state_size),
        )

    def decay_rates(self) -> Tensor:
        return -torch.exp(widen(self.A_log))


def shift_window(window_KD: Tensor, channels_TD: Tensor) -> None:
    """Appends inputs of the convolution, in place."""
    recent = torch.cat([window_KD, channels_TD[max(0, len(channels_TD) - len(window_KD)) :].to(window_KD.dtype)])
    window_KD.copy_(recent[len(recent) - len(window_KD) :])
