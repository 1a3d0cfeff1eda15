from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from timeviper_model.ops.norm import BLOCK_ELEMENTS, GatedRMSNorm, RMSNorm


@pytest.mark.parametrize("size", [6, BLOCK_ELEMENTS // 2], ids=["one block", "several blocks"])
def test_norm_and_gradients_equal_those_of_pytorch(size: int) -> None:
    layer = RMSNorm(size, 1e-5).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(size))
    x = torch.randn(7, size, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(7, size, dtype=torch.float64)
    ours, theirs = layer(x), F.rms_norm(x, (size,), layer.weight, 1e-5)
    torch.testing.assert_close(ours, theirs)
    inputs = [x, layer.weight]
    grads = torch.autograd.grad((ours * weights).sum(), inputs)
    torch.testing.assert_close(grads, torch.autograd.grad((theirs * weights).sum(), inputs))


def test_gated_norm_normalises_each_group_separately() -> None:
    layer = GatedRMSNorm(6, 2, 1e-5)
    x, gate = torch.randn(5, 6), torch.randn(5, 6)
    gated = x * F.silu(gate)
    halves = [F.rms_norm(half, (3,), eps=1e-5) for half in gated.chunk(2, -1)]
    torch.testing.assert_close(layer(x, gate), torch.cat(halves, -1))


def test_bf16_is_normed_in_fp32() -> None:
    layer = RMSNorm(64, 1e-5).bfloat16()
    x = torch.randn(3, 64).bfloat16() * 100
    expected = F.rms_norm(x.float(), (64,), eps=1e-5)
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x).float(), expected, rtol=8e-3, atol=1e-6)
