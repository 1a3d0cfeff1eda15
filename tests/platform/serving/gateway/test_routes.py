"""routes: every route over ASGI, answers whole and streamed."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from reference.synthetic_gateway import MP4, Engine, Features, Server, check_error, events, video
from timeviper_platform.serving.gateway.config import GatewayConfig
from timeviper_platform.serving.gateway.routes import create_app
from timeviper_platform.serving.messages import Refusal


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
    check_error(post("/v1/chat/completions", content=b"{"), 400, "invalid_json")
    check_error(server.chat(model="gpt-4"), 404, "model_not_found")
    check_error(server.chat(messages=[]), 400, "invalid_value")
    check_error(server.chat(max_tokens=10_000), 400, "invalid_value")
    check_error(server.chat(video("feature://known") * 5 + video("feature://known") * 4), 400, "too_many_media")
    system = {"role": "system", "content": [{"type": "image_url", "image_url": "feature://known"}]}
    check_error(server.chat(messages=[system]), 400, "invalid_value")
    check_error(server.http.get("/v1/nothing"), 404, "unknown_url")
    check_error(server.http.get("/v1/chat/completions"), 405, "method_not_allowed")


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


def test_models_are_listed_and_found_by_name(server: Server) -> None:
    assert [model["id"] for model in server.http.get("/v1/models").json()["data"]] == ["timeviper"]
    assert server.http.get("/v1/models/timeviper").json()["object"] == "model"
    check_error(server.http.get("/v1/models/other"), 404, "model_not_found")


def test_health_distinguishes_live_and_ready(server: Server) -> None:
    assert server.http.get("/health/live").status_code == 200
    assert server.http.get("/health/ready").status_code == 200
    server.features.ready = False
    response = server.http.get("/health/ready")
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


def test_a_slow_request_is_a_408_and_frees_its_slot(tmp_path: Path) -> None:
    server = Server(tmp_path, request_timeout_s=0.2)
    server.engine.delay_s = 5.0
    check_error(server.chat(), 408, "timeout")
    assert events(server.chat(stream=True))[-1]["error"]["code"] == "timeout"
    assert server.engine.closed == 2


def test_a_client_that_disconnects_closes_the_answer(tmp_path: Path) -> None:
    """Cancels the request's task during a stream, as Ray Serve does."""

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


def test_the_gateway_imports_no_torch_and_no_decoder() -> None:
    code = (
        "import sys, timeviper_platform.serving.gateway.routes;"
        "print([name for name in ('torch', 'av', 'ray', 'transformers', 'pyarrow') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
