"""Row group `kernels`: CUDA kernels against the PyTorch operations, both in bf16, at the sizes of the 9B.

Errors are ||kernel - torch|| / ||torch|| over outputs and gradients. Missing kernels are logged and have no row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from timeviper_model.batching.segments import Segments
from timeviper_model.config import NEMOTRON_NANO_9B_V2, HybridConfig
from timeviper_model.layers.attention import segment_causal_attention
from timeviper_model.ops.causal_conv import causal_conv_silu
from timeviper_model.ops.kernels import kernel_conv_silu, kernel_scan, varlen_attention
from timeviper_model.ops.ssd import ssd_scan
from timeviper_platform.benchmarks.gpu.device import DTYPE, free_memory, make_row, measure
from timeviper_platform.benchmarks.measure import Row

logger = logging.getLogger(__name__)


class Pair(NamedTuple):
    """A kernel and its PyTorch counterpart, with operands that need gradients."""

    name: str
    kernel: Callable[..., Sequence[Tensor]]
    torch: Callable[..., Sequence[Tensor]]
    operands: tuple[Tensor, ...]


def kernel_rows(
    device: torch.device, *, text: HybridConfig = NEMOTRON_NANO_9B_V2, num_tokens: int = 8192, repeats: int = 20
) -> list[Row]:
    rows: list[Row] = []
    for pair in pairs(text, num_tokens, device):
        name = f"{pair.name}, {num_tokens} tokens of the 9B's sizes"
        try:
            error = largest_error(pair)
        except ImportError as missing:
            logger.warning("no row for %s: %s; install the extra [cuda]", pair.name, missing)
            continue
        except RuntimeError as failure:  # one failing kernel does not stop the others
            logger.exception("%s failed", pair.name)
            reason = f"{type(failure).__name__}: {str(failure).partition(chr(10))[0]}"
            rows.append(make_row("kernels", f"{name}: {reason}", 0.0, "kernels that ran", ">= 1"))
            continue
        with torch.no_grad():
            ours = measure(partial(pair.kernel, *pair.operands), device, repeats=repeats)
            control = measure(partial(pair.torch, *pair.operands), device, repeats=repeats)
        rows += [
            make_row("kernels", f"{name}: largest error of outputs and gradients", error, "of the norm", "<= 0.02"),
            make_row("kernels", f"{name}: times faster than PyTorch, forward", control.seconds / ours.seconds, "x"),
        ]
        free_memory(device)
    return rows


def pairs(text: HybridConfig, num_tokens: int, device: torch.device) -> Iterator[Pair]:
    """Scan, convolution and attention over a pack of three segments of unequal length."""
    cuts = num_tokens // 2, num_tokens // 2 + num_tokens // 8
    lengths = torch.tensor([cuts[0], cuts[1] - cuts[0], num_tokens - cuts[1]])
    segments = Segments(torch.arange(3).repeat_interleave(lengths).to(device), 3)
    generator = torch.Generator(device=device).manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    heads, groups, state = text.mamba_num_heads, text.n_groups, text.ssm_state_size
    scan_operands = (
        randn(num_tokens, heads, text.mamba_head_dim),
        randn(num_tokens, heads, dtype=torch.float32).sub(2).exp(),  # dt and A stay in fp32, as in the mixer
        -randn(heads, dtype=torch.float32).exp(),
        randn(num_tokens, groups, state) * 0.3,
        randn(num_tokens, groups, state) * 0.3,
    )
    skip = randn(heads)

    def scan(operation: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Sequence[Tensor]]:
        return lambda *x: operation(*x, D_H=skip, chunk_size=text.chunk_size, seq_idx_T=segments.seq_idx_T)

    yield Pair("scan (mamba-ssm)", scan(kernel_scan), scan(ssd_scan), _with_gradients(scan_operands))
    channels, taps = text.conv_dim, text.conv_kernel
    conv_operands = randn(num_tokens, channels), randn(channels, taps), randn(channels)

    def convolution(operation: Callable[..., Tensor]) -> Callable[..., Sequence[Tensor]]:
        return lambda *x: (operation(*x, positions_T=segments.positions_T),)

    yield Pair(
        "convolution (causal-conv1d)",
        convolution(kernel_conv_silu),
        convolution(causal_conv_silu),
        _with_gradients(conv_operands),
    )
    query, kv = (text.num_attention_heads, text.head_dim), (text.num_key_value_heads, text.head_dim)
    attention_operands = randn(num_tokens, *query), randn(num_tokens, *kv), randn(num_tokens, *kv)

    def attention(operation: Callable[..., Tensor]) -> Callable[..., Sequence[Tensor]]:
        return lambda *x: (operation(*x, segments),)

    yield Pair(
        "attention (torch varlen)",
        attention(varlen_attention),
        attention(segment_causal_attention),
        _with_gradients(attention_operands),
    )


def largest_error(pair: Pair) -> float:
    found, expected = (_values(run, pair.operands) for run in (pair.kernel, pair.torch))
    return max(
        float((ours.double() - theirs.double()).norm() / theirs.double().norm())
        for ours, theirs in zip(found, expected, strict=True)
    )


def _values(run: Callable[..., Sequence[Tensor]], operands: tuple[Tensor, ...]) -> list[Tensor]:
    outputs = run(*operands)
    generator = torch.Generator(device=operands[0].device).manual_seed(1)
    weights = [torch.randn(out.shape, generator=generator, device=out.device) for out in outputs]
    total = torch.stack([(out * weight).sum() for out, weight in zip(outputs, weights, strict=True)]).sum()
    return [*(out.detach() for out in outputs), *torch.autograd.grad(total, operands)]


def _with_gradients(operands: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(operand.detach().requires_grad_() for operand in operands)
