"""generate: its answers are those of the engine and of plain decoding."""

from __future__ import annotations

import pytest
import torch

from reference.engine_requests import TOKENIZER, answers, ask, ids_of, vision
from reference.tiny_serving import generate_alone, prompt, random_model
from timeviper_model.batching.batch import pack_samples
from timeviper_model.batching.prompt import NEMOTRON, end_token_id
from timeviper_model.inference.generate import generate, generate_ids, stream_ids
from timeviper_model.timeviper import TimeViper

END_ID = end_token_id(TOKENIZER, NEMOTRON)


@pytest.fixture(scope="module")
def model() -> TimeViper:
    return random_model()


@pytest.mark.parametrize("num_vision", [0, 24])
def test_the_text_is_that_of_plain_greedy_decoding(num_vision: int, model: TimeViper) -> None:
    sample, features = prompt(TOKENIZER, "What?", num_vision), vision(num_vision)
    ids = generate_alone(model, sample, features, num_tokens=12, end_ids=frozenset({END_ID}))
    expected = TOKENIZER.decode([i for i in ids if i != END_ID], skip_special_tokens=True).strip()
    assert generate(model, TOKENIZER, "What?", features if num_vision else None, max_new_tokens=12) == expected


def test_sampled_ids_are_those_of_the_engine(model: TimeViper) -> None:
    request = ask(num_vision=24, temperature=1.0, top_p=0.9, seed=3, max_new_tokens=10)
    ((expected,), _, _) = answers(model, [request])
    batch = pack_samples([request.prompt], [vision(24)])
    (ids,) = generate_ids(model, [batch], end_ids={END_ID}, params=request.sampling)
    assert ids == [token for token in ids_of(expected) if token != END_ID]


def test_a_finished_answer_leaves_the_others_running(model: TimeViper) -> None:
    batches = [pack_samples([prompt(TOKENIZER, text, 8)], [vision(8)]) for text in ("What?", "When is it?")]
    alone = [[tokens[0] for tokens, _ in zip(stream_ids(model, [batch]), range(9), strict=False)] for batch in batches]
    end_id = next(token for token in alone[0] if token not in alone[1])
    first, second = generate_ids(model, batches, end_ids={end_id})
    assert first == alone[0][: alone[0].index(end_id)]
    assert second[:9] == alone[1]


def test_a_token_is_computed_when_it_is_requested(model: TimeViper, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[torch.Tensor] = []
    decode_step = model.decode_step
    monkeypatch.setattr(model, "decode_step", lambda ids, *rest: steps.append(ids) or decode_step(ids, *rest))
    tokens = stream_ids(model, [pack_samples([prompt(TOKENIZER, "What?")], [vision(0)])])
    next(tokens)
    assert not steps
    next(tokens)
    assert len(steps) == 1
