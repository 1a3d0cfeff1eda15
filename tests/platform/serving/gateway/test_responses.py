"""responses: OpenAI's Responses API over ASGI, as its own package sends and reads it."""

from __future__ import annotations

from typing import Any

import pytest

from reference.synthetic_gateway import MP4, Server, check_error
from timeviper_platform.serving.messages import MediaFile, Refusal, StoredFeatures


def test_a_response_is_whole_or_streamed(server: Server) -> None:
    client = server.openai()
    whole = client.responses.create(model="timeviper", input="hi", instructions="Be brief.", store=True)
    assert (whole.output_text, whole.status) == ("hello world", "completed")
    assert whole.usage is not None
    assert (whole.usage.input_tokens, whole.usage.output_tokens, whole.usage.total_tokens) == (9, 3, 12)
    with client.responses.stream(model="timeviper", input="hi", max_output_tokens=7) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == "hello world"
    assert [event.sequence_number for event in events if hasattr(event, "sequence_number")][:4] == [0, 1, 2, 3]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "hello world"
    system, user = server.engine.requests[0].turns
    assert (system.role, system.text, user.text) == ("system", "Be brief.", "hi")
    assert server.engine.requests[1].sampling.max_new_tokens == 7


def test_items_parts_and_the_last_answer_are_inputs(server: Server) -> None:
    client = server.openai()
    file_id = server.upload(MP4).json()["id"]
    first = client.responses.create(model="timeviper", input="hi")
    parts: Any = [{"type": "input_file", "file_id": file_id}, {"type": "input_text", "text": "What?"}]
    history: Any = [{"role": "user", "content": "hi"}, *first.output, {"role": "user", "content": parts}]
    assert client.responses.create(model="timeviper", input=history).output_text == "hello world"
    turns = server.engine.requests[1].turns
    assert [(turn.role, turn.marked_text("*")) for turn in turns] == [
        ("user", "hi"),
        ("assistant", "hello world"),
        ("user", "*What?"),
    ]
    assert isinstance(server.features.sources[0], MediaFile)
    at_address: Any = [{"type": "input_file", "file_url": "feature://known"}]
    again = client.responses.create(model="timeviper", input=[{"role": "user", "content": at_address}])
    assert again.output_text == "hello world"
    assert server.features.sources[1] == StoredFeatures(media_id="known")


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"background": True}, "background"),
        ({"input": 3}, "input"),
        ({"input": [{"type": "function_call_output"}]}, "input.0"),
    ],
)
def test_what_is_not_supported_is_a_400_by_name(server: Server, values: dict[str, Any], param: str) -> None:
    body = {"model": "timeviper", "input": "hi", **values}
    response = server.http.post("/v1/responses", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_refusals_have_their_status_before_a_stream_and_an_event_within_one(server: Server) -> None:
    body = {"model": "timeviper", "input": "hi", "stream": True}
    server.engine.refusal = Refusal(status=429, message="full", code="busy", retry_after_s=2.0)
    check_error(server.http.post("/v1/responses", json=body), 429, "busy")
    server.engine.refuse_at = 1
    text = server.http.post("/v1/responses", json=body).text
    assert text.split("\n\n")[-2].startswith("event: error\ndata: ")
    assert '"code":"busy"' in text
