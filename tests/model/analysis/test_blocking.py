from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from reference.slow_timeviper import slow_logits
from reference.small_models import SMALL, SMALL_QWEN, make_features, make_model, make_sample, pack
from timeviper_model.analysis.blocking import Blocking, cut_flow, read_blocked
from timeviper_model.batching.batch import IGNORE_INDEX, PackedBatch, TokenKind, pack_samples
from timeviper_model.config import TimeViperConfig
from timeviper_model.inference.answer import SamplingParams
from timeviper_model.inference.generate import generate_ids
from timeviper_model.timeviper import TimeViper

LAYOUTS = ["ssvvvvvviiiirrr", "vviivvvirriirr", "siirr"]
SAMPLES = [make_sample(layout, seed=index) for index, layout in enumerate(LAYOUTS)]
MODEL = make_model()
"""M-*M*-: Mamba-2 at 0 and 3, attention at 2 and 4; TransV before 1 and 4."""


@torch.no_grad()
def blocked_logits(model: TimeViper, batch: PackedBatch, blocking: Blocking) -> Tensor:
    stream, _ = model.run_blocks(model.embed(batch), run_block=cut_flow(model, blocking))
    return model.logits(model.labelled(stream)[0])


def blocked_log_probs(model: TimeViper, batch: PackedBatch, blocking: Blocking) -> Tensor:
    return model.target_log_probs(batch, run_block=cut_flow(model, blocking))[0]


@torch.no_grad()
def slow_blocked_logits(blocking: Blocking, model: TimeViper = MODEL) -> Tensor:
    """Labelled logits of SAMPLES one by one, with an explicit matrix of who may read whom."""
    receiver = TokenKind.INSTRUCTION if blocking.flow == "v2i" else TokenKind.RESPONSE

    def may_read(layer: int, kinds: list[int]) -> Tensor | None:
        if not blocking.covers(layer, model.config.text.block_types[layer]):
            return None
        return torch.tensor([[not (i == receiver and j == TokenKind.VISION) for j in kinds] for i in kinds])

    rows = []
    for sample in SAMPLES:
        features = make_features(sample, seed=sum(sample.input_ids))
        logits, tokens = slow_logits(model, sample, features, may_read=may_read)
        rows += [row for row, token in zip(logits, tokens, strict=True) if sample.labels[token] != IGNORE_INDEX]
    return torch.stack(rows)


@pytest.mark.parametrize("flow", ["v2i", "v2r"])
@pytest.mark.parametrize(
    "scope",
    [
        {"scope": "layer", "layer": 0},
        {"scope": "layer", "layer": 2},
        {"scope": "window", "layer": 3, "window": 3},
        {"scope": "from_layer", "layer": 1, "kind": "attention"},
        {"scope": "from_layer", "layer": 0, "kind": "mamba"},
        {"scope": "from_layer", "layer": 0, "kind": "both"},
    ],
)
def test_blocked_model_equals_explicit_masks(flow: Any, scope: dict[str, Any]) -> None:
    blocking = Blocking(flow=flow, **scope)
    batch = pack(SAMPLES)
    torch.testing.assert_close(blocked_logits(MODEL, batch, blocking), slow_blocked_logits(blocking))
    assert not torch.equal(blocked_log_probs(MODEL, batch, blocking), MODEL.target_log_probs(pack(SAMPLES))[0])


@pytest.mark.parametrize("scope", [{"scope": "layer", "layer": 1}, {"scope": "from_layer", "layer": 0}])
def test_a_blocked_transformer_equals_explicit_masks(scope: dict[str, Any]) -> None:
    model, blocking = make_model(SMALL_QWEN), Blocking(flow="v2i", **scope)
    batch = pack(SAMPLES)
    torch.testing.assert_close(blocked_logits(model, batch, blocking), slow_blocked_logits(blocking, model))
    assert not torch.equal(blocked_log_probs(model, batch, blocking), model.target_log_probs(pack(SAMPLES))[0])


