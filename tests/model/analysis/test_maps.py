from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from reference.slow_scan import slow_hidden_attention
from reference.small_models import make_model, make_sample, pack
from timeviper_model.analysis.maps import TokenMap, observe, row_blocks, token_map
from timeviper_model.batching.segments import Segments
from timeviper_model.layers.attention import segment_causal_attention
from timeviper_model.layers.mamba2 import Mamba2Mixer
from timeviper_model.layers.transv import TokenStream
from timeviper_model.ops.causal_conv import causal_conv_silu
from timeviper_model.ops.ssd import ssd_scan

SAMPLES = [make_sample("sss" + "v" * 9 + "iiirr", seed=1), make_sample("svvvvirr", seed=2)]
MODEL = make_model()


def seen_at(layer: int) -> tuple[TokenMap, TokenStream]:
    return observe(MODEL, pack(SAMPLES), [layer], lambda tokens, stream: (tokens, stream))[layer]


@pytest.mark.parametrize("layer", [2, 4])
def test_attention_rows_are_softmax_inside_each_segment(layer: int) -> None:
    tokens, stream = seen_at(layer)
    block = MODEL.backbone.block(layer)
    h, positions = block.attention_norm(stream.hidden_TD), stream.segments.original_positions_T
    q, k = block.attention.queries(h, positions), block.attention.keys(h, positions)
    ids = stream.segments.ids.tolist()
    expected = torch.zeros(4, len(ids), len(ids), dtype=torch.float64)
    for head in range(4):
        for i in range(len(ids)):
            sees = [j for j in range(i + 1) if ids[j] == ids[i]]
            expected[head, i, sees] = torch.softmax(k[sees, head // 2] @ q[i, head] / math.sqrt(8), 0)
    queries = torch.arange(len(ids)).flip(0)[::2]
    torch.testing.assert_close(tokens.rows(queries), expected[:, queries])
    v = block.attention.values(h)
    mixed = torch.einsum("hij,jhe->ihe", expected, v.repeat_interleave(2, 1))
    torch.testing.assert_close(mixed, segment_causal_attention(q, k, v, stream.segments))


def scan_operands(layer: int, stream: TokenStream) -> tuple[Mamba2Mixer, Tensor, Tensor, Tensor, Tensor]:
    block = MODEL.backbone.block(layer)
    mixer = block.mixer
    assert isinstance(mixer, Mamba2Mixer)
    _, channels, dt = mixer.project(block.norm(stream.hidden_TD))
    taps = mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias
    return mixer, dt, *mixer.split(causal_conv_silu(channels, *taps, positions_T=stream.segments.positions_T))


@pytest.mark.parametrize("layer", [0, 3])
def test_hidden_attention_is_the_scan_written_as_a_matrix(layer: int) -> None:
    tokens, stream = seen_at(layer)
    mixer, dt, x, B, C = scan_operands(layer, stream)
    matrix = tokens.rows(torch.arange(len(x)))
    y, _ = ssd_scan(x, dt, mixer.decay_rates(), B, C, D_H=mixer.D, chunk_size=8, seq_idx_T=stream.segments.seq_idx_T)
    torch.testing.assert_close(
        torch.einsum("hij,jhp->ihp", matrix, x) + mixer.D[:, None] * x, y, rtol=1e-10, atol=1e-10
    )
    first = stream.segments.lengths[0]
    expected = slow_hidden_attention(dt[:first], mixer.decay_rates(), B[:first], C[:first])
    torch.testing.assert_close(matrix[:, :first, :first], expected)
    assert not matrix[:, first:, :first].any()
    assert not matrix.triu(1).any()


def test_long_decays_keep_their_differences_in_fp32() -> None:
    generator = torch.Generator().manual_seed(0)
    model = make_model(dtype=torch.float32)
    long = TokenStream(
        hidden_TD=torch.randn(20000, 24, generator=generator),
        segments=Segments(torch.zeros(20000, dtype=torch.int32), 1),
        token_kind_T=torch.zeros(20000, dtype=torch.int8),
        labels_T=torch.full((20000,), -100),
        original_counts=(0,),
    )
    last = torch.tensor([19999])
    in_fp32 = token_map(model.backbone.block(0), long).rows(last)
    hidden = long.hidden_TD.double()
    exact = token_map(model.double().backbone.block(0), long.with_hidden(hidden)).rows(last)
    worst = (in_fp32 - exact).abs().amax(-1) / exact.abs().amax(-1)
    assert worst.max() < 3e-6


def test_rows_come_in_blocks_of_bounded_size() -> None:
    tokens, stream = seen_at(3)
    num_tokens = len(stream.segments.ids)
    whole = tokens.rows(torch.arange(num_tokens))
    blocks = list(row_blocks(tokens, max_elements=4 * num_tokens * 3))
    assert max(rows.numel() for _, rows in blocks) == 4 * num_tokens * 3
    assert torch.equal(torch.cat([index for index, _ in blocks]), torch.arange(num_tokens))
    torch.testing.assert_close(torch.cat([rows for _, rows in blocks], 1), whole)


def test_blocks_without_a_map_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layers \[1, 6\] do not mix tokens.*\[0, 2, 3, 4\]"):
        observe(MODEL, pack(SAMPLES), [0, 1, 6], lambda tokens, stream: None)
    stream = seen_at(0)[1]
    with pytest.raises(ValueError, match="MLP"):
        token_map(MODEL.backbone.block(1), stream)
