from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from reference import kernel_contracts
from timeviper_model.batching.segments import Segments
from timeviper_model.layers.attention import segment_causal_attention
from timeviper_model.ops.causal_conv import causal_conv_silu, causal_conv_silu_step
from timeviper_model.ops.kernels import (
    conv_in_chunks,
    kernel_conv_silu,
    kernel_conv_step,
    kernel_scan,
    kernel_scan_step,
    max_scan_tokens,
    max_tokens_below_limit,
    scan_in_chunks,
    varlen_attention,
)
from timeviper_model.ops.ssd import ssd_scan, ssd_step


class ScanInput(NamedTuple):
    x_THP: Tensor
    dt_TH: Tensor
    A_H: Tensor
    B_TGN: Tensor
    C_TGN: Tensor
    D_H: Tensor
    initial_state_HPN: Tensor


def scan_input(num_tokens: int, *, device: str = "cpu", dtype: torch.dtype = torch.float64) -> ScanInput:
    """Nemotron-like proportions: 8 heads of 64, 2 groups, state 32; dt and A are fp32 with bf16 values."""
    generator = torch.Generator().manual_seed(num_tokens)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    values = ScanInput(
        x_THP=randn(num_tokens, 8, 64),
        dt_TH=randn(num_tokens, 8).sub(2).exp(),
        A_H=-randn(8).exp(),
        B_TGN=0.3 * randn(num_tokens, 2, 32),
        C_TGN=0.3 * randn(num_tokens, 2, 32),
        D_H=randn(8),
        initial_state_HPN=randn(8, 64, 32),
    )
    in_values = {"x_THP", "B_TGN", "C_TGN"}
    return ScanInput(
        *(
            tensor.to(device, dtype if name in in_values else wide).requires_grad_()
            for name, tensor in values._asdict().items()
        )
    )


def scan_with_gradients(
    scan: Callable[..., tuple[Tensor, Tensor]], values: ScanInput, seq_idx: Tensor | None, **options: Any
) -> dict[str, Tensor]:
    """Outputs, and every gradient of a sum in which each output has its own weight."""
    *operands, D_H, initial = values
    y, last = scan(*operands, D_H=D_H, chunk_size=16, initial_state_HPN=initial, seq_idx_T=seq_idx, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(out.shape, generator=generator).to(out.device) for out in (y, last)]
    grads = torch.autograd.grad((y * weights[0]).sum() + (last * weights[1]).sum(), values)
    named = {f"d {name}": grad for name, grad in zip(values._fields, grads, strict=True)}
    return {"y": y.detach(), "last": last.detach(), **named}


SEGMENTS = {"one": [100], "ends between chunks": [20, 12, 68], "ends inside chunks": [5, 43, 1, 51]}


@pytest.mark.parametrize("max_tokens", [16, 32, 96, 112])
@pytest.mark.parametrize("lengths", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_a_scan_in_chunks_equals_one_scan_in_value_and_gradient(lengths: list[int], max_tokens: int) -> None:
    values = scan_input(100)
    seq_idx = Segments(torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)), len(lengths)).seq_idx_T
    in_chunks = scan_with_gradients(scan_in_chunks_of_torch, values, seq_idx, max_tokens=max_tokens)
    torch.testing.assert_close(in_chunks, scan_with_gradients(ssd_scan, values, seq_idx))