@pytest.mark.parametrize(
    "nothing",
    [
        Blocking(flow="v2i", scope="layer", layer=1),  # an MLP
        Blocking(flow="v2r", scope="layer", layer=0, kind="attention"),
        Blocking(flow="v2r", scope="from_layer", layer=5),
    ],
)
def test_blocking_nothing_is_the_plain_model_exactly(nothing: Blocking) -> None:
    model, batch = make_model(dtype=torch.float32), pack(SAMPLES, dtype=torch.float32)
    log_probs, segment_ids = model.target_log_probs(batch)
    blocked, blocked_ids = model.target_log_probs(batch, run_block=cut_flow(model, nothing))
    assert torch.equal(blocked, log_probs)
    assert torch.equal(blocked_ids, segment_ids)


def test_blocking_does_not_change_a_sample_without_vision() -> None:
    batch = pack([make_sample("ssssrrr")], dtype=torch.float32)
    model = make_model(dtype=torch.float32)
    blocked = blocked_log_probs(model, batch, Blocking(flow="v2r", scope="from_layer", layer=0))
    assert torch.equal(blocked, model.target_log_probs(batch)[0])


def test_with_every_path_cut_the_answer_does_not_depend_on_the_video() -> None:
    # no token before the vision, on which vision's decay could act
    layout = "vvvvvviiiii"
    sample = replace(make_sample(layout), labels=[IGNORE_INDEX] * 6 + [1, 2, 3, 4, 5])
    model, batch = make_model(replace(SMALL, transv=())), pack([sample])
    other = replace(batch, vision_features=batch.vision_features + 1.0)
    for kind, is_cut in {"both": True, "attention": False, "mamba": False}.items():
        blocking = Blocking(flow="v2i", scope="from_layer", layer=0, kind=kind)  # type: ignore[arg-type]
        logits, other_logits = (blocked_logits(model, b, blocking) for b in (batch, other))
        assert torch.equal(logits, other_logits) == is_cut


def test_invalid_blockings_are_refused() -> None:
    with pytest.raises(ValueError, match="must be odd"):
        Blocking(flow="v2i", scope="window", layer=2, window=4)
    with pytest.raises(ValueError, match="applies only to scope window"):
        Blocking(flow="v2i", scope="layer", layer=2, window=3)
    with pytest.raises(ValueError, match="0 to 5"):
        cut_flow(MODEL, Blocking(flow="v2i", scope="layer", layer=6))


@pytest.mark.parametrize("config", [SMALL, SMALL_QWEN], ids=["hybrid", "transformer"])
@pytest.mark.parametrize("flow", ["v2i", "v2r"])
@pytest.mark.parametrize("scope", [{"scope": "layer", "layer": 0}, {"scope": "from_layer", "layer": 0}])
def test_blocked_decoding_equals_a_blocked_pass_over_all_tokens(
    config: TimeViperConfig, flow: Any, scope: dict[str, Any]
) -> None:
    model, blocking, answer = make_model(config), Blocking(flow=flow, **scope), [7, 3, 11, 5, 2]
    cache = model.new_cache(1, device="cpu", dtype=torch.float64)
    for layout in ("ssvvvvvviii", "vviivvvii", "sii", "siv" + "v" * 40 + "i"):
        prompt = make_sample(layout)
        features = make_features(prompt)
        logits = [read_blocked(model, pack_samples([prompt], [features]), cache, 0, blocking)]
        logits += [model.decode_step(torch.tensor([token]), cache, torch.tensor([0]))[0] for token in answer[:-1]]
        num_new = len(answer) - 1
        whole = replace(
            prompt,
            input_ids=prompt.input_ids + answer[:-1],
            vision_index=prompt.vision_index + [-1] * num_new,
            token_kind=prompt.token_kind + [int(TokenKind.RESPONSE)] * num_new,
            labels=[IGNORE_INDEX] * (len(prompt) - 1) + answer,
        )
        expected = blocked_logits(model, pack_samples([whole], [features]), blocking)
        torch.testing.assert_close(torch.stack(logits), expected, rtol=1e-9, atol=1e-9)


def test_blocked_generation_has_its_own_reader() -> None:
    prompt = make_sample("ssvvvvvviiii")
    batch = pack_samples([prompt], [make_features(prompt)])
    params = SamplingParams(max_new_tokens=8)
    read = partial(read_blocked, MODEL, blocking=Blocking(flow="v2i", scope="from_layer", layer=0))
    blocked = generate_ids(MODEL, [batch], end_ids=(), params=params, read=read)
    assert blocked != generate_ids(MODEL, [batch], end_ids=(), params=params)
