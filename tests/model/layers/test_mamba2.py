from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reference.small_models import SMALL, make_model
from timeviper_model.batching.segments import Segments
from timeviper_model.layers.mamba2 import Mamba2Mixer, Mamba2State


@pytest.fixture
def mixer() -> Mamba2Mixer:
    modules = make_model(SMALL).modules()
    return next(module for module in modules if isinstance(module, Mamba2Mixer))


def one_segment(h_TD: Tensor) -> Segments:
    return Segments(torch.zeros(len(h_TD), dtype=torch.long), 1)


def hidden(num_tokens: int, mixer: Mamba2Mixer) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randn(num_tokens, mixer.in_proj.in_features, generator=generator, dtype=torch.float64)


def rows_projected(mixer: Mamba2Mixer) -> list[int]:
    rows: list[int] = []
    mixer.in_proj.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    return rows


def new_state(mixer: Mamba2Mixer) -> Mamba2State:
    """State of a sequence that has begun."""
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 3, mixer.conv_dim), (1, mixer.num_heads, mixer.head_dim, mixer.state_size)
    window, ssm = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return Mamba2State(window_BKD=window, ssm_BHPN=ssm)


@pytest.mark.parametrize("continues", [False, True])
@pytest.mark.parametrize("extra", [0, 1, 5])
def test_several_passes_give_what_one_pass_gives(extra: int, continues: bool, mixer: Mamba2Mixer) -> None:
    h_TD = hidden(3 * mixer.chunk_size + extra, mixer)
    states = [new_state(mixer) if continues else None for _ in range(2)]
    with torch.no_grad():
        expected = mixer(h_TD, one_segment(h_TD), states[0])
        mixer.max_projection_elements = 1
        rows = rows_projected(mixer)
        found = mixer(h_TD, one_segment(h_TD), states[1])
    assert rows == [mixer.chunk_size] * 3 + ([extra] if extra else [])
    torch.testing.assert_close(found, expected)
    if states[0] is not None and states[1] is not None:
        torch.testing.assert_close(states[1].ssm_BHPN, states[0].ssm_BHPN)
        torch.testing.assert_close(states[1].window_BKD, states[0].window_BKD)


def test_several_samples_and_gradients_go_in_one_pass(mixer: Mamba2Mixer) -> None:
    mixer.max_projection_elements = 1
    h_TD = hidden(3 * mixer.chunk_size, mixer)
    rows = rows_projected(mixer)
    two = Segments(torch.arange(len(h_TD)) // (2 * mixer.chunk_size), 2)
    with torch.no_grad():
        mixer(h_TD, two)
    mixer(h_TD, one_segment(h_TD)).sum().backward()
    assert rows == [len(h_TD)] * 2
