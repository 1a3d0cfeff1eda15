"""openai_protocol: the format of responses and errors."""

from __future__ import annotations

from timeviper_model.inference.answer import Usage
from timeviper_platform.serving.gateway.openai_protocol import ApiError, Completion, sse
from timeviper_platform.serving.messages import AnswerDelta, TokenLogprob

USAGE = Usage(prompt_tokens=10, completion_tokens=2, vision_tokens=8, vision_tokens_kept=2, cached_tokens=0)


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
