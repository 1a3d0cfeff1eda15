"""What real clients send: the openai package itself, recorded requests of others, and any JSON at all."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from reference.synthetic_gateway import MP4, PNG, Server, video
from timeviper_platform.serving.messages import MediaAddress, MediaBytes, MediaFrames

VIDEO = "data:video/mp4;base64," + base64.b64encode(MP4).decode()
PICTURE = "data:image/png;base64," + base64.b64encode(PNG).decode()
JPEG = "data:image/jpeg;base64," + base64.b64encode(b"\xff\xd8\xff\xe0" + bytes(20)).decode()


def test_the_openai_package_chats_over_several_turns_and_streams(server: Server) -> None:
    client = server.openai()
    question: Any = [{"role": "user", "content": "hi"}]
    first = client.chat.completions.create(model="timeviper", messages=question)
    history = [*question, first.choices[0].message, *question]
    assert client.chat.completions.create(model="timeviper", messages=history).choices[0].message.content
    dumped = [*question, first.choices[0].message.model_dump(), *question]
    with client.chat.completions.stream(model="timeviper", messages=dumped) as stream:
        kinds = {event.type for event in stream}
        assert stream.get_final_completion().choices[0].message.content == "hello world"
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert [turn.text for turn in server.engine.requests[-1].turns] == ["hi", "hello world", "hi"]


def test_the_openai_package_stores_files_and_uploads(server: Server) -> None:
    client = server.openai()
    created = client.files.create(file=("cat.mp4", MP4), purpose="vision")
    assert client.files.content(created.id).read() == MP4
    assert [file.id for file in client.files.list(purpose="vision")] == [created.id]
    assert client.files.delete(created.id).deleted
    upload = client.uploads.upload_file_chunked(
        file=MP4, filename="b.mp4", bytes=len(MP4), mime_type="video/mp4", purpose="vision", part_size=50
    )
    assert upload.file is not None
    assert (upload.status, client.files.retrieve(upload.file.id).filename) == ("completed", "b.mp4")
    assert [model.id for model in client.models.list()] == ["timeviper"]


def test_the_openai_package_parses_answers_by_schema_and_reads_time_spans(server: Server) -> None:
    class Answer(BaseModel):
        count: int

    client = server.openai()
    server.engine.texts = '{"count"', ": 3}"
    messages: Any = [{"role": "user", "content": "How many?"}]
    parsed = client.chat.completions.parse(model="timeviper", messages=messages, response_format=Answer)
    assert parsed.choices[0].message.parsed == Answer(count=3)
    assert client.responses.parse(model="timeviper", input="How many?", text_format=Answer).output_parsed == Answer(
        count=3
    )
    schemas = [json.loads(request.sampling.json_schema or "") for request in server.engine.requests]
    assert [schema["properties"]["count"]["type"] for schema in schemas] == ["integer", "integer"]

    segments: Any = {"type": "json_schema", "json_schema": {"name": "segments"}}
    messages = [{"role": "user", "content": video("feature://known")}]
    spans = client.chat.completions.create(model="timeviper", messages=messages, response_format=segments)
    assert spans.to_dict()["media"] == [{"duration_seconds": 2.0, "frame_times_seconds": [0.0, 1.04]}]
    asked = server.engine.requests[-1]
    limits = json.loads(asked.sampling.json_schema or "")["properties"]["segments"]["items"]["properties"][
        "end_seconds"
    ]
    assert (asked.is_temporal, limits["minimum"], limits["maximum"]) == (True, 0, 2.0)
    chunks = list(
        client.chat.completions.create(model="timeviper", messages=messages, response_format=segments, stream=True)
    )
    assert ["media" in chunk.to_dict() for chunk in chunks] == [True] + [False] * (len(chunks) - 1)


RECORDED = {
    "litellm 1, second turn": {
        "messages": [
            {"role": "user", "content": "hi"},
            {"content": "ok", "role": "assistant"},
            {"role": "user", "content": "more"},
        ],
        "max_tokens": 5,
        "stream": True,
    },
    "langchain-openai 1": {
        "stream": False,
        "messages": [
            {"content": "s", "role": "system"},
            {"content": "hi", "role": "user"},
            {"content": "ok", "role": "assistant"},
            {"content": "again", "role": "user"},
        ],
        "max_completion_tokens": 5,
    },
    "llm, attachment in a conversation": {
        "stream": True,
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "ok"},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "again"},
                    {"type": "image_url", "image_url": {"url": PICTURE}},
                ],
            },
        ],
        "max_tokens": 5,
        "stream_options": {"include_usage": True},
    },
}
"""Bodies that these clients sent, with other media."""


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_requests_are_answered(server: Server, name: str) -> None:
    response = server.http.post("/v1/chat/completions", json={"model": "timeviper", **RECORDED[name]})
    assert response.status_code == 200, response.text
    assert "hello" in response.text


_ASK = {"type": "text", "text": "Which?\nA. red\nB. blue\nAnswer with the option's letter."}
_FRAMES = [{"type": "image_url", "image_url": {"url": PICTURE}} for _ in range(64)]
_LOW = [{"type": "image_url", "image_url": {"url": JPEG, "detail": "low"}} for _ in range(64)]
_STORED = "file:///films/a.mp4"

HARNESSES: dict[str, tuple[dict[str, Any], type, tuple[float | None, int | None]]] = {
    "lmms-eval 0.7.3, openai with pass_video_url": (
        {
            "messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": _STORED}}, _ASK]}],
            "max_tokens": 32,
            "temperature": 0,
            "media_io_kwargs": {"video": {"num_frames": 32}},
            "chat_template_kwargs": {"enable_thinking": False},
        },
        MediaAddress,
        (None, 32),
    ),
    "lmms-eval 0.7.3, async_openai": (
        {
            "messages": [{"role": "user", "content": [*_FRAMES, _ASK]}],
            "max_tokens": 32,
            "temperature": 0,
        },
        MediaFrames,
        (None, None),
    ),
    "lmms-eval 0.7.3, openai with --force_simple": (
        {
            "messages": [{"role": "user", "content": [_ASK, *_FRAMES]}],
            "max_tokens": 1024,
            "temperature": 0,
        },
        MediaFrames,
        (None, None),
    ),
    "VLMEvalKit, frames": (
        {
            "messages": [{"role": "user", "content": [*_LOW, _ASK]}],
            "max_tokens": 16,
            "temperature": 0,
            "n": 1,
            "stop": None,
        },
        MediaFrames,
        (None, None),
    ),
    "VLMEvalKit, video": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "video_url",
                            "video_url": {"url": VIDEO, "fps": 1, "max_pixels": 151200, "min_pixels": 4, "nframes": 8},
                        },
                        _ASK,
                    ],
                }
            ],
            "max_tokens": 16,
            "temperature": 0,
            "n": 1,
        },
        MediaBytes,
        (1.0, 8),
    ),
    "sgl-eval": (
        {
            "messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": VIDEO}}, _ASK]}],
            "max_tokens": 16,
            "temperature": 0,
            "top_p": None,
        },
        MediaBytes,
        (None, None),
    ),
}
"""Bodies of evaluation harnesses, with the source and the limits (fps, frames) that they ask for."""


@pytest.mark.parametrize("name", HARNESSES)
def test_requests_of_evaluation_harnesses_are_answered(tmp_path: Path, name: str) -> None:
    body, kind, limits = HARNESSES[name]
    film = tmp_path / "a.mp4"
    film.write_bytes(MP4)
    server = Server(tmp_path, allowed_local_media=(str(tmp_path),))
    server.features.known_addresses = {str(film)}
    text = json.dumps({"model": "timeviper", **body}).replace(_STORED, film.as_uri())
    headers = {"content-type": "application/json"}
    response = server.http.post("/v1/chat/completions", content=text.encode(), headers=headers)
    assert response.status_code == 200, response.text
    assert [type(source) for source in server.features.sources] == [kind]
    assert server.features.limits == [limits]


_NAMES = [
    "model",
    "messages",
    "role",
    "content",
    "type",
    "text",
    "image_url",
    "video_url",
    "url",
    "stream",
    "stop",
    "n",
    "temperature",
    "max_tokens",
    "tools",
    "seed",
    "fps",
    "response_format",
    "json_schema",
    "schema",
    "stream_options",
    "mm_processor_kwargs",
    "media_io_kwargs",
    "video",
    "top_logprobs",
    "logprobs",
    "file",
    "file_id",
    "user",
]
_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(["timeviper", "user", "system", "text", "image_url", "video_url", VIDEO, "file-1", ""])
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(_NAMES), inner, max_size=4),
    max_leaves=12,
)


@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(body=st.dictionaries(st.sampled_from(_NAMES), _VALUES, max_size=6))
def test_any_json_is_answered_with_a_documented_status(server: Server, body: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": body.get("content", "hi")}]
    for values in (body, {"messages": messages, **body, "model": "timeviper"}):
        text = json.dumps(values).encode()
        headers = {"content-type": "application/json"}
        for path in ("/v1/chat/completions", "/v1/responses"):
            status = server.http.post(path, content=text, headers=headers).status_code
            assert status in (200, 400, 404, 413, 415), values  # of those in the OpenAPI document
