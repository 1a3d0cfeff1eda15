"""sampling: greedy, cuts and draws against plain arithmetic."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

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
    assert set(draw(SamplingParams(temperature=1.0, top_k=2))) == {1, 2}
    assert set(draw(SamplingParams(temperature=1.0, top_p=0.65))) == {1, 2}
    assert set(draw(SamplingParams(temperature=1.0, top_p=0.71))) == {1, 2, 3}
    assert set(draw(SamplingParams(temperature=1.0, top_p=1e-6))) == {1}


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
