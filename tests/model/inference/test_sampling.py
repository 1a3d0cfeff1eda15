"""sampling: greedy, cuts and draws against plain arithmetic."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from reference.simulated_cuda import simulated_cuda
from timeviper_model.inference.answer import SamplingParams
from timeviper_model.inference.sampling import SampledToken, sample_tokens

LOGITS = torch.log(torch.tensor([0.1, 0.4, 0.3, 0.2]))


def draw(params: SamplingParams, *, count: int = 4000, seed: int = 0) -> Counter[int]:
    generator = torch.Generator().manual_seed(seed)
    return Counter(sample_tokens(LOGITS[None], [params], [generator])[0].id for _ in range(count))


def one(logits: torch.Tensor, params: SamplingParams, seed: int = 0) -> SampledToken:
    return sample_tokens(logits[None], [params], [torch.Generator().manual_seed(seed)])[0]


def test_temperature_zero_takes_the_most_likely_and_the_lower_id_of_a_tie() -> None:
    assert one(LOGITS, SamplingParams()).id == 1
    assert one(torch.tensor([0.0, 5.0, 5.0]), SamplingParams()).id == 1


def test_draws_have_the_softmax_frequencies_at_each_temperature() -> None:
    for temperature in (1.0, 2.0):
        expected = torch.softmax(LOGITS / temperature, dim=0)
        counts = draw(SamplingParams(temperature=temperature))
        for token, probability in enumerate(expected.tolist()):
            # four standard deviations of a binomial
            assert abs(counts[token] / 4000 - probability) < 4 * math.sqrt(probability * (1 - probability) / 4000)


def test_top_k_and_top_p_leave_the_smallest_sets() -> None:
    assert set(draw(SamplingParams(temperature=1.0, top_k=2), count=300)) == {1, 2}
    assert set(draw(SamplingParams(temperature=1.0, top_p=0.65), count=300)) == {1, 2}
    assert set(draw(SamplingParams(temperature=1.0, top_p=0.71), count=300)) == {1, 2, 3}
    assert set(draw(SamplingParams(temperature=1.0, top_p=1e-6), count=300)) == {1}


def plain_draw(logits: torch.Tensor, params: SamplingParams, seed: int) -> int:
    """One row by a stable sort and the definitions."""
    order = sorted(range(len(logits)), key=lambda token: -float(logits[token]))
    scaled = [float(logits[token]) / params.temperature for token in order][: params.top_k or len(order)]
    masses = [math.exp(value - scaled[0]) for value in scaled]
    total, kept, before = math.fsum(masses), [], 0.0
    for mass in masses:
        if kept and before >= params.top_p * total:
            break
        kept.append(mass)
        before += mass
    generator = torch.Generator().manual_seed(seed)
    target, passed = float(torch.rand((), generator=generator, dtype=torch.float64)) * math.fsum(kept), 0.0
    for token, mass in zip(order, kept, strict=False):
        passed += mass
        if target < passed:
            return token
    return order[len(kept) - 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_row_is_drawn_as_by_the_definitions(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(60, 700, generator=generator, dtype=dtype)
    logits[20:40] = logits[20:40].round()  # many equal logits
    logits[40] = 0.0
    params = [
        SamplingParams(
            temperature=(0.3, 0.7, 1.0, 2.0)[row % 4], top_p=(1.0, 0.9, 0.5, 1e-3)[row // 4 % 4], top_k=(0, 5)[row % 2]
        )
        for row in range(60)
    ]
    generators = [torch.Generator().manual_seed(row) for row in range(60)]
    found = [token.id for token in sample_tokens(logits, params, generators)]
    assert found == [plain_draw(logits[row], params[row], row) for row in range(60)]


def test_a_step_waits_for_the_device_once() -> None:
    params = [
        SamplingParams(),
        SamplingParams(temperature=1.0, top_p=0.9),
        SamplingParams(temperature=0.5, top_k=3, num_logprobs=4),
    ]
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    expected = sample_tokens(logits, params, [torch.Generator().manual_seed(seed) for seed in range(3)])
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    with simulated_cuda() as device:
        on_device = logits.cuda()
        device.syncs.clear()
        found = sample_tokens(on_device, params, generators)
        assert sum(device.syncs.values()) == 1
    assert [token.id for token in found] == [token.id for token in expected]
    assert found[2].top_logprobs == expected[2].top_logprobs


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_says_so_and_leaves_the_others(bad: float, temperature: float) -> None:
    rows = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    params = [SamplingParams(temperature=temperature, top_p=0.9, num_logprobs=2)] * 3
    expected = sample_tokens(rows, params, [torch.Generator().manual_seed(seed) for seed in range(3)])
    rows[1, 7] = bad
    found = sample_tokens(rows, params, [torch.Generator().manual_seed(seed) for seed in range(3)])
    assert [token.is_finite for token in found] == [True, False, True]
    assert [found[0], found[2]] == [expected[0], expected[2]]


def test_a_row_draws_the_same_alone_and_among_others() -> None:
    params = SamplingParams(temperature=1.3, top_p=0.9)
    rows = torch.randn(5, 50, generator=torch.Generator().manual_seed(1))
    together = sample_tokens(rows, [params] * 5, [torch.Generator().manual_seed(seed) for seed in range(5)])
    alone = [one(rows[seed], params, seed) for seed in range(5)]
    assert [token.id for token in together] == [token.id for token in alone]


def test_log_probabilities_are_the_models_own_whatever_the_temperature() -> None:
    token = one(LOGITS, SamplingParams(temperature=1.7, num_logprobs=3))
    assert token.logprob == pytest.approx(LOGITS[token.id].item(), abs=1e-6)
    assert [i for i, _ in token.top_logprobs] == [1, 2, 3]
    assert [p for _, p in token.top_logprobs] == pytest.approx([math.log(0.4), math.log(0.3), math.log(0.2)], abs=1e-6)


@pytest.mark.parametrize(
    "values", [{"temperature": -0.1}, {"temperature": 2.1}, {"top_p": 0.0}, {"top_k": -1}, {"num_logprobs": 21}]
)
def test_a_value_out_of_range_is_an_error_with_its_name(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        SamplingParams(**values)  # type: ignore[arg-type]
