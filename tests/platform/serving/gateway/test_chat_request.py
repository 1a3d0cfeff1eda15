"""chat_request: what clients send, what is ignored, and what is refused by name, within bounds."""

from __future__ import annotations

import json
from typing import Any

import pytest

from timeviper_platform.serving.gateway.chat_request import MediaLimits, TextPart, count_values, parse_chat_request
from timeviper_platform.serving.gateway.openai_protocol import ApiError

USER = {"role": "user", "content": "hello"}


def body_of(**values: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [USER], **values}).encode()


def parse(**values: Any) -> Any:
    return parse_chat_request(body_of(**values))


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
        ({"messages": [3]}, "messages.0", "invalid_value"),
        ({"messages": [USER] * 257}, "messages", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "unsupported_parameter"),
        ({"messages": [{**USER, "tool_calls": [{}]}]}, "messages.0.tool_calls", "unsupported_parameter"),
        ({"messages": [{**USER, "contents": "x"}]}, "messages.0.contents", "unknown_parameter"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"tool_choice": "required"}, "tool_choice", "unsupported_parameter"),
        ({"logit_bias": {"3": 5}}, "logit_bias", "unsupported_parameter"),
        ({"presence_penalty": 0.5}, "presence_penalty", "unsupported_parameter"),
        ({"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs", "unsupported_parameter"),
        ({"max_token": 3}, "max_token", "unknown_parameter"),
        ({"n": 5}, "n", "invalid_value"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"top_p": -1}, "top_p", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"mm_processor_kwargs": {"fps": -2}}, "mm_processor_kwargs.fps", "invalid_value"),
        ({"mm_processor_kwargs": {"max_frame": 2}}, "mm_processor_kwargs.max_frame", "unknown_parameter"),
        ({"stop": ["a"] * 5}, "stop", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"stop": ["a", ""]}, "stop", "invalid_value"),
    ],
)
def test_what_would_change_the_answer_is_a_400_by_name(values: dict[str, Any], param: str, code: str) -> None:
    error = error_of(body_of(**values))
    assert error.param is not None
    assert (error.status, error.param[: len(param)], error.code) == (400, param, code)


@pytest.mark.parametrize(
    "values",
    [
        {"tools": None, "tool_choice": None, "stream": None, "stop": None, "n": None, "response_format": None},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "functions": []},
        {"logit_bias": {}, "presence_penalty": 0.0, "frequency_penalty": 0, "repetition_penalty": 1.0, "min_p": 0},
        {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "prompt_cache_key": "k"},
        {"reasoning_effort": "low", "verbosity": "low", "safety_identifier": "x", "modalities": ["text"]},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"response_format": {"type": "text"}, "stream_options": {"include_usage": True}},
        {"skip_special_tokens": True, "add_generation_prompt": True, "ignore_eos": False, "top_k": -1},
    ],
)
def test_nulls_and_fields_without_effect_are_ignored(values: dict[str, Any]) -> None:
    assert parse(**values).messages[0].content == "hello"


def test_the_servers_own_message_is_accepted_back() -> None:
    """As `message.model_dump()` of the openai package, and LiteLLM's, give it."""
    own = {
        "role": "assistant", "content": "Yes.", "refusal": None, "annotations": None, "audio": None,
        "function_call": None, "tool_calls": None, "provider_specific_fields": {"refusal": None},
        "reasoning_content": None,
    }  # fmt: skip
    parsed = parse(messages=[USER, own, USER])
    assert [message.content for message in parsed.messages] == ["hello", "Yes.", "hello"]


