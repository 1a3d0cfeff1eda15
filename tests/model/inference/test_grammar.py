"""grammar: answers follow a JSON schema, and other requests of the batch do not notice."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from reference.engine_requests import TOKENIZER, ask, engine_of, ids_of, run, text_of
from reference.tiny_serving import CONFIG_WITH_TRANSV, random_model
from timeviper_model.inference import graph_choice
from timeviper_model.inference.engine import InferenceEngine
from timeviper_model.inference.grammar import GrammarCompiler, allowed_tokens
from timeviper_model.inference.requests import EngineConfig, Failed, Finished, Token
from timeviper_model.timeviper import TimeViper

COLOURS = {"type": "string", "enum": ["red", "green", "blue"]}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "colours": {"type": "array", "items": COLOURS, "minItems": 2, "maxItems": 4},
        "count": {"type": "integer", "minimum": 3, "maximum": 250},
    },
    "required": ["colours", "count"],
    "additionalProperties": False,
}
END_ID = TOKENIZER.convert_tokens_to_ids("<SPECIAL_12>")


@pytest.fixture(scope="module")
def model() -> TimeViper:
    return random_model(dtype=torch.float32)


@pytest.fixture
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER, {END_ID})


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "seed": 3}, {"temperature": 1.0, "top_p": 0.9}])
def test_an_answer_follows_its_schema(sampling: dict[str, Any], model: TimeViper) -> None:
    engine = engine_of(model)
    request_id = engine.submit(ask(json_schema=json.dumps(SCHEMA), max_new_tokens=100, **sampling))
    events = run(engine)[request_id]
    answer = json.loads(text_of(events))
    assert set(answer) == {"colours", "count"}
    assert 2 <= len(answer["colours"]) <= 4
    assert set(answer["colours"]) <= {"red", "green", "blue"}
    assert 3 <= answer["count"] <= 250
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert finished.reason == "stop"


def test_requests_without_a_schema_get_the_same_tokens_beside_one_with(model: TimeViper) -> None:
    questions = [("What?", {}), ("Why?", {"temperature": 1.0, "seed": 5, "num_logprobs": 3})]
    plain = [ask(text, max_new_tokens=24, **options) for text, options in questions]
    schema = ask("Which?", json_schema=json.dumps(SCHEMA), max_new_tokens=24)

    def tokens(requests: list[Any]) -> list[list[Token]]:
        engine = engine_of(model, num_slots=3)
        ids = [engine.submit(request) for request in requests]
        events = run(engine)
        return [[event for event in events[i] if isinstance(event, Token)] for i in ids]

    alone, together = tokens(plain), tokens([plain[0], schema, plain[1]])
    for expected, found in zip(alone, [together[0], together[2]], strict=True):
        assert [token.id for token in found] == [token.id for token in expected]
    assert ids_of(together[1]) == ids_of(tokens([schema])[0])


def test_log_probabilities_are_those_before_the_schema(model: TimeViper) -> None:
    engine = engine_of(model)
    request_id = engine.submit(ask(json_schema=json.dumps(SCHEMA), max_new_tokens=1, num_logprobs=2))
    plain_id = engine.submit(ask(max_new_tokens=1, num_logprobs=2))
    events = run(engine)
    first, plain = events[request_id][0], events[plain_id][0]
    assert isinstance(first, Token)
    assert isinstance(plain, Token)
    assert TOKENIZER.decode([first.id]) == "{"
    assert plain.id != first.id
    assert dict(first.top_logprobs) == pytest.approx(dict(plain.top_logprobs))
    assert first.logprob < plain.logprob


def test_an_object_of_any_kind_is_an_object(compiler: GrammarCompiler) -> None:
    matcher = compiler.matcher('{"type": "object"}')
    mask = allowed_tokens([matcher], 300)
    assert mask is not None
    assert TOKENIZER.decode(mask[0].nonzero().squeeze(1)) == "{"
    for token_id in TOKENIZER('{"a": 1}', add_special_tokens=False)["input_ids"]:
        assert not matcher.is_done
        matcher.accept(token_id)
    assert matcher.is_done


def test_ids_beyond_the_tokenizer_are_never_allowed(compiler: GrammarCompiler) -> None:
    mask = allowed_tokens([compiler.matcher('{"type": "string"}'), None], CONFIG_WITH_TRANSV.text.vocab_size)
    assert mask is not None
    assert mask.shape == (2, 300)
    assert not mask[0, len(TOKENIZER) :].any()
    assert mask[1].all()


def test_a_number_may_go_on_or_end(compiler: GrammarCompiler) -> None:
    matcher = compiler.matcher('{"type": "integer"}')
    matcher.accept(TOKENIZER.convert_tokens_to_ids("7"))
    mask = allowed_tokens([matcher], 300)
    assert mask is not None
    allowed = set(mask[0].nonzero().squeeze(1).tolist())
    assert allowed == {END_ID, *TOKENIZER.convert_tokens_to_ids(list("0123456789"))}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", "not valid"),
        ("[]", "a schema is an object"),
        ('{"type": "foo"}', "Invalid type: foo"),
        ('{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ('{"$ref": "https://example.com/schema.json"}', "retrieving it failed"),
        ('{"items":' * 5000 + "{}" + "}" * 5000, "not valid"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused(schema: str, message: str, model: TimeViper) -> None:
    engine = engine_of(model)
    with pytest.raises(ValueError, match=message):
        engine.submit(ask(json_schema=schema))
    assert not engine.has_work


def test_a_schema_too_complex_to_go_on_fails_alone(model: TimeViper, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(model)
    bad = engine.submit(ask(json_schema=json.dumps(SCHEMA)))
    good = engine.submit(ask(json_schema=json.dumps(SCHEMA), max_new_tokens=60))
    matcher = engine._requests[bad].matcher
    assert matcher is not None
    matcher._matcher.consume_token(TOKENIZER.convert_tokens_to_ids("x"))  # "{" is due
    events = run(engine)
    assert isinstance(events[bad][-1], Failed)
    assert "cannot be followed" in events[bad][-1].error
    assert json.loads(text_of(events[good]))["count"] >= 3


def test_decode_graphs_are_not_used_beside_a_schema(model: TimeViper, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = InferenceEngine(model, EngineConfig(), tokenizer=TOKENIZER, min_graph_steps=2, steps_before_graph=0)
    engine._graphs._is_on = True

    def no_graph(*args: Any, **options: Any) -> None:
        raise AssertionError("a graph chooses tokens without the schema")

    monkeypatch.setattr(graph_choice, "DecodeGraph", no_graph)
    request_id = engine.submit(ask(json_schema=json.dumps(SCHEMA), max_new_tokens=60))
    assert json.loads(text_of(run(engine)[request_id]))
