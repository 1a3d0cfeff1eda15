from __future__ import annotations

import pytest
import torch

from reference.slow_scan import slow_conv_silu
from timeviper_model.ops.causal_conv import BLOCK_ELEMENTS, causal_conv_silu, causal_conv_silu_step, token_blocks

D, K = 5, 4


@pytest.mark.parametrize("lengths", [[1], [2], [30], [1, 1, 2, 3, 9, 4, 1], [7, 8]])
@pytest.mark.parametrize("D", [5, BLOCK_ELEMENTS // 3], ids=["one block", "three tokens a block"])
def test_convolution_and_gradients_equal_the_taps_inside_each_segment(lengths: list[int], D: int) -> None:
    generator = torch.Generator().manual_seed(0)
    positions = torch.cat([torch.arange(length) for length in lengths])
    inputs = [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((len(positions), D), (D, K), (D,))
    ]
    fast = causal_conv_silu(*inputs, positions_T=positions)
    slow = slow_conv_silu(*inputs, positions)
    torch.testing.assert_close(fast, slow)
    weights = torch.randn(fast.shape, generator=generator, dtype=torch.float64)
    grads = torch.autograd.grad((fast * weights).sum(), inputs)
    torch.testing.assert_close(grads, torch.autograd.grad((slow * weights).sum(), inputs))


def test_steps_and_an_initial_window_continue_the_convolution() -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((9, D), (D, K), (D,)))
    whole = causal_conv_silu(x, weight, bias, positions_T=torch.arange(9))
    rest = causal_conv_silu(x[5:], weight, bias, positions_T=torch.arange(4), initial_KD=x[2:5])
    torch.testing.assert_close(rest, whole[5:])
    window = x[2:5][None].clone()
    stepped = [causal_conv_silu_step(x[t : t + 1], weight, bias, window) for t in range(5, 9)]
    torch.testing.assert_close(torch.cat(stepped), whole[5:])
    assert torch.equal(window[0], x[6:9])


def test_no_bias_equals_a_zero_bias() -> None:
    x, weight = torch.randn(4, D), torch.randn(D, K)
    positions = torch.arange(4)
    torch.testing.assert_close(
        causal_conv_silu(x, weight, None, positions_T=positions),
        causal_conv_silu(x, weight, torch.zeros(D), positions_T=positions),
    )


def test_bf16_is_summed_in_fp32() -> None:
    generator = torch.Generator().manual_seed(2)
    x, weight, bias = (torch.randn(shape, generator=generator).bfloat16() for shape in ((50, D), (D, K), (D,)))
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    wide = [tensor.detach().float().requires_grad_() for tensor in inputs]
    positions = torch.arange(50) % 20
    half, full = (causal_conv_silu(*tensors, positions_T=positions) for tensors in (inputs, wide))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, rtol=1e-2, atol=1e-2)
    grads = torch.autograd.grad(half.sum(), inputs)
    expected = torch.autograd.grad(full.sum(), wide)
    for grad, wide_grad in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad.float(), wide_grad, rtol=2e-2, atol=5e-2)


def test_a_device_takes_a_prefill_chunk_as_one_block() -> None:
    on_cpu, on_device = (torch.empty(2048, 12288, device=device) for device in ("cpu", "meta"))
    assert token_blocks(on_device) == [(0, 2048)]
    assert len(token_blocks(on_cpu)) == 205
