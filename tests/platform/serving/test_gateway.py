"""gateway: every route over real ASGI with services that are small but keep their contract."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import subprocess
import sys
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from timeviper_platform.serving.contract import (
    AnswerPart,
    AnswerUsage,
    FeatureReference,
    FeatureRequest,
    GenerateRequest,
    MediaBytes,
    MediaFile,
    Refusal,
    StoredFeatures,
    TokenLogprob,
)
from timeviper_platform.serving.gateway import ApiKey, GatewayConfig, create_app

MP4 = b"\x00\x00\x00\x20ftypisom" + bytes(100)
PNG = b"\x89PNG\r\n\x1a\n" + bytes(50)
USAGE = AnswerUsage(prompt_tokens=9, completion_tokens=3, vision_tokens=8, vision_tokens_kept=2, cached_tokens=0)


class Features:
    """Knows one stored medium and takes any upload."""

    def __init__(self) -> None:
        self.requests: list[FeatureRequest] = []
        self.ready = True

    async def features(self, request: FeatureRequest) -> FeatureReference | Refusal:
        self.requests.append(request)
        if isinstance(request.source, StoredFeatures) and request.source.media_id != "known":
            return Refusal(status=404, message="no such medium", code="media_not_found")
        return FeatureReference(
            key="k", ref=None, num_frames=2, num_tokens_per_frame=4, modality="video", duration_seconds=2.0
        )

    async def is_ready(self) -> bool:
        return self.ready


class Engine:
    """Answers 'hello world' in two parts; `refusal` comes instead of part number `refuse_at`."""

    def __init__(self) -> None:
        self.requests: list[GenerateRequest] = []
        self.closed = 0
        self.delay_s = 0.0
        self.refusal: Refusal | None = None
        self.refuse_at = 0
        self.bug = False
        self.usage = USAGE

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[AnswerPart | Refusal]:
        self.requests.append(request)
        try:
            if self.bug:
                raise KeyError(request.turns[0].text)
            logprobs = (TokenLogprob(token="hello", logprob=-0.1),) if request.num_logprobs is not None else ()
            for number, text in enumerate(("hello", " world")):
                for index in range(request.n):
                    if self.refusal is not None and number == self.refuse_at:
                        yield self.refusal
                        return
                    last = number == 1
                    yield AnswerPart(
                        index=index,
                        text=text,
                        logprobs=() if last else logprobs,
                        finish_reason="stop" if last else None,
                        usage=self.usage if last else None,
                    )
                await asyncio.sleep(self.delay_s)
        finally:
            self.closed += 1

    async def is_ready(self) -> bool:
        return True


class Server:
    """The gateway with its fake services and a client."""

    def __init__(self, folder: Path, **config: Any) -> None:
        self.features = Features()
        self.engine = Engine()
        app = create_app(GatewayConfig(media_root=str(folder / "media"), **config), self.features, self.engine)
        self.http = TestClient(app, raise_server_exceptions=True)

    def chat(self, content: Any = "hi", *, key: str | None = None, **values: Any) -> Any:
        body = {"model": "timeviper", "messages": [{"role": "user", "content": content}], **values}
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return self.http.post("/v1/chat/completions", json=body, headers=headers)

    def upload(self, data: bytes = MP4, *, key: str | None = None) -> Any:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        files = {"file": ("cat.mp4", data, "video/mp4")}
        return self.http.post("/v1/files", files=files, data={"purpose": "vision"}, headers=headers)


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


def check_error(response: Any, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    return dict(error)


def video(url: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": "what?"}, {"type": "video_url", "video_url": {"url": url}}]


def events(response: Any) -> list[Any]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def test_an_answer_has_text_reason_and_usage(server: Server) -> None:
    body = server.chat().json()
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "hello world", "refusal": None}
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["choices"][0]["logprobs"] is None
    assert body["usage"]["prompt_tokens_details"]["vision_tokens_after_transv"] == 2


def test_parameters_reach_the_engine_and_defaults_are_the_servers(tmp_path: Path) -> None:
    server = Server(tmp_path, default_temperature=0.5, default_max_tokens=7)
    server.chat()
    server.chat(temperature=0, top_p=0.5, max_tokens=9, n=2, seed=-1, stop="x", logprobs=True, top_logprobs=2)
    default, explicit = server.engine.requests
    assert (default.temperature, default.max_new_tokens, default.n, default.num_logprobs) == (0.5, 7, 1, None)
    assert (explicit.temperature, explicit.top_p, explicit.max_new_tokens, explicit.n) == (0, 0.5, 9, 2)
    assert (explicit.seed, explicit.stop, explicit.num_logprobs) == (2**63 - 1, ("x",), 2)


def test_a_stream_opens_tells_and_ends(server: Server) -> None:
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


def test_log_probabilities_come_when_asked_for(server: Server) -> None:
    content = server.chat(logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert content == [{"token": "hello", "logprob": -0.1, "bytes": list(b"hello"), "top_logprobs": []}]


def test_media_come_from_the_store_a_file_or_the_request_itself(server: Server) -> None:
    file_id = server.upload().json()["id"]
    inline = "data:video/mp4;base64," + base64.b64encode(MP4).decode()
    for url in ("feature://known", file_id, inline):
        assert server.chat(video(url), mm_processor_kwargs={"max_frames": 5, "fps": 0.5}).status_code == 200
    stored, file, data = (request.source for request in server.features.requests)
    assert stored == StoredFeatures(media_id="known")
    assert isinstance(file, MediaFile)
    assert Path(file.uri).read_bytes() == MP4
    assert isinstance(data, MediaBytes)
    assert data.sha256 == file.sha256 == hashlib.sha256(MP4).hexdigest()
    assert {(request.max_frames, request.fps) for request in server.features.requests} == {(5, 0.5)}
    assert server.engine.requests[0].turns[0].media[0].num_frames == 2


def test_input_video_and_a_bare_text_url_are_aliases(server: Server) -> None:
    assert server.chat([{"type": "input_video", "input_video": "feature://known"}]).status_code == 200
    assert server.features.requests[0].source == StoredFeatures(media_id="known")


@pytest.mark.parametrize(
    ("url", "status", "code"),
    [
        ("feature://unknown", 404, "media_not_found"),
        ("file-00000000000000000000000000000000", 404, "file_not_found"),
        ("file-../../etc/passwd", 404, "file_not_found"),
        ("https://example.com/a.mp4", 400, "remote_media_disabled"),
        ("http://169.254.169.254/latest", 400, "remote_media_disabled"),
        ("file:///etc/passwd", 400, "remote_media_disabled"),
        ("data:video/mp4;base64,!!!!", 400, "invalid_data_uri"),
        ("data:video/mp4;base64," + base64.b64encode(b"a text").decode(), 415, "unsupported_media_type"),
        ("data:video/mp4;base64," + base64.b64encode(PNG).decode(), 415, "unsupported_media_type"),
    ],
)
def test_media_that_cannot_be_had_are_a_4xx_that_names_the_part(
    server: Server, url: str, status: int, code: str
) -> None:
    error = check_error(server.chat(video(url)), status, code)
    assert error["param"] == "messages.0.content.1"
    assert server.engine.requests == []


def test_a_picture_file_is_no_video(server: Server) -> None:
    file_id = server.upload(PNG).json()["id"]
    check_error(server.chat(video(file_id)), 415, "unsupported_media_type")
    assert server.chat([{"type": "image_url", "image_url": {"url": file_id}}]).status_code == 200


def test_bad_requests_are_4xx_in_openais_shape(server: Server) -> None:
    post = server.http.post
    check_error(post("/v1/chat/completions", content=b"{"), 400, "invalid_json")
    check_error(server.chat(model="gpt-4"), 404, "model_not_found")
    check_error(server.chat(messages=[]), 400, "invalid_value")
    check_error(server.chat(max_tokens=10_000), 400, "invalid_value")
    check_error(server.chat(video("feature://known") * 5 + video("feature://known") * 4), 400, "too_many_media")
    system = {"role": "system", "content": [{"type": "image_url", "image_url": "feature://known"}]}
    check_error(server.chat(messages=[system]), 400, "invalid_value")
    check_error(server.http.get("/v1/nothing"), 404, "unknown_url")
    check_error(server.http.get("/v1/chat/completions"), 405, "method_not_allowed")


def test_bodies_past_the_limit_are_refused_declared_or_not(tmp_path: Path) -> None:
    server = Server(tmp_path, max_request_bytes=2000, max_upload_bytes=5000)
    check_error(server.chat("x" * 3000), 413, "too_large")
    pieces = (b"x" * 500 for _ in range(10))  # no Content-Length
    check_error(server.http.post("/v1/chat/completions", content=pieces), 413, "too_large")
    assert server.upload(MP4 + bytes(3000)).status_code == 200
    check_error(server.upload(MP4 + bytes(6000)), 413, "too_large")


def test_texts_past_the_limit_are_refused(tmp_path: Path) -> None:
    check_error(Server(tmp_path, max_text_characters=10).chat("x" * 11), 413, "too_large")


def test_files_are_uploaded_listed_read_and_deleted(server: Server) -> None:
    created = server.upload().json()
    assert created["object"] == "file"
    assert (created["bytes"], created["filename"], created["purpose"]) == (len(MP4), "cat.mp4", "vision")
    assert server.http.get("/v1/files").json()["data"] == [created]
    assert server.http.get(f"/v1/files/{created['id']}").json() == created
    assert server.http.delete(f"/v1/files/{created['id']}").json()["deleted"] is True
    check_error(server.http.get(f"/v1/files/{created['id']}"), 404, "file_not_found")
    check_error(server.http.delete(f"/v1/files/{created['id']}"), 404, "file_not_found")


def test_uploads_that_are_no_media_or_no_form_are_refused(server: Server) -> None:
    check_error(server.upload(b"a text file called .mp4"), 415, "unsupported_media_type")
    check_error(server.upload(b""), 415, "unsupported_media_type")
    check_error(server.http.post("/v1/files", json={}), 415, "unsupported_media_type")
    check_error(server.http.post("/v1/files", files={"other": b"x"}), 400, "missing_required_parameter")
    check_error(
        server.http.post("/v1/files", data={"file": "text"}, files={"x": b"x"}), 400, "missing_required_parameter"
    )
    broken = server.http.post("/v1/files", content=b"x", headers={"content-type": "multipart/form-data"})
    check_error(broken, 400, "invalid_form")


def test_models_are_listed_and_found_by_name(server: Server) -> None:
    assert [model["id"] for model in server.http.get("/v1/models").json()["data"]] == ["timeviper"]
    assert server.http.get("/v1/models/timeviper").json()["object"] == "model"
    check_error(server.http.get("/v1/models/other"), 404, "model_not_found")


def test_health_tells_live_from_ready(server: Server) -> None:
    assert server.http.get("/health/live").status_code == 200
    assert server.http.get("/health/ready").status_code == 200
    server.features.ready = False
    response = server.http.get("/health/ready")
    assert (response.status_code, response.json()["features"]) == (503, False)


def test_metrics_count_requests_by_route_pattern_and_status(server: Server) -> None:
    server.chat()
    server.http.get("/v1/files/file-private-name")
    text = server.http.get("/metrics").text
    assert 'requests_total{route="/v1/chat/completions",status="200"} 1' in text
    assert 'requests_total{route="/v1/files/{file_id}",status="404"} 1' in text
    assert "private" not in text


def test_metrics_count_tokens_and_which_of_them_were_cached(server: Server) -> None:
    server.chat(n=2)
    server.engine.usage = replace(USAGE, cached_tokens=7)
    server.chat(stream=True)
    text = server.http.get("/metrics").text
    assert "timeviper_gateway_prompt_tokens_total 18\n" in text
    assert "timeviper_gateway_cached_prompt_tokens_total 7\n" in text
    assert "timeviper_gateway_completion_tokens_total 9\n" in text


def keys(*names: str) -> tuple[ApiKey, ...]:
    return tuple(ApiKey(tenant=name, sha256=hashlib.sha256(f"key-{name}".encode()).hexdigest()) for name in names)


def test_with_keys_configured_every_route_but_health_needs_one(tmp_path: Path) -> None:
    server = Server(tmp_path, api_keys=keys("alice"))
    check_error(server.chat(), 401, "invalid_api_key")
    check_error(server.chat(key="key-bob"), 401, "invalid_api_key")
    for path in ("/v1/models", "/v1/files", "/metrics", "/openapi.json", "/v1/nothing"):
        check_error(server.http.get(path), 401, "invalid_api_key")
    basic = server.http.get("/v1/models", headers={"Authorization": "Basic key-alice"})
    check_error(basic, 401, "invalid_api_key")
    assert server.http.get("/health/live").status_code == 200
    assert server.chat(key="key-alice").status_code == 200
    assert [request.tenant for request in server.engine.requests] == ["alice"]


def test_another_tenants_file_is_not_found(tmp_path: Path) -> None:
    server = Server(tmp_path, api_keys=keys("alice", "bob"))
    file_id = server.upload(key="key-alice").json()["id"]
    bob = {"Authorization": "Bearer key-bob"}
    check_error(server.http.get(f"/v1/files/{file_id}", headers=bob), 404, "file_not_found")
    check_error(server.chat(video(file_id), key="key-bob"), 404, "file_not_found")
    assert server.chat(video(file_id), key="key-alice").status_code == 200


def test_a_refusal_becomes_its_status_before_a_stream_and_an_event_within_one(server: Server) -> None:
    server.engine.refusal = Refusal(status=429, message="full", code="busy", retry_after_s=2.0)
    for stream in (False, True):
        response = server.chat(stream=stream)
        check_error(response, 429, "busy")
        assert response.headers["retry-after"] == "2"
    server.engine.refuse_at = 1
    assert events(server.chat(stream=True))[-1]["error"]["code"] == "busy"
    check_error(server.chat(), 429, "busy")


def test_a_request_that_takes_too_long_is_a_408_and_gives_its_slot_back(tmp_path: Path) -> None:
    server = Server(tmp_path, request_timeout_s=0.2)
    server.engine.delay_s = 5.0
    check_error(server.chat(), 408, "timeout")
    assert events(server.chat(stream=True))[-1]["error"]["code"] == "timeout"
    assert server.engine.closed == 2


def test_a_bug_of_ours_is_a_500_in_shape_whose_cause_stays_out_of_log_and_answer(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.engine.bug = True
    with caplog.at_level(logging.INFO):
        response = server.chat("private words")
    check_error(response, 500, "internal_error")
    assert "KeyError" in caplog.text
    assert "generate" in caplog.text
    assert "private" not in caplog.text + response.text


def test_logs_hold_no_bodies_keys_or_queries(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = Server(tmp_path, api_keys=keys("alice"))
    with caplog.at_level(logging.INFO, logger="timeviper_platform"):
        server.chat("a private question", key="key-alice")
        server.http.get("/v1/models?token=private", headers={"Authorization": "Bearer key-private"})
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("timeviper_platform")]
    assert any("POST /v1/chat/completions 200" in line for line in ours)
    assert not any("private" in line or "key-" in line for line in ours)


def test_a_client_that_goes_away_closes_the_answer(tmp_path: Path) -> None:
    """Driven by hand: the task that serves the request is cancelled in the middle of a stream, as Ray Serve does."""

    async def scenario() -> int:
        features, engine = Features(), Engine()
        engine.delay_s = 60.0
        app = create_app(GatewayConfig(media_root=str(tmp_path)), features, engine)
        body = json.dumps({"model": "timeviper", "messages": [{"role": "user", "content": "x"}], "stream": True})
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "query_string": b"",
            "path": "/v1/chat/completions", "raw_path": b"", "root_path": "", "scheme": "http", "headers": [],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
        }  # fmt: skip
        first_chunk = asyncio.Event()
        sent_body = False

        async def receive() -> dict[str, Any]:
            nonlocal sent_body
            if sent_body:
                await asyncio.Event().wait()
            sent_body = True
            return {"type": "http.request", "body": body.encode(), "more_body": False}

        async def send(message: Any) -> None:
            if message.get("body"):
                first_chunk.set()

        task = asyncio.create_task(app(scope, receive, send))  # type: ignore[arg-type]
        await asyncio.wait_for(first_chunk.wait(), 5)
        assert engine.closed == 0
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return engine.closed

    assert asyncio.run(scenario()) == 1


def test_the_gateway_process_loads_no_torch_and_no_decoder() -> None:
    code = (
        "import sys, timeviper_platform.serving.gateway;"
        "print([name for name in ('torch', 'av', 'ray', 'transformers', 'pyarrow') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
