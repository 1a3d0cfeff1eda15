from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reference.slow_scan import slow_hidden_attention
from reference.small_models import SMALL, SMALL_QWEN, make_model, make_sample, pack
from timeviper_model.analysis.maps import AttentionMap
from timeviper_model.layers import importance as module
from timeviper_model.layers.importance import importance, score_inputs
from timeviper_model.layers.mamba2 import Mamba2Mixer

BATCH = pack([make_sample("ss" + "v" * 8 + "iiir", seed=1)])
QUERIES = torch.tensor([10, 12])


def by_loops(layer: int) -> Tensor:
    """Importance from the whole matrix of the block, a query and a head at a time."""
    model = make_model()
    stream, block = model.embed(BATCH), model.backbone.block(layer)
    normed = block.norm(stream.hidden_TD)
    if isinstance(block.mixer, Mamba2Mixer):
        mixer = block.mixer
        _, channels, dt = mixer.project(normed)
        taps = mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias
        _, B, C = mixer.split(mixer.convolve(channels, *taps, positions_T=stream.segments.positions_T))
        matrix = slow_hidden_attention(dt, torch.zeros(4, dtype=torch.float64), B, C).abs()  # without decay
    else:
        matrix = AttentionMap(block.mixer, normed, stream.segments).rows(torch.arange(len(normed)))
    total = torch.zeros(len(normed), dtype=torch.float64)
    for head in matrix:
        for query in QUERIES.tolist():
            total += head[query] / head[query].sum()
    return total / (len(matrix) * len(QUERIES))


@pytest.mark.parametrize("layer", [0, 2], ids=["mamba", "attention"])
@pytest.mark.parametrize("elements", [1, 2**22])
def test_importance_is_the_mean_share_of_a_token(layer: int, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MATRIX_ELEMENTS", elements)
    model = make_model()
    stream = model.embed(BATCH)
    found = importance(score_inputs(model.backbone.block(layer), stream.hidden_TD, stream.segments), QUERIES)
    torch.testing.assert_close(found, by_loops(layer))
    assert found.sum() == pytest.approx(1.0)
    assert found[13] == 0  # after every query


@pytest.mark.parametrize("config", [SMALL, SMALL_QWEN], ids=["hybrid", "transformer"])
def test_inputs_of_a_pack_are_those_of_its_samples(config: object) -> None:
    samples = [make_sample("ssvvvvii", seed=1), make_sample("svvvvvvvvi", seed=2)]
    model = make_model(config)  # type: ignore[arg-type]
    block = model.backbone.block(0)
    together = model.embed(pack(samples))
    both = score_inputs(block, together.hidden_TD, together.segments)
    first = model.embed(pack(samples[:1]))
    alone = score_inputs(block, first.hidden_TD, first.segments)
    torch.testing.assert_close(both.take(slice(0, 8)), alone)
