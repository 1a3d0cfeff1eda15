"""routes: every route over ASGI, answers whole and streamed."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
import tracemalloc
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import openai
import openai._base_client
import pytest

from reference.synthetic_gateway import MP4, Engine, Features, Server, check_error, events, video
from timeviper_platform.serving.gateway import answers
from timeviper_platform.serving.gateway.config import GatewayConfig
from timeviper_platform.serving.gateway.media import uploads
from timeviper_platform.serving.gateway.routes import create_app
from timeviper_platform.serving.messages import AnswerDelta, GenerateRequest, Refusal


def test_an_answer_has_text_reason_and_usage(server: Server) -> None:
    body = server.chat().json()
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "hello world", "refusal": None}
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["choices"][0]["logprobs"] is None
    assert body["usage"]["prompt_tokens_details"]["vision_tokens_after_transv"] == 2


def test_a_stream_has_an_opening_deltas_and_an_end(server: Server) -> None:
    response = server.chat(stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = events(response)
    assert done == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "hello world"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (usage["choices"], usage["usage"]["total_tokens"]) == ([], 12)
    assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1


def test_a_stream_without_options_has_no_usage(server: Server) -> None:
    assert not any("usage" in event for event in events(server.chat(stream=True))[:-1])


def test_several_answers_each_have_their_index(server: Server) -> None:
    assert [choice["index"] for choice in server.chat(n=3).json()["choices"]] == [0, 1, 2]
    streamed = events(server.chat(n=3, stream=True))[:-1]
    assert sum("role" in event["choices"][0]["delta"] for event in streamed) == 3


def test_log_probabilities_are_returned_on_request(server: Server) -> None:
    content = server.chat(logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert content == [{"token": "hello", "logprob": -0.1, "bytes": list(b"hello"), "top_logprobs": []}]


def test_bad_requests_are_4xx_in_openais_format(server: Server) -> None:
    post = server.http.post
    json_type = {"content-type": "application/json; charset=utf-8"}
    check_error(post("/v1/chat/completions", content=b"{", headers=json_type), 400, "invalid_json")
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):  # what any web page may send
        response = post("/v1/chat/completions", content=b"{}", headers={"content-type": kind})
        check_error(response, 415, "unsupported_media_type")
    check_error(server.chat(model="gpt-4"), 404, "model_not_found")
    check_error(server.chat(messages=[]), 400, "invalid_value")
    check_error(server.chat(video("feature://known") * 9), 400, "too_many_media")
    system = {"role": "system", "content": [{"type": "image_url", "image_url": "feature://known"}]}
    check_error(server.chat(messages=[system]), 400, "invalid_value")
    check_error(server.http.get("/v1/nothing"), 404, "unknown_url")
    check_error(server.http.get("/v1/chat/completions"), 405, "method_not_allowed")


@pytest.mark.parametrize("item", [b"1", b"{}", b"[]", b'"a"', b'{"a":1}'])
@pytest.mark.parametrize("field", [b"messages", b"stop", b"metadata"])
def test_a_large_body_of_wrong_items_is_neither_kept_nor_parsed(server: Server, field: bytes, item: bytes) -> None:
    """Before: 2 MiB of them held the event loop for 6 s and took 1.3 GB."""
    num_read, sent = 0, []

    async def receive() -> Any:
        nonlocal num_read
        block = (item + b",") * (2**16 // (len(item) + 1))
        start = b"" if num_read else b'{"model": "timeviper", "' + field + b'": ['
        num_read += len(block)
        return {"type": "http.request", "body": start + block, "more_body": num_read < 8 * 2**20}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers, "query_string": b"",
        "client": ("127.0.0.1", 1),
    }  # fmt: skip
    tracemalloc.start()
    try:
        asyncio.run(server.http.app(scope, receive, send))
        assert tracemalloc.get_traced_memory()[1] < 2 * 2**20
    finally:
        tracemalloc.stop()
    assert sent[0]["status"] == 400
    assert json.loads(sent[1]["body"])["error"]["code"] == "too_many_values"


def test_files_are_uploaded_listed_read_and_deleted(server: Server) -> None:
    created = server.upload().json()
    assert created["object"] == "file"
    assert (created["bytes"], created["filename"], created["purpose"]) == (len(MP4), "cat.mp4", "vision")
    assert server.http.get("/v1/files").json()["data"] == [created]
    assert server.http.get(f"/v1/files/{created['id']}").json() == created
    assert server.http.delete(f"/v1/files/{created['id']}").json()["deleted"] is True
    check_error(server.http.get(f"/v1/files/{created['id']}"), 404, "file_not_found")
    check_error(server.http.delete(f"/v1/files/{created['id']}"), 404, "file_not_found")


def test_uploads_without_media_or_form_are_refused(server: Server) -> None:
    check_error(server.upload(b"a text file called .mp4"), 415, "unsupported_media_type")
    check_error(server.upload(b""), 415, "unsupported_media_type")
    check_error(server.http.post("/v1/files", json={}), 415, "unsupported_media_type")
    check_error(server.http.post("/v1/files", files={"other": b"x"}), 400, "missing_required_parameter")
    check_error(
        server.http.post("/v1/files", data={"file": "text"}, files={"x": b"x"}), 400, "missing_required_parameter"
    )
    broken = server.http.post("/v1/files", content=b"x", headers={"content-type": "multipart/form-data"})
    check_error(broken, 400, "invalid_form")


def test_files_are_read_back_and_paged(server: Server) -> None:
    first = server.upload(MP4).json()
    content = server.http.get(f"/v1/files/{first['id']}/content")
    assert content.content == MP4
    assert content.headers["x-content-type-options"] == "nosniff"
    assert "attachment" in content.headers["content-disposition"]
    check_error(server.http.get(f"/v1/files/file-{'0' * 32}/content"), 404, "file_not_found")
    second = server.upload(MP4 + b"more").json()
    ids = {first["id"], second["id"]}
    page = server.http.get("/v1/files?limit=1").json()
    rest = server.http.get(f"/v1/files?limit=1&after={page['last_id']}").json()
    assert {page["data"][0]["id"], rest["data"][0]["id"]} == ids
    assert (page["has_more"], rest["has_more"]) == (True, False)
    assert server.http.get("/v1/files?purpose=batch").json()["data"] == []
    check_error(server.http.get("/v1/files?limit=0"), 400, "invalid_value")
    check_error(server.http.get("/v1/files?order=x"), 400, "invalid_value")


def test_a_file_may_expire(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def upload(**fields: str) -> Any:
        return server.http.post("/v1/files", files={"file": ("cat.mp4", MP4)}, data=fields)

    expiry = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    created = upload(purpose="vision", **expiry).json()
    assert created["expires_at"] == created["created_at"] + 3600
    for wrong in ({"expires_after[seconds]": "60"}, {"expires_after[seconds]": "x"}, {"expires_after[anchor]": "now"}):
        check_error(upload(**{**expiry, **wrong}), 400, "invalid_value")
    monkeypatch.setattr(uploads.time, "time", lambda: created["expires_at"] + 1)
    check_error(server.http.get(f"/v1/files/{created['id']}"), 404, "file_not_found")
    assert server.http.get("/v1/files").json()["data"] == []


def test_head_and_a_trailing_slash_are_answered(server: Server) -> None:
    for path in ("/v1/models", "/v1/files", "/health/live"):
        response = server.http.head(path)
        assert (response.status_code, response.content) == (200, b"")
        assert int(response.headers["content-length"]) > 0
        assert server.http.get(f"{path}/", follow_redirects=False).status_code == 200
    body = {"model": "timeviper", "messages": [{"role": "user", "content": "hi"}]}
    assert server.http.post("/v1/chat/completions/", json=body).status_code == 200


def test_head_of_a_content_reads_nothing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, the whole file was read for the length that a player asks first."""
    path = f"/v1/files/{server.upload().json()['id']}/content"
    monkeypatch.setattr(uploads, "read_chunks", lambda *_: pytest.fail("read"))
    whole, part = server.http.head(path), server.http.head(path, headers={"Range": "bytes=1-4"})
    assert (whole.status_code, whole.headers["content-length"], whole.content) == (200, str(len(MP4)), b"")
    assert (part.status_code, part.headers["content-range"]) == (206, f"bytes 1-4/{len(MP4)}")