def test_contents_may_be_null_or_parts_of_any_api() -> None:
    parts = [
        {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
        {"type": "output_text", "text": "b", "annotations": [], "logprobs": None},
        {"type": "refusal", "refusal": "c"},
    ]
    null, whole = parse(messages=[{"role": "assistant", "content": None}, {"role": "user", "content": parts}]).messages
    assert null.content == ""
    assert [part.text for part in whole.content] == ["a", "b", "c"]
    assert isinstance(whole.content[0], TextPart)


def test_an_invalid_content_part_is_reported_by_its_own_path() -> None:
    part = {"type": "video_url", "video_url": {"uri": "file-1"}}
    error = error_of(body_of(messages=[{"role": "user", "content": [part]}]))
    assert error.param is not None
    assert error.param.startswith("messages.0.content")
    assert "video_url" in error.param


def test_an_error_repeats_no_long_text() -> None:
    """Before, an unknown type of a megabyte came back in the message."""
    error = error_of(body_of(messages=[{"role": "user", "content": [{"type": "x" * 100_000}]}]))
    assert (error.status, len(error.message) <= 500) == (400, True)
    assert error.message.startswith("messages.0.content")


def test_limits_have_several_names_and_the_lowest_counts() -> None:
    assert parse(nframes=8, media_io_kwargs={"video": {"num_frames": 4, "fps": 2}}).media_limits() == MediaLimits(
        max_frames=4, fps=2
    )
    both = parse(mm_processor_kwargs={"fps": 0.5, "num_frames": 9, "max_pixels": 4}, fps=1, max_frames=12)
    assert both.media_limits() == MediaLimits(max_frames=9, fps=0.5)
    assert parse(media_io_kwargs={"video": {"num_frames": -1, "fps": -1}}).media_limits() == MediaLimits()
    url = {"url": "file-1", "detail": "ultra", "fps": 0.5, "nframes": 3, "total_pixels": 7}
    (message,) = parse(messages=[{"role": "user", "content": [{"type": "video_url", "video_url": url}]}]).messages
    value = message.content[0].value
    assert (value.fps, value.max_frames) == (0.5, 3)


def test_stop_is_one_string_or_up_to_four() -> None:
    assert parse(stop="a").stop_texts() == ("a",)
    assert parse(stop=["a", "b"]).stop_texts() == ("a", "b")


def test_as_many_wrong_items_as_pass_are_one_error_at_once() -> None:
    for items in ([1] * 2000, [{}] * 2000, [{"type": "text"}] * 2000):
        error = error_of(body_of(messages=[{"role": "user", "content": items}]))
        assert (error.status, len(error.message) < 200) == (400, True)
    error = error_of(body_of(messages=[{"role": "user", "content": [{"type": "text", "text": ""}] * 2049}]))
    assert error.code == "too_many_parts"


def test_values_are_counted_without_parsing() -> None:
    for body in (b"[1,2,3]", b'{"a":[],"b":{}}', b"[" * 9, b'"a, b, [c"'):
        assert count_values(body) >= 3
    assert count_values(b'{"url": "data:video/mp4;base64,AAAA"}') == 2


def test_a_text_may_be_all_commas() -> None:
    assert parse(messages=[{"role": "user", "content": "," * 100_000}]).messages[0].content.count(",") == 100_000


def schema_format(**values: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", **values}}


def test_response_formats_become_schemas() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    texts = [
        parse(response_format=given).response_format.schema_text()
        for given in ({"type": "text"}, {"type": "json_object"}, schema_format(schema=schema, strict=True))
    ]
    assert texts[0] is None
    assert [json.loads(text) for text in texts[1:]] == [{"type": "object"}, schema]
    built_in = parse(response_format=schema_format(name="segments")).response_format
    assert (built_in.is_segments, built_in.schema_text()) == (True, None)
    assert not parse(response_format=schema_format(name="segments", schema=schema)).response_format.is_segments


@pytest.mark.parametrize(
    "given",
    [
        {"type": "json_schema"},
        schema_format(),
        schema_format(schema="text"),
        schema_format(schema={"enum": ["x" * 70_000]}),
        {"type": "grammar"},
    ],
)
def test_a_response_format_without_a_usable_schema_is_named(given: dict[str, Any]) -> None:
    error = error_of(body_of(response_format=given))
    assert error.status == 400
    assert str(error.param).startswith("response_format")
