"""openai_protocol: valid and invalid requests, and the format of responses."""

from __future__ import annotations

import json
from typing import Any

import pytest

from timeviper_model.inference.answer import Usage
from timeviper_platform.serving.gateway.openai_protocol import ApiError, Completion, parse_chat_request, sse
from timeviper_platform.serving.messages import AnswerDelta, TokenLogprob

USER = {"role": "user", "content": "hello"}
USAGE = Usage(prompt_tokens=10, completion_tokens=2, vision_tokens=8, vision_tokens_kept=2, cached_tokens=0)


def parse(**values: Any) -> Any:
    return parse_chat_request(json.dumps({"model": "m", "messages": [USER], **values}).encode())


def error_of(body: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_chat_request(body)
    return caught.value


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"model": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}',
    ],
)
def test_invalid_json_is_a_400(body: bytes) -> None:
    error = error_of(body)
    assert (error.status, error.code) == (400, "invalid_json")


@pytest.mark.parametrize(
    ("values", "param", "code"),
    [
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "invalid_value"),
        ({"tools": []}, "tools", "unknown_parameter"),
        ({"n": 5}, "n", "invalid_value"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"mm_processor_kwargs": {"fps": -1}}, "mm_processor_kwargs.fps", "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format.type", "invalid_value"),
    ],
)
def test_an_invalid_field_is_a_400_with_its_name(values: dict[str, Any], param: str, code: str) -> None:
    error = error_of(json.dumps({"model": "m", "messages": [USER], **values}).encode())
    assert (error.status, error.param, error.code) == (400, param, code)


def test_a_missing_field_is_named() -> None:
    error = error_of(b'{"messages": [{"role": "user", "content": "x"}]}')
    assert (error.param, error.code) == ("model", "missing_required_parameter")


def test_an_invalid_content_part_is_reported_by_its_own_path() -> None:
    part = {"type": "video_url", "video_url": {"uri": "file-1"}}
    error = error_of(json.dumps({"model": "m", "messages": [{"role": "user", "content": [part]}]}).encode())
    assert error.param is not None
    assert error.param.startswith("messages.0.content")
    assert "video_url" in error.param


def test_stop_is_one_string_or_up_to_four() -> None:
    assert parse(stop="a").stop_texts() == ("a",)
    assert parse(stop=["a", "b"]).stop_texts() == ("a", "b")
    for stop in (["a"] * 5, "", ["a", ""]):
        with pytest.raises(ApiError):
            parse(stop=stop).stop_texts()


def test_an_error_has_openais_format_and_retry_after() -> None:
    error = ApiError(429, "full", code="busy", retry_after_s=0.2)
    expected = {"error": {"message": "full", "type": "rate_limit_error", "param": None, "code": "busy"}}
    assert error.body() == expected
    assert error.headers() == {"Retry-After": "1"}


def test_a_response_joins_deltas_and_counts_the_prompt_once() -> None:
    completion = Completion("m", num_choices=2, with_logprobs=True)
    logprob = TokenLogprob(token="é", logprob=-0.5, top=(("é", -0.5), ("e", -1.0)))
    completion.add(AnswerDelta(index=1, text="b", finish_reason="length", usage=USAGE))
    completion.add(AnswerDelta(index=0, text="a", logprobs=(logprob,)))
    completion.add(AnswerDelta(index=0, text="c", finish_reason="stop", usage=USAGE))
    response = completion.response()
    assert [choice["message"]["content"] for choice in response["choices"]] == ["ac", "b"]
    assert [choice["finish_reason"] for choice in response["choices"]] == ["stop", "length"]
    entry = response["choices"][0]["logprobs"]["content"][0]
    assert entry["bytes"] == [195, 169]
    assert [top["token"] for top in entry["top_logprobs"]] == ["é", "e"]
    assert response["usage"]["prompt_tokens"] == 10
    assert response["usage"]["completion_tokens"] == 4
    assert response["usage"]["total_tokens"] == 14
    details = response["usage"]["prompt_tokens_details"]
    assert details == {"cached_tokens": 0, "vision_tokens": 8, "vision_tokens_after_transv": 2}


def test_an_event_is_one_line_whatever_the_text() -> None:
    event = sse({"text": "a\nb\r\u2028"})
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    assert event.count(b"\n") == 2
    assert b"\r" not in event