def test_the_openapi_document_is_complete(server: Server) -> None:
    document = server.http.get("/openapi.json").json()
    chat = document["paths"]["/v1/chat/completions"]["post"]
    schema = chat["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    assert "messages" in document["components"]["schemas"][schema]["required"]
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert document["security"] == [{"key": []}]
    assert document["paths"]["/health/live"]["get"]["security"] == []
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert {"413", "429", "500", "503"} <= set(operation["responses"]), path
            assert all("content" in response for response in operation["responses"].values()), path
    text = json.dumps(document)
    names = set(re.findall(r"#/components/schemas/(\w+)", text))
    assert names <= set(document["components"]["schemas"])


ODD = ("x", "file-" + "0" * 32, "job-" + "0" * 32, "upload_" + "f" * 32, "é", "-1", "9" * 40, "\x00", " ")
JSON_TYPE, TEXT_TYPE = {"content-type": "application/json"}, {"content-type": "text/plain"}
BODIES: tuple[tuple[bytes, dict[str, str]], ...] = (
    (b"", JSON_TYPE),
    (b"[]", JSON_TYPE),
    (b"{}", JSON_TYPE),
    (b'{"model": "timeviper", "messages": 3, "input": {}, "video": 1, "part_ids": [2], "bytes": -1}', JSON_TYPE),
    (b"{}", TEXT_TYPE),
    (b"--x\r\n", {"content-type": "multipart/form-data; boundary=x"}),
)


def test_every_operation_answers_odd_requests_with_a_documented_status(server: Server) -> None:
    for path, methods in server.http.get("/openapi.json").json()["paths"].items():
        for method, operation in methods.items():
            documented = {int(status) for status in operation["responses"]}
            query = [entry["name"] for entry in operation.get("parameters", []) if entry["in"] == "query"]
            for value in ODD if "{" in path or query else ODD[:1]:
                url = re.sub(r"{\w+}", quote(value, safe=""), path)
                for content, headers in BODIES if method == "post" else ((None, {}),):
                    params = dict.fromkeys(query, value)
                    answer = server.http.request(method, url, content=content, headers=headers, params=params)
                    assert answer.status_code in documented, (method, url, content, answer.text)
                    if answer.status_code >= 400:
                        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_stored_videos_are_listed_in_pages_and_found_with_their_times(server: Server) -> None:
    """Before: 404, so that a client could not learn any feature:// id."""
    first = server.http.get("/v1/videos", params={"limit": 2}).json()
    assert [video["id"] for video in first["data"]] == ["films/a", "films/b"]
    assert (first["first_id"], first["last_id"], first["has_more"]) == ("films/a", "films/b", True)
    rest = server.http.get("/v1/videos", params={"after": first["last_id"]}).json()
    assert ([video["url"] for video in rest["data"]], rest["has_more"]) == (["feature://known"], False)
    assert server.chat(video(rest["data"][0]["url"])).status_code == 200
    assert server.http.get("/v1/videos", params={"prefix": "k"}).json()["data"] == rest["data"]
    found = server.http.get("/v1/videos/films/a").json()
    assert (found["num_frames"], found["frame_seconds"], found["selected_frames"]) == (2, [0.0, 1.5], [0])
    check_error(server.http.get("/v1/videos/films/c"), 404, "media_not_found")
    for limit in ("0", "1001", "x"):
        check_error(server.http.get("/v1/videos", params={"limit": limit}), 400, "invalid_value")


def test_models_are_listed_and_found_by_name(server: Server) -> None:
    assert [model["id"] for model in server.http.get("/v1/models").json()["data"]] == ["timeviper"]
    assert server.http.get("/v1/models/timeviper").json()["object"] == "model"
    check_error(server.http.get("/v1/models/other"), 404, "model_not_found")


def test_health_distinguishes_live_and_ready(server: Server) -> None:
    assert server.http.get("/health/live").status_code == 200
    assert server.http.get("/health/ready").status_code == 200
    assert not server.features.deep
    server.features.ready = False
    response = server.http.get("/health/ready?deep=1")
    assert server.features.deep
    assert (response.status_code, response.json()["features"]) == (503, False)


def test_a_refusal_becomes_its_status_before_a_stream_and_an_event_within_one(server: Server) -> None:
    server.engine.refusal = Refusal(status=429, message="full", code="busy", retry_after_s=2.0)
    for stream in (False, True):
        response = server.chat(stream=stream)
        check_error(response, 429, "busy")
        assert response.headers["retry-after"] == "2"
    server.engine.refuse_at = 1
    assert events(server.chat(stream=True))[-1]["error"]["code"] == "busy"
    check_error(server.chat(), 429, "busy")


def test_the_openai_package_repeats_only_what_may_succeed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, a video that takes too long to decode was decoded three times."""
    monkeypatch.setattr(openai._base_client.time, "sleep", lambda _: None)
    client = server.openai().with_options(max_retries=2)
    for code, status, num_tries in (("decode_timeout", 408, 1), ("busy", 429, 3), ("unavailable", 503, 3)):
        server.engine.requests.clear()
        server.engine.refusal = Refusal(status=status, message="no", code=code, retry_after_s=1.0)
        with pytest.raises(openai.APIStatusError):
            client.chat.completions.create(model="timeviper", messages=[{"role": "user", "content": "hi"}])
        assert len(server.engine.requests) == num_tries


def test_lost_features_are_computed_once_more_before_a_client_sees_it(server: Server) -> None:
    """Before, the death of a feature replica was a 503."""
    server.engine.refusal = lost = Refusal(status=503, message="lost", code="features_lost")
    check_error(server.chat(video("feature://known")), 503, "features_lost")
    assert server.features.whole == [False, True]
    server.features.whole.clear()

    def found() -> None:
        server.engine.refusal = None if len(server.features.whole) == 2 else lost

    server.engine.during = found
    assert server.chat(video("feature://known")).status_code == 200
    assert server.features.whole == [False, True]


def test_a_slow_request_is_a_408_and_frees_its_slot(tmp_path: Path) -> None:
    server = Server(tmp_path, request_timeout_s=0.2)
    server.engine.delay_s = 5.0
    refused = server.chat()
    check_error(refused, 408, "timeout")
    assert refused.headers["x-should-retry"] == "false"
    assert events(server.chat(stream=True))[-1]["error"]["code"] == "timeout"
    assert server.engine.closed == 2


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_a_stream_whose_first_text_takes_long_is_kept_alive_by_comments(
    server: Server, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, nothing was sent meanwhile, and load balancers cut the connection after a minute."""
    monkeypatch.setattr(answers, "KEEP_ALIVE_S", 0.05)
    body: dict[str, Any] = {"model": "timeviper", "stream": True}
    body |= {"input": "hi"} if path == "/v1/responses" else {"messages": [{"role": "user", "content": "hi"}]}
    server.engine.during = lambda: time.sleep(0.2)
    response = server.http.post(path, json=body)
    assert response.headers["x-accel-buffering"] == "no"
    comments = [event for event in response.text.split("\n\n") if event.startswith(":")]
    assert 2 <= len(comments) <= 4
    assert response.text.startswith(":")
    client = server.openai()  # which leaves comments out
    if path == "/v1/responses":
        with client.responses.stream(model="timeviper", input="hi") as stream:
            assert stream.get_final_response().output_text == "hello world"
    else:
        assert events(server.chat(stream=True, n=2))[-1] == "[DONE]"
        chunks = client.chat.completions.create(model="timeviper", messages=body["messages"], stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "hello world"
    server.engine.refusal = Refusal(status=429, message="full", code="busy", retry_after_s=2.0)
    late = server.http.post(path, json=body)
    assert (late.status_code, '"code":"busy"' in late.text) == (200, True)
    server.engine.during = None
    check_error(server.http.post(path, json=body), 429, "busy")


@pytest.mark.parametrize("after_s", [0.02, 0.3])
def test_a_client_that_leaves_before_the_first_text_ends_its_answer(
    tmp_path: Path, after_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "KEEP_ALIVE_S", 0.1)

    async def scenario() -> tuple[int, int]:
        engine = SlowToBegin()
        app = create_app(GatewayConfig(media_root=str(tmp_path)), Features(), engine)
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        task = asyncio.create_task(app(streaming_scope(), streaming_body(), send))
        await asyncio.sleep(after_s)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return engine.closed, len(sent)

    closed, num_sent = asyncio.run(scenario())
    assert closed == 1
    assert (num_sent > 1) == (after_s > 0.1)


class SlowToBegin(Engine):
    async def generate(self, request: GenerateRequest) -> AsyncGenerator[AnswerDelta | Refusal]:
        try:
            await asyncio.sleep(60)
            yield AnswerDelta(index=0, text="late")
        finally:
            self.closed += 1


def streaming_scope() -> Any:
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "query_string": b"",
        "path": "/v1/chat/completions", "raw_path": b"", "root_path": "", "scheme": "http",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip


def streaming_body() -> Callable[[], Awaitable[Any]]:
    """A receive function with the body of a streamed question, and no disconnect."""
    body = json.dumps({"model": "timeviper", "messages": [{"role": "user", "content": "x"}], "stream": True})
    messages = iter([{"type": "http.request", "body": body.encode(), "more_body": False}])

    async def receive() -> Any:
        message = next(messages, None)
        if message is None:
            await asyncio.Event().wait()
        return message

    return receive


def test_a_client_that_disconnects_closes_the_answer(tmp_path: Path) -> None:
    """Cancels the request's task during a stream, as Ray Serve does."""

    async def scenario() -> int:
        features, engine = Features(), Engine()
        engine.delay_s = 60.0
        app = create_app(GatewayConfig(media_root=str(tmp_path)), features, engine)
        first_chunk = asyncio.Event()

        async def send(message: Any) -> None:
            if message.get("body"):
                first_chunk.set()

        task = asyncio.create_task(app(streaming_scope(), streaming_body(), send))
        await asyncio.wait_for(first_chunk.wait(), 5)
        assert engine.closed == 0
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return engine.closed

    assert asyncio.run(scenario()) == 1


def test_the_gateway_imports_no_torch_and_no_decoder() -> None:
    code = (
        "import sys, timeviper_platform.serving.gateway.routes;"
        "print([name for name in ('torch', 'av', 'ray', 'transformers', 'pyarrow') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_an_answer_that_has_ended_is_closed_by_done_whatever_the_service_does_then(tmp_path: Path) -> None:
    """A service that hangs after the last delta made a finished answer end in a timeout."""
    server = Server(tmp_path, request_timeout_s=3.0)
    server.engine.delay_after_s = 30.0
    assert events(server.chat(stream=True))[-1] == "[DONE]"
    assert server.chat().json()["choices"][0]["finish_reason"] == "stop"


def test_an_answer_that_ends_early_is_an_error(server: Server) -> None:
    server.engine.texts = ("hello",)
    assert events(server.chat(stream=True))[-1]["error"]["code"] == "unavailable"
    check_error(server.chat(), 503, "unavailable")
