from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reference.slow_scan import slow_scan
from timeviper_model.ops.ssd import chunk_length, chunk_runs, ssd_scan, ssd_step

H, P, G, N = 4, 3, 2, 5


def make_inputs(num_tokens: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = {
        "x": normal(num_tokens, H, P),
        "dt": normal(num_tokens, H).abs(),
        "A": -normal(H).exp(),
        "B": normal(num_tokens, G, N),
        "C": normal(num_tokens, G, N),
        "D": normal(H),
        "initial": normal(H, P, N),
    }
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in inputs.items()}


def run(
    inputs: dict[str, Tensor], seq_idx: Tensor | None, *, chunk_size: int = 8, matrix_elements: int | None = None
) -> tuple[Tensor, Tensor]:
    x, dt, A, B, C, D, initial = inputs.values()
    options = {"D_H": D, "initial_state_HPN": initial, "seq_idx_T": seq_idx, "matrix_elements": matrix_elements}
    return ssd_scan(x, dt, A, B, C, chunk_size=chunk_size, **options)


@settings(max_examples=25, deadline=None)
@given(
    num_tokens=st.integers(1, 45),
    chunk_size=st.integers(1, 17),
    boundaries=st.none() | st.sets(st.integers(1, 44), max_size=5),
    chunks_at_once=st.integers(1, 4),
)
def test_scan_and_its_gradients_equal_the_sequential_recurrence(
    num_tokens: int, chunk_size: int, boundaries: set[int] | None, chunks_at_once: int
) -> None:
    inputs = make_inputs(num_tokens)
    seq_idx = None
    if boundaries is not None:
        seq_idx = torch.tensor([sum(edge <= t for edge in boundaries) for t in range(num_tokens)], dtype=torch.int32)
    matrix_elements = chunks_at_once * H * chunk_size**2
    y, last = run(inputs, seq_idx, chunk_size=chunk_size, matrix_elements=matrix_elements)
    weights = torch.randn_like(y), torch.randn_like(last)
    grads = torch.autograd.grad((y * weights[0]).sum() + (last * weights[1]).sum(), list(inputs.values()))
    slow_y, slow_last = slow_scan(*inputs.values(), seq_idx)
    slow_loss = (slow_y * weights[0]).sum() + (slow_last * weights[1]).sum()
    slow_grads = torch.autograd.grad(slow_loss, list(inputs.values()), allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(y, slow_y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(last, slow_last, rtol=1e-10, atol=1e-10)
    for name, grad, slow_grad in zip(inputs, grads, slow_grads, strict=True):
        torch.testing.assert_close(grad, slow_grad, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_scan_in_fp32_stays_near_the_float64_recurrence() -> None:
    inputs = make_inputs(333, dtype=torch.float32)
    seq_idx = (torch.arange(333) // 130).int()
    y, last = run(inputs, seq_idx, chunk_size=32)
    slow_y, slow_last = slow_scan(*(tensor.double() for tensor in inputs.values()), seq_idx)
    assert y.dtype == last.dtype == torch.float32
    torch.testing.assert_close(y.double(), slow_y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last.double(), slow_last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_gradient_of_a_single_heads_decay_is_exact_to_six_digits(seed: int) -> None:
    """Differences of <dy, y> and <d(dt x), dt x> would leave four digits of this sum without cancellation."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens, heads, head_dim, groups, state = 600, 16, 16, 2, 32
    shapes = (num_tokens, heads, head_dim), (num_tokens, groups, state), (num_tokens, groups, state)
    x, B, C = (torch.randn(shape, generator=generator) for shape in shapes)
    dt = torch.empty(num_tokens, heads).uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp()
    A, D = -torch.arange(1.0, 128.0, 8.0), torch.ones(heads)  # Mamba-2's initial values
    with torch.no_grad():
        weights, _ = ssd_scan(x, dt, A, B, C, D_H=torch.zeros(heads), chunk_size=128)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        operands = [tensor.to(dtype).requires_grad_() for tensor in (x, dt, A, B, C)]
        y, _ = ssd_scan(*operands, D_H=D.to(dtype), chunk_size=128)
        gradients.append(torch.autograd.grad((y * weights).sum(), operands[2])[0].double())
    found, exact = gradients
    assert float(((found - exact) / exact).abs().max()) < 1e-6


@pytest.mark.parametrize("with_gradients", [False, True])
def test_slow_decay_after_fast_decay_in_one_chunk_keeps_its_digits(with_gradients: bool) -> None:
    """In fp32, log decays summed to -2,000 have only four digits behind the point."""
    generator = torch.Generator().manual_seed(0)
    x, B, C = (torch.randn(48, each, 8, generator=generator) for each in (1, 1, 1))
    dt, A, D = torch.full((48, 1), 0.01), torch.tensor([-1.0]), torch.zeros(1)
    dt[:24] = 80.0
    with torch.set_grad_enabled(with_gradients):
        y, last = ssd_scan(x.requires_grad_(with_gradients), dt, A, B, C, D_H=D, chunk_size=64)
    slow_y, slow_last = slow_scan(*(tensor.detach().double() for tensor in (x, dt, A, B, C, D)))
    assert float((y.detach() - slow_y)[24:].abs().max() / slow_y[24:].abs().max()) < 1e-6
    assert float((last.detach() - slow_last).abs().max() / slow_last.abs().max()) < 1e-6


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 8, 9])
def test_without_gradients_short_sequences_equal_the_sequential_recurrence(num_tokens: int) -> None:
    inputs = make_inputs(num_tokens)
    y, last = run(inputs, None)
    with torch.no_grad():
        short_y, short_last = run(inputs, None)
        slow_y, slow_last = slow_scan(*inputs.values(), None)
    for short, slow in ((short_y, slow_y), (short_last, slow_last)):
        torch.testing.assert_close(short, slow, rtol=1e-10, atol=1e-10)
    assert (last.requires_grad, short_last.requires_grad) == (True, False)
    with torch.no_grad():
        state = inputs["initial"].clone()
        run({**inputs, "initial": state}, None)
        assert torch.equal(state, inputs["initial"])
    assert y.shape == short_y.shape


@pytest.mark.parametrize("with_gradients", [True, False])
def test_without_tokens_the_state_is_unchanged(with_gradients: bool) -> None:
    inputs = make_inputs(0)
    with torch.set_grad_enabled(with_gradients):
        y, last = run(inputs, None)
    assert y.shape == (0, H, P)
    assert torch.equal(last, inputs["initial"])


def test_a_sequence_in_chunks_with_carried_state_equals_one_scan() -> None:
    x, dt, A, B, C, D, initial = make_inputs(40).values()
    whole, last = ssd_scan(x, dt, A, B, C, D_H=D, chunk_size=8, initial_state_HPN=initial)
    state, outputs = initial, []
    for chunk in (slice(0, 13), slice(13, 14), slice(14, 40)):
        y, state = ssd_scan(x[chunk], dt[chunk], A, B[chunk], C[chunk], D_H=D, chunk_size=8, initial_state_HPN=state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs), whole)
    torch.testing.assert_close(state, last)


def test_steps_equal_the_scan() -> None:
    x, dt, A, B, C, D, initial = (tensor.detach() for tensor in make_inputs(9).values())
    whole, last = ssd_scan(x, dt, A, B, C, D_H=D, chunk_size=4, initial_state_HPN=initial)
    state = initial[None].clone()
    outputs = [
        ssd_step(x[t : t + 1], dt[t : t + 1], A, B[t : t + 1], C[t : t + 1], D_H=D, state_BHPN=state) for t in range(9)
    ]
    torch.testing.assert_close(torch.cat(outputs), whole)
    torch.testing.assert_close(state[0], last)


@pytest.mark.parametrize("dt", [0.0, 1e4])
def test_extreme_steps_stay_finite_in_value_and_gradient(dt: float) -> None:
    inputs = make_inputs(20, dtype=torch.float32)
    inputs["dt"] = torch.full((20, H), dt, requires_grad=True)
    with torch.no_grad():
        for value in run({name: tensor[:7] if len(tensor) == 20 else tensor for name, tensor in inputs.items()}, None):
            assert bool(torch.isfinite(value).all())
    y, last = run(inputs, None)
    grads = torch.autograd.grad(y.sum() + last.sum(), list(inputs.values()))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in (y, last, *grads))


def test_no_value_leaks_into_another_segment() -> None:
    inputs = make_inputs(24, dtype=torch.float32)
    seq_idx = (torch.arange(24) // 12).int()
    y, _ = run(inputs, seq_idx)
    with torch.no_grad():
        inputs["x"][:12] = 1e30
    changed, _ = run(inputs, seq_idx)
    assert torch.equal(changed[12:], y[12:])


@pytest.mark.parametrize(
    ("chunk_size", "state_size", "device", "expected"),
    [(128, 128, "cpu", 64), (128, 48, "cpu", 48), (128, 16, "cpu", 32), (16, 128, "cpu", 16), (128, 16, "meta", 128)],
)
def test_a_cpu_takes_shorter_chunks(chunk_size: int, state_size: int, device: str, expected: int) -> None:
    assert chunk_length(chunk_size, state_size, torch.device(device)) == expected


def test_a_device_computes_more_chunks_at_a_time() -> None:
    on_cpu, elsewhere = (list(chunk_runs(torch.empty(1000, 128, 1, device=device), 128)) for device in ("cpu", "meta"))
    assert [stop - start for start, stop, _ in on_cpu] == [128] * 7 + [104]
    assert [stop - start for start, stop, _ in elsewhere] == [896, 104]
