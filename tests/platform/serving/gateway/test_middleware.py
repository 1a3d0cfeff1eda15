"""middleware: keys, tenants, body limits, metrics, and nothing private in logs and answers."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from starlette.testclient import TestClient

from reference.synthetic_gateway import MP4, USAGE, Server, check_error, keys, video
from timeviper_platform.common.logs import JsonLines
from timeviper_platform.serving.gateway.middleware import GatewayMetrics


def test_bodies_above_the_limit_are_refused_with_and_without_content_length(tmp_path: Path) -> None:
    server = Server(tmp_path, max_request_bytes=2000, max_upload_bytes=5000)
    check_error(server.chat("x" * 3000), 413, "too_large")
    blocks = (b"x" * 500 for _ in range(10))  # no Content-Length
    check_error(
        server.http.post("/v1/chat/completions", content=blocks, headers={"content-type": "application/json"}),
        413,
        "too_large",
    )
    assert server.upload(MP4 + bytes(3000)).status_code == 200
    check_error(server.upload(MP4 + bytes(6000)), 413, "too_large")


def test_a_body_that_arrives_too_slowly_is_a_408_that_ends_the_connection(tmp_path: Path) -> None:
    server = Server(tmp_path, body_grace_s=0.2, min_body_bytes_per_s=1000)
    status, headers, seconds = asyncio.run(trickle(server, b"x", pause_s=0.05))
    assert (status, headers[b"connection"]) == (408, b"close")
    assert 0.2 <= seconds < 5
    whole, _, _ = asyncio.run(trickle(server, b"x" * 100, pause_s=0.05, num_blocks=20))  # 2,000 bytes a second
    assert whole == 400  # not JSON


async def trickle(
    server: Server, block: bytes, *, pause_s: float, num_blocks: int = 1000
) -> tuple[int, dict[bytes, bytes], float]:
    sent: list[Any] = []
    blocks = iter([block] * num_blocks)

    async def receive() -> Any:
        await asyncio.sleep(pause_s)
        body = next(blocks, None)
        return {"type": "http.request", "body": body or b"", "more_body": body is not None}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers, "query_string": b"",
        "client": ("127.0.0.1", 1),
    }  # fmt: skip
    began = time.monotonic()
    await server.http.app(scope, receive, send)
    return sent[0]["status"], dict(sent[0]["headers"]), time.monotonic() - began


def test_without_keys_only_this_machine_is_answered(tmp_path: Path) -> None:
    server = Server(tmp_path, allowed_hosts=("box.lan",))

    def get(app: Any, host: str, client: str = "127.0.0.1", **headers: str) -> Any:
        http = TestClient(app, base_url=f"http://{host}", client=(client, 5))
        return http.get("/v1/models", headers=headers)

    app = server.http.app
    for host in ("localhost", "127.0.0.1:8000", "[::1]:8000", "box.lan"):
        assert get(app, host).status_code == 200
    check_error(get(app, "evil.example"), 403, "host_not_allowed")  # DNS rebinding
    check_error(get(app, "localhost", "10.0.0.7"), 403, "keys_required")
    check_error(get(app, "localhost", **{"x-forwarded-for": "10.0.0.7"}), 403, "keys_required")
    assert TestClient(app, client=("10.0.0.7", 5)).get("/health/live").status_code == 200  # a cluster's probe
    anonymous = Server(tmp_path, allow_anonymous=True)
    assert get(anonymous.http.app, "box.lan", "10.0.0.7").status_code == 200
    with_keys = Server(tmp_path, api_keys=keys("alice"))
    assert get(with_keys.http.app, "any", "10.0.0.7", authorization="Bearer key-alice").status_code == 200


def test_pages_of_other_sites_may_not_call_unless_configured(tmp_path: Path) -> None:
    server = Server(tmp_path, cors_origins=("https://app.example",))
    files = {"file": ("cat.mp4", MP4)}  # a form needs no preflight
    foreign = {"Origin": "https://evil.example"}
    check_error(server.http.post("/v1/files", files=files, headers=foreign), 403, "origin_not_allowed")
    check_error(server.http.get("/v1/models", headers={"Origin": "null"}), 403, "origin_not_allowed")
    assert server.http.get("/v1/models", headers={"Origin": "http://localhost"}).status_code == 200
    allowed = {"Origin": "https://app.example"}
    assert server.http.get("/v1/models", headers=allowed).headers["access-control-allow-origin"] == allowed["Origin"]
    preflight = {**allowed, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    assert server.http.options("/v1/chat/completions", headers=preflight).status_code == 200
    plain = Server(tmp_path).http.get("/v1/models", headers={"Origin": "http://localhost"})
    assert "access-control-allow-origin" not in plain.headers


def test_a_page_of_an_allowed_origin_needs_a_key_only_after_its_preflight(tmp_path: Path) -> None:
    """Before, the preflight, which never has a key, was a 401: with keys no page could call. Errors were hidden."""
    server = Server(tmp_path, cors_origins=("https://app.example",), api_keys=keys("alice"))
    origin = {"Origin": "https://app.example"}
    asked = "authorization,content-type,x-stainless-os,x-stainless-retry-count"  # of OpenAI's package for JavaScript
    for method, path in (("POST", "/v1/chat/completions"), ("DELETE", "/v1/files/file-0"), ("GET", "/v1/models")):
        preflight = {**origin, "Access-Control-Request-Method": method, "Access-Control-Request-Headers": asked}
        answer = server.http.options(path, headers=preflight)
        assert (answer.status_code, answer.headers["access-control-allow-headers"]) == (200, asked)
        assert method in answer.headers["access-control-allow-methods"]
        other = server.http.options(path, headers={**preflight, "Origin": "https://evil.example"})
        check_error(other, 403, "origin_not_allowed")
        assert "access-control-allow-origin" not in other.headers
    refused = server.http.get("/v1/models", headers=origin)
    check_error(refused, 401, "invalid_api_key")
    assert refused.headers["access-control-allow-origin"] == origin["Origin"]
    answer = server.http.get("/v1/models", headers={**origin, "Authorization": "Bearer key-alice"})
    assert answer.status_code == 200
    assert "Retry-After" in answer.headers["access-control-expose-headers"]


def test_metrics_count_requests_by_route_pattern_and_status(server: Server) -> None:
    server.chat()
    server.http.get("/v1/files/file-private-name")
    text = server.http.get("/metrics").text
    assert 'requests_total{route="/v1/chat/completions",status="200"} 1' in text
    assert 'requests_total{route="/v1/files/{file_id}",status="404"} 1' in text
    assert 'request_seconds_count{route="/v1/chat/completions"} 1' in text
    assert "first_text_seconds_count 1" in text
    assert "private" not in text


def test_metrics_count_tokens_and_cached_tokens(server: Server) -> None:
    server.chat(n=2)
    server.engine.usage = replace(USAGE, cached_tokens=7)
    server.chat(stream=True)
    text = server.http.get("/metrics").text
    assert "timeviper_gateway_prompt_tokens_total 18.0\n" in text
    assert "timeviper_gateway_cached_prompt_tokens_total 7.0\n" in text
    assert "timeviper_gateway_completion_tokens_total 9.0\n" in text


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


def test_readiness_that_starts_replicas_needs_a_key(tmp_path: Path) -> None:
    """Before, anyone could keep GPUs awake that had been scaled to zero."""
    server = Server(tmp_path, api_keys=keys("alice"))
    assert server.http.get("/health/ready?deep=0").status_code == 200
    for path in ("/health/ready?deep=1", "/health/ready/?deep=1"):
        check_error(server.http.get(path), 401, "invalid_api_key")
    assert not server.features.deep
    assert server.http.get("/health/ready?deep=1", headers={"Authorization": "Bearer key-alice"}).status_code == 200
    assert server.features.deep
    local = TestClient(Server(tmp_path).http.app, client=("10.0.0.7", 5))
    check_error(local.get("/health/ready?deep=1"), 403, "keys_required")


def test_another_tenants_file_is_not_found(tmp_path: Path) -> None:
    server = Server(tmp_path, api_keys=keys("alice", "bob"))
    file_id = server.upload(key="key-alice").json()["id"]
    bob = {"Authorization": "Bearer key-bob"}
    check_error(server.http.get(f"/v1/files/{file_id}", headers=bob), 404, "file_not_found")
    check_error(server.chat(video(file_id), key="key-bob"), 404, "file_not_found")
    assert server.chat(video(file_id), key="key-alice").status_code == 200
    assert server.features.tenants == ["alice"]


def test_an_unexpected_error_is_a_500_without_private_text_in_log_and_answer(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.engine.bug = True
    with caplog.at_level(logging.INFO):
        response = server.chat("private words")
    check_error(response, 500, "internal_error")
    assert "KeyError" in caplog.text
    assert "generate" in caplog.text
    assert "private" not in caplog.text + response.text


def test_logs_contain_no_bodies_keys_or_queries(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = Server(tmp_path, api_keys=keys("alice"))
    with caplog.at_level(logging.INFO, logger="timeviper_platform"):
        server.http.headers["x-request-id"] = "id-1"
        server.chat("a private question", key="key-alice")
        server.http.get("/v1/models?token=private", headers={"Authorization": "Bearer key-private"})
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("timeviper_platform")]
    first = json.loads(ours[0])
    assert first.pop("seconds") >= 0
    route = "/v1/chat/completions"
    assert first == {"event": "request", "request_id": "id-1", "method": "POST", "route": route, "status": 200}
    assert not any("private" in line or "key-" in line for line in ours)
    assert server.engine.requests[0].request_id == "id-1"
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
    (line,) = [line for line in lines if line.get("event") == "request" and line["route"] == route]
    assert {**first, "level": "INFO", "logger": "timeviper_platform.serving.gateway.middleware"}.items() <= line.items()


def test_a_sink_gets_the_counts_of_this_replica() -> None:
    class Sink:
        values: ClassVar[dict[str, float]] = {}

        def add(self, name: str, amount: float, **tags: str) -> None:
            key = name + "".join(tags.values())
            self.values[key] = self.values.get(key, 0) + amount

        def observe(self, name: str, value: float, **tags: str) -> None:
            self.add(name, value, **tags)

        def report(self, values: Mapping[str, float]) -> None:
            self.add("reports", 1)
            self.values.update(values)

    async def count() -> None:
        metrics = GatewayMetrics(Sink(), gauge_s=0.01)
        metrics.start_request()
        metrics.start_request()
        metrics.end_request("/v1/models", 200, 0.25)
        metrics.add_first_text(2.0)
        usage = {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 0}}
        metrics.add_usage(usage)
        await asyncio.sleep(0.05)

    asyncio.run(count())
    assert Sink.values == {
        "ongoing_requests": 1,
        "reports": 1,
        "requests/v1/models200": 1,
        "request_seconds/v1/models": 0.25,
        "first_text_seconds": 2.0,
        "prompt_tokens": 9,
        "cached_prompt_tokens": 0,
        "completion_tokens": 3,
    }