def scan_in_chunks_of_torch(*operands: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    lengths: list[int] = []

    def scan(x_THP: Tensor, *rest: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        lengths.append(len(x_THP))
        return ssd_scan(x_THP, *rest, **options)

    result = scan_in_chunks(scan, *operands, **options)  # type: ignore[misc, arg-type]
    assert max(lengths) <= options["max_tokens"]
    return result


@pytest.mark.parametrize("max_tokens", [4, 7, 40, 64])
def test_a_convolution_in_chunks_equals_one_convolution(max_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((40, 8), (8, 4), (8,)))
    positions = torch.cat([torch.arange(n) for n in (1, 8, 2, 29)])
    convolved = conv_in_chunks(causal_conv_silu, x, weight, bias, positions_T=positions, max_tokens=max_tokens)
    torch.testing.assert_close(convolved, causal_conv_silu(x, weight, bias, positions_T=positions))


def test_chunks_of_the_9b_stay_below_32_bits() -> None:
    convolved = torch.empty(256, 10240 + 2 * 1024, device="meta")
    x = convolved[:, :10240].view(256, 128, 80)
    B, C = (half.view(256, 8, 128) for half in convolved[:, 10240:].split(1024, 1))
    tokens = max_scan_tokens(x, torch.empty(256, 128, device="meta"), B, C, 128)
    assert tokens == 2**31 // (128 * 128) - 128  # the gradient of B, a row of 128 heads x 128 states, is the widest
    projected = torch.empty(256, 22656, device="meta")[:, :10240].view(256, 128, 80)
    assert max_scan_tokens(projected, projected[:, :, 0], B, C, 128) == (2**31 - 1) // 22656 // 128 * 128
    assert max_tokens_below_limit(2**31) == 1


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the kernels' modules by functions with the same contracts on a CPU."""
    names = "mamba_ssm.ops.triton.ssd_combined", "mamba_ssm.ops.triton.selective_state_update", "causal_conv1d"
    for name in (*names, "torch.nn.attention.varlen"):
        monkeypatch.setitem(sys.modules, name, kernel_contracts)


@pytest.mark.parametrize("max_tokens", [16, 48, 112])
@pytest.mark.parametrize("lengths", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_the_scan_keeps_the_contract_of_its_kernel(stand_ins: None, lengths: list[int], max_tokens: int) -> None:
    values = scan_input(100, dtype=torch.float32)
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    seq_idx = Segments(ids, len(lengths)).seq_idx_T
    with torch.no_grad():
        found, expected = (
            scan(*values[:5], D_H=values.D_H, chunk_size=16, initial_state_HPN=values[6], seq_idx_T=seq_idx)
            for scan in (partial(kernel_scan, max_tokens=max_tokens), ssd_scan)
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_between_kernel_calls_the_state_of_a_bf16_scan_stays_fp32(stand_ins: None) -> None:
    """A bf16 state would have two to three digits."""
    values = scan_input(96, dtype=torch.bfloat16)
    with torch.no_grad():
        (_, found), (_, expected) = (
            kernel_scan(*values[:5], D_H=values.D_H, chunk_size=16, initial_state_HPN=values[6], max_tokens=max_tokens)
            for max_tokens in (16, 96)
        )
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("first", [0, 4])
@pytest.mark.parametrize("with_window", [False, True])
@pytest.mark.parametrize("max_tokens", [None, 10])
def test_the_convolution_keeps_the_contract_of_its_kernel(
    stand_ins: None, first: int, with_window: bool, max_tokens: int | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = (40, 68), (64, 4), (64,), (3, 64)
    wide, weight, bias, window = (torch.randn(shape, generator=generator) for shape in shapes)
    x = wide[:, first : first + 64]  # rows that do not start at multiples of eight
    positions = torch.arange(40) if with_window else torch.cat([torch.arange(n) for n in (1, 8, 2, 29)])
    options = {"positions_T": positions, "initial_KD": window if with_window else None}
    found = kernel_conv_silu(x, weight, bias, **options, max_tokens=max_tokens)
    torch.testing.assert_close(found, causal_conv_silu(x, weight, bias, **options))


def step_inputs(device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """x, dt, A, B, C, D and states of three sequences; x, B and C are views, as the convolution leaves them."""
    values = scan_input(3, device=device, dtype=dtype)
    row = torch.cat([each.flatten(1) for each in (values.x_THP, values.B_TGN, values.C_TGN)], dim=1).detach()
    x, B, C = row.split([8 * 64, 2 * 32, 2 * 32], dim=1)
    states = torch.stack([values.initial_state_HPN.detach() * scale for scale in (1.0, 2.0, -1.0)])
    operands = (x.view(3, 8, 64), values.dt_TH, values.A_H, B.view(3, 2, 32), C.view(3, 2, 32), values.D_H, states)
    return tuple(each.detach() for each in operands)


def run_step(step: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    *operands, D, states = inputs
    state = states.clone()
    outputs = [step(*operands, D_H=D, state_BHPN=state) for _ in range(2)]
    return {"first": outputs[0], "second": outputs[1], "state": state}


def run_conv_step(step: Callable[..., Tensor], device: str = "cpu") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 3, 72), (64, 4), (64,), (5, 3, 64)
    wide, weight, bias, windows = (
        torch.randn(shape, generator=generator).to(device, torch.bfloat16) for shape in shapes
    )
    window = windows[1:4]  # running slots of a cache
    outputs = [step(x_BD, weight, bias, window) for x_BD in wide[:, :, 8:]]
    return {"first": outputs[0], "second": outputs[1], "window": windows}


def test_steps_keep_the_contracts_of_their_kernels(stand_ins: None) -> None:
    inputs = step_inputs()
    expect_near(run_step(kernel_scan_step, inputs), run_step(ssd_step, inputs))
    expect_near(run_conv_step(kernel_conv_step), run_conv_step(causal_conv_silu_step))


@pytest.mark.gpu
def test_step_kernels_equal_the_torch_steps() -> None:
    pytest.importorskip("mamba_ssm.ops.triton.selective_state_update")
    pytest.importorskip("causal_conv1d")
    inputs = step_inputs("cuda")
    expect_near(run_step(kernel_scan_step, inputs), run_step(ssd_step, inputs))
    expect_near(run_conv_step(kernel_conv_step, "cuda"), run_conv_step(causal_conv_silu_step, "cuda"))


@pytest.mark.parametrize("lengths", [[9], [3, 0, 1, 6], [0]])
def test_attention_keeps_the_contract_of_its_kernel(stand_ins: None, lengths: list[int]) -> None:
    segments = Segments(torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)), len(lengths))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), heads, 8, generator=generator) for heads in (4, 2, 2))
    torch.testing.assert_close(varlen_attention(q, k, v, segments), segment_causal_attention(q, k, v, segments))


def test_without_tokens_attention_still_reaches_every_operand(stand_ins: None) -> None:
    q, k, v = (torch.zeros(0, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    mixed = varlen_attention(q, k, v, Segments(torch.zeros(0, dtype=torch.long), 1))
    assert len(torch.autograd.grad(mixed.sum(), (q, k, v))) == 3


@pytest.mark.parametrize("with_state", [False, True])
def test_without_tokens_scan_and_convolution_launch_no_kernel(stand_ins: None, with_state: bool) -> None:
    x, dt, A, B, C, D, initial = scan_input(0, dtype=torch.bfloat16)
    state = initial if with_state else None
    y, last = kernel_scan(x, dt, A, B, C, D_H=D, chunk_size=16, initial_state_HPN=state)
    assert (y.shape, y.dtype) == (x.shape, torch.float32)
    assert torch.equal(last, initial if with_state else torch.zeros_like(initial))
    assert len(torch.autograd.grad(y.sum() + last.sum(), (x, dt, A, B, C, D))) == 6
    rows, weight, window = torch.zeros(0, 64), torch.zeros(64, 4), torch.zeros(3, 64) if with_state else None
    convolved = kernel_conv_silu(rows, weight, None, positions_T=torch.zeros(0, dtype=torch.long), initial_KD=window)
    assert convolved.shape == rows.shape


def test_a_single_unaligned_row_is_copied(stand_ins: None) -> None:
    generator = torch.Generator().manual_seed(0)
    wide, weight = (torch.randn(shape, generator=generator) for shape in ((1, 68), (64, 4)))
    options = {"bias_D": None, "positions_T": torch.zeros(1, dtype=torch.long)}
    found, expected = (convolve(wide[:, 4:], weight, **options) for convolve in (kernel_conv_silu, causal_conv_silu))
    torch.testing.assert_close(found, expected)


# The kernels themselves against the functions they replace: `pytest -m gpu` on a CUDA device.

TOLERANCE = {"rtol": 2e-2, "atol": 2e-2}
"""Relative to the largest value of each tensor; bf16 has eight bits."""


def expect_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        scale = value.float().abs().max()
        torch.testing.assert_close(found[name].float() / scale, value.float() / scale, **TOLERANCE, msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[200], [64, 136], [5, 91, 1, 103]])
@pytest.mark.parametrize("max_tokens", [64, 256])
def test_mamba_ssm_equals_the_torch_scan(lengths: list[int], max_tokens: int) -> None:
    pytest.importorskip("mamba_ssm.ops.triton.ssd_combined")
    values = scan_input(200, device="cuda", dtype=torch.bfloat16)
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).cuda()
    seq_idx = Segments(ids, len(lengths)).seq_idx_T
    expected = scan_with_gradients(ssd_scan, values, seq_idx)
    expect_near(scan_with_gradients(kernel_scan, values, seq_idx, max_tokens=max_tokens), expected)


@pytest.mark.gpu
def test_a_scan_longer_than_32_bits_equals_its_chunks() -> None:
    pytest.importorskip("mamba_ssm.ops.triton.ssd_combined")
    num_tokens = 180_000  # x alone has 2^31 elements where a token has 12,288
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    with torch.no_grad():
        x, B, C = randn(num_tokens, 128, 80), 0.1 * randn(num_tokens, 8, 128), 0.1 * randn(num_tokens, 8, 128)
        dt = randn(num_tokens, 128).float().sub(4).exp()
        A, D = -torch.linspace(1, 16, 128, device="cuda"), torch.ones(128, device="cuda")
        y, last = kernel_scan(x, dt, A, B, C, D_H=D, chunk_size=128)
        state = None
        for index in torch.arange(num_tokens).split(20_000):
            chunk = slice(int(index[0]), int(index[-1]) + 1)
            expected, state = ssd_scan(
                x[chunk], dt[chunk], A, B[chunk], C[chunk], D_H=D, chunk_size=128, initial_state_HPN=state
            )
            expect_near({"y": y[chunk]}, {"y": expected})
        assert state is not None
        expect_near({"last": last}, {"last": state})


@pytest.mark.gpu
@pytest.mark.parametrize("with_window", [False, True])
def test_causal_conv1d_equals_the_torch_convolution(with_window: bool) -> None:
    pytest.importorskip("causal_conv1d")
    generator = torch.Generator().manual_seed(0)
    shapes = ((50, 72), (64, 4), (64,), (3, 64))
    wide, weight, bias, window = (
        torch.randn(shape, generator=generator).to("cuda", torch.bfloat16).requires_grad_() for shape in shapes
    )
    x = wide[:, 8:]  # a view, as a split projection is
    lengths = (50,) if with_window else (1, 18, 2, 29)
    positions = torch.cat([torch.arange(n) for n in lengths]).cuda()
    initial = window if with_window else None
    found, expected = (
        convolve(x, weight, bias, positions_T=positions, initial_KD=initial)
        for convolve in (kernel_conv_silu, causal_conv_silu)
    )
    leaves = [wide, weight, bias, *([window] if with_window else [])]
    upstream = torch.randn(found.shape, generator=generator).to(found)
    for name, own, other in zip(
        ("wide", "weight", "bias", "window"),
        torch.autograd.grad(found, leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream),
        strict=False,
    ):
        expect_near({name: own}, {name: other})
    expect_near({"y": found}, {"y": expected})


@pytest.mark.gpu
@pytest.mark.parametrize("num_kv_heads", [8, 2])
def test_varlen_attention_equals_attention_over_padded_rows(num_kv_heads: int) -> None:
    lengths = [70, 0, 1, 129, 40]
    ids = torch.arange(5).repeat_interleave(torch.tensor(lengths)).cuda()
    segments = Segments(ids, 5)
    generator = torch.Generator().manual_seed(0)
    q, k, v, upstream = (
        torch.randn(len(ids), heads, 64, generator=generator).to("cuda", torch.bfloat16).requires_grad_()
        for heads in (8, num_kv_heads, num_kv_heads, 8)
    )
    found, expected = (attend(q, k, v, segments) for attend in (varlen_attention, segment_causal_attention))
    expect_near({"y": found}, {"y": expected})
    gradients = (torch.autograd.grad(out, (q, k, v), upstream.detach()) for out in (found, expected))
    for own, other in zip(*gradients, strict=True):
        expect_near({"gradient": own}, {"gradient": other})
