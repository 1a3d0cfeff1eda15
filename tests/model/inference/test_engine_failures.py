"""engine: a failing request leaves the others alone, and an impossible one is refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from reference.engine_requests import (
    DIM,
    answers,
    ask,
    engine_of,
    first_id,
    ids_of,
    run,
    text_of,
    vision,
    vision_rows,
)
from reference.tiny_serving import CONFIG_WITH_TRANSV, random_model
from timeviper_model.inference import engine as engine_module
from timeviper_model.inference.detokenize import TextStream
from timeviper_model.inference.engine import InferenceEngine
from timeviper_model.inference.requests import Failed
from timeviper_model.timeviper import TimeViper


@pytest.fixture(scope="module")
def model() -> TimeViper:
    return random_model()


def test_a_request_whose_features_fail_leaves_the_others_alone(model: TimeViper) -> None:
    def broken() -> Iterable[torch.Tensor]:
        raise RuntimeError("the store is away")

    engine = engine_of(model)
    good, bad, short = (
        engine.submit(ask(max_new_tokens=3)),
        engine.submit(ask(vision_features=broken)),
        engine.submit(ask(vision_features=lambda: [vision(5)])),  # 5 rows for 8 tokens
    )
    events = run(engine)
    assert len(ids_of(events[good])) == 3
    assert isinstance(events[bad][-1], Failed)
    assert "the store is away" in events[bad][-1].error
    assert isinstance(events[short][-1], Failed)


@pytest.mark.parametrize("error", [KeyError("film"), TypeError("no such shard"), MemoryError("no room")])
def test_any_error_of_a_request_is_its_own_and_the_next_one_computes_the_prefix(
    model: TimeViper, error: Exception
) -> None:
    def broken() -> Iterable[torch.Tensor]:
        yield vision(24)[:10]
        raise error

    engine = engine_of(model, num_slots=2, prefix_cache_bytes=2**30, max_prefill_tokens=16)
    good = engine.submit(ask("a", max_new_tokens=9))
    bad = engine.submit(ask(num_vision=24, vision_features=broken, prefix_key="film"))
    again = engine.submit(ask(num_vision=24, prefix_key="film", max_new_tokens=3))
    events = run(engine)
    assert events[bad] == [Failed(request_id=bad, error=f"{type(error).__name__}: {error}")]
    assert len(ids_of(events[good])) == 9
    alone = engine_of(model)
    assert ids_of(events[again]) == ids_of(alone.stream(alone.submit(ask(num_vision=24, max_new_tokens=3))))
    assert (engine.stats().active_slots, engine.stats().prefix_misses) == (0, 2)


def test_a_request_whose_text_fails_leaves_the_others_alone(model: TimeViper, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(TextStream):
        def push(self, token_id: int) -> str:
            raise KeyError(token_id)

    engine = engine_of(model, num_slots=2)
    good = engine.submit(ask(max_new_tokens=3))
    early = engine.step()
    monkeypatch.setattr(engine_module, "TextStream", Broken)
    bad = engine.submit(ask())
    events = run(engine)
    events[good] = [*early, *events[good]]
    assert len(ids_of(events[good])) == 3
    assert isinstance(events[bad][-1], Failed)
    assert engine.stats().active_slots == 0


def test_nan_features_spoil_only_their_own_request(model: TimeViper) -> None:
    engine = engine_of(model, num_slots=2, prefix_cache_bytes=2**30)
    nan = torch.full((300, DIM), torch.nan, dtype=torch.float64)
    bad = engine.submit(ask(num_vision=300, vision_features=nan, prefix_key="film"))
    assert isinstance(run(engine)[bad][-1], Failed)
    requests = [ask(num_vision=num_vision, max_new_tokens=4) for num_vision in (8, 40)]
    requests.append(ask(num_vision=300, prefix_key="film", max_new_tokens=4))
    ids = [engine.submit(request) for request in requests]
    events = run(engine)
    expected, _, _ = answers(model, requests)
    assert [ids_of(events[i]) for i in ids] == [ids_of(answer) for answer in expected]
    assert engine.stats().prefix_misses == 2  # the first prefix is not kept


def test_a_failure_of_the_shared_device_is_raised_by_step(model: TimeViper, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost_device(*_: object) -> Iterable[torch.Tensor]:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    engine = engine_of(model)
    engine.submit(ask(vision_features=lost_device))
    with pytest.raises(torch.AcceleratorError, match="illegal memory"):
        engine.step()
    engine = engine_of(model)
    engine.submit(ask())
    monkeypatch.setattr(TimeViper, "decode_step", lost_device)
    with pytest.raises(torch.AcceleratorError, match="illegal memory"):
        engine.step()


def test_logits_that_are_not_finite_fail_their_request() -> None:
    model = random_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    engine = engine_of(model)
    (event,) = engine.stream(engine.submit(ask()))
    assert isinstance(event, Failed)
    assert "not finite" in event.error
    assert engine.stats().active_slots == 0


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        ({"max_prompt_tokens": 5}, {}, "the limit is 5"),
        ({"max_new_tokens": 5}, {"max_new_tokens": 6}, "limit of 5"),
        ({}, {"vision_features": torch.zeros(8, DIM + 1)}, "vision features"),
        ({}, {"prompt": first_id(300)}, "token id 300 is outside the vocabulary of 300"),
        ({}, {"prompt": first_id(-1)}, "token id -1"),
        ({}, {"prompt": vision_rows(7, 6, 5, 4, 3, 2, 1, 0)}, "vision token 0 reads row 7"),
        ({}, {"prompt": vision_rows(8, 1, 2, 3, 4, 5, 6, 7), "vision_features": list}, "vision token 0 reads row 8"),
        ({}, {"prompt": vision_rows(*[-1] * 8), "vision_features": list}, "token_kind must be VISION"),
    ],
)
def test_an_impossible_request_is_refused(
    model: TimeViper, config: dict[str, int], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        engine_of(model, **config).submit(ask(**values))


def test_without_a_tokenizer_answers_are_ids_and_stop_texts_refused(model: TimeViper) -> None:
    engine = InferenceEngine(model)
    assert engine.end_token_ids == {CONFIG_WITH_TRANSV.text.eos_token_id}
    assert text_of(list(engine.stream(engine.submit(ask(max_new_tokens=3))))) == ""
    with pytest.raises(ValueError, match="tokenizer"):
        engine.submit(ask(stop=("x",)))


@pytest.mark.parametrize("values", [{"max_new_tokens": 0}, {"stop": ("",)}, {"seed": 2**70}, {"seed": -(2**63) - 1}])
def test_a_malformed_request_is_refused_at_construction(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be at least 1|empty stop|torch's generator"):
        ask(**values)
