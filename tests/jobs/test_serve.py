"""The serve job on the shared cluster: HTTP, the openai client, uploaded videos, jobs and bad input."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import openai
import pytest

from reference.tiny_serving import make_serving_folders, write_video
from timeviper_platform.cli import serve
from timeviper_platform.common.ray_cluster import free_port
from timeviper_platform.serving.gateway.connections import STALL_S

ROOT = Path(__file__).resolve().parents[2]
MODEL = "timeviper-tiny"


@dataclass(frozen=True)
class Endpoint:
    """A running endpoint, and a video to send."""

    url: str
    process: subprocess.Popen[str]
    video: Path

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)


def run_job(*arguments: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "jobs" / "serve.py"), "--config", "ray_configs/tiny/serve.yaml", *arguments]
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def endpoint(ray_cluster: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    root = tmp_path_factory.mktemp("serve")
    folders = make_serving_folders(root)
    port = free_port()
    overrides = [
        f"weights={folders.weights}",
        f"gateway.media_root={root / 'media'}",
        f"features.feature_store={folders.store}",
        f"features.encoder.model={folders.encoder.model}",
        "features.encoder.encode_batch_frames=4",
    ]
    process = run_job("--port", str(port), *overrides, environment={**os.environ, **ray_cluster})
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line.startswith("ready:"):
            pytest.fail(f"the endpoint did not start: {process.communicate(timeout=60)[1][-3000:]}")
        yield Endpoint(f"http://127.0.0.1:{port}", process, write_video(root / "a.mp4", seconds=6))
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 0


def question(text: str, url: str | None = None) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if url is not None:
        content.append({"type": "video_url", "video_url": {"url": url}})
    return [{"role": "user", "content": content}]


def call(
    endpoint: Endpoint, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, Any]]:
    """Sends a GET, or with `body` a POST, on a connection that stays open, as clients of the API do."""
    connection = http.client.HTTPConnection(endpoint.url.removeprefix("http://"), timeout=60)
    with contextlib.closing(connection):
        method = "GET" if body is None else "POST"
        connection.request(method, path, body, {"Content-Type": "application/json", **(headers or {})})
        response = connection.getresponse()
        return response.status, json.load(response)


def post(endpoint: Endpoint, body: bytes, path: str = "/v1/chat/completions") -> tuple[int, dict[str, Any]]:
    return call(endpoint, path, body)


def wait_for_job(endpoint: Endpoint, job_id: str, done: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while not done(job := call(endpoint, f"/v1/jobs/{job_id}")[1]):
        assert time.monotonic() < deadline, job
        time.sleep(0.05)
    return job


@pytest.mark.cluster
def test_questions_about_stored_and_uploaded_videos_are_answered_plain_and_streamed(endpoint: Endpoint) -> None:
    client = endpoint.client
    assert [model.id for model in client.models.list()] == [MODEL]
    with endpoint.video.open("rb") as file:
        uploaded = client.files.create(file=file, purpose="vision")
    inline = f"data:video/mp4;base64,{base64.b64encode(endpoint.video.read_bytes()).decode()}"
    answers = {}
    for name, url, frames in (("stored", "feature://film", 24), ("file", uploaded.id, 6), ("inline", inline, 6)):
        options: Any = {"model": MODEL, "messages": question("What?", url), "max_tokens": 12}
        plain = client.chat.completions.create(**options)
        answers[name] = plain.choices[0].message.content
        details = plain.usage.prompt_tokens_details.model_dump()
        assert (details["vision_tokens"], details["vision_tokens_after_transv"]) == (frames * 4, frames)
        chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert streamed == answers[name]
        usage, before = chunks[-1].usage.model_dump(), plain.usage.model_dump()
        reused = [of.pop("prompt_tokens_details").pop("cached_tokens") for of in (usage, before)]
        assert usage == before
        assert reused[0] >= details["vision_tokens"]  # the film is not prefilled again
    assert answers["file"] == answers["inline"]
    client.files.delete(uploaded.id)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=MODEL, messages=question("What?", uploaded.id))


@pytest.mark.cluster
def test_a_long_upload_is_answered_from_blocks_as_from_whole_features(endpoint: Endpoint, tmp_path: Path) -> None:
    """20 frames are three blocks; time spans wait for all of them."""
    answers = []
    for number, first in enumerate(("What?", "When?")):
        video = write_video(tmp_path / f"{number}.mp4", seconds=20)
        data = base64.b64encode(video.read_bytes() + bytes(number)).decode()  # another file, of the same frames
        messages: Any = question("What?", f"data:video/mp4;base64,{data}")
        options: Any = {"model": MODEL, "messages": messages, "max_tokens": 12}
        if first == "When?":
            segments: Any = {"type": "json_schema", "json_schema": {"name": "segments"}}
            endpoint.client.chat.completions.create(**options, response_format=segments)
        answer = endpoint.client.chat.completions.create(**options)
        assert answer.usage is not None
        answers.append((answer.choices[0].message.content, answer.usage.prompt_tokens))
    assert answers[0] == answers[1]


@pytest.mark.cluster
def test_concurrent_questions_get_their_own_answers(endpoint: Endpoint) -> None:
    client = endpoint.client

    def ask(number: int) -> str:
        limits = {"mm_processor_kwargs": {"max_frames": number + 1}}
        messages: Any = question(f"Question {number}?", "feature://film")
        answer = client.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=20, temperature=1, seed=number, extra_body=limits
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details.model_dump()["vision_tokens"] == 4 * (number + 1)  # type: ignore[union-attr]
        return answer.choices[0].message.content or ""

    alone = [ask(number) for number in range(6)]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(ask, range(6)))
    assert together == alone
    assert len(set(alone)) == 6


@pytest.mark.cluster
def test_the_page_and_the_list_of_videos_are_served_behind_ray(endpoint: Endpoint) -> None:
    with urllib.request.urlopen(f"{endpoint.url}/", timeout=10) as response:
        assert response.headers["Content-Type"].startswith("text/html")
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        assert b'<base href="/">' in response.read()
    (video,) = call(endpoint, "/v1/videos")[1]["data"]
    assert (video["id"], video["url"], video["num_frames"]) == ("film", "feature://film", 40)
    whole = call(endpoint, "/v1/videos/film")[1]
    assert len(whole["frame_seconds"]) == 40
    assert len(whole["selected_frames"]) == 24


@pytest.mark.cluster
def test_a_job_answers_as_chat_does_and_a_cancelled_one_ends_within_a_second(endpoint: Endpoint) -> None:
    texts = ["What?", "When is it?"]
    body = {"model": MODEL, "video": "feature://film", "questions": texts, "max_tokens": 12}
    status, job = post(endpoint, json.dumps(body).encode(), "/v1/jobs")
    assert (status, job["status"]) == (202, "queued"), job
    job = wait_for_job(endpoint, job["id"], lambda job: job["status"] not in ("queued", "running"))
    assert (job["status"], job["progress"]["frames_done"], job["progress"]["questions_done"]) == ("completed", 24, 2)
    for text, answer in zip(texts, job["answers"], strict=True):
        messages: Any = question(text, "feature://film")
        messages[0]["content"].reverse()  # a job's video comes first
        alone = endpoint.client.chat.completions.create(model=MODEL, messages=messages, max_tokens=12)
        assert answer["choices"][0]["message"]["content"] == alone.choices[0].message.content
    long = {**body, "questions": [f"Question {number}?" for number in range(64)], "max_tokens": 256}
    job = post(endpoint, json.dumps(long).encode(), "/v1/jobs")[1]
    wait_for_job(endpoint, job["id"], lambda job: job["progress"]["stage"] == "answering")
    began = time.monotonic()
    assert post(endpoint, b"{}", f"/v1/jobs/{job['id']}/cancel")[1]["status"] == "cancelled"
    wait_for_job(endpoint, job["id"], lambda job: job["finished_at"] is not None)
    assert time.monotonic() - began < 1
    time.sleep(1)  # what was answered before is written
    ended = call(endpoint, f"/v1/jobs/{job['id']}")[1]
    assert (ended["status"], ended["progress"]["stage"]) == ("cancelled", "ended")
    assert len(ended["answers"]) < 64
    time.sleep(1)
    assert call(endpoint, f"/v1/jobs/{job['id']}")[1] == ended


@pytest.mark.cluster
def test_bad_input_is_a_4xx_in_openais_shape_and_never_a_500(endpoint: Endpoint) -> None:
    def body(**values: Any) -> bytes:
        return json.dumps({"model": MODEL, "messages": question("What?"), **values}).encode()

    def inline(data: bytes) -> bytes:
        return body(messages=question("What?", f"data:video/mp4;base64,{base64.b64encode(data).decode()}"))

    video = endpoint.video.read_bytes()
    cases = {
        "malformed JSON": (b'{"model": ', 400),
        "no object": (b"[]", 400),
        "unknown model": (body(model="other"), 404),
        "unknown stored id": (body(messages=question("What?", "feature://other")), 404),
        "unknown file": (body(messages=question("What?", f"file-{'0' * 32}")), 404),
        "remote address": (body(messages=question("What?", "https://127.0.0.1/a.mp4")), 400),
        "too long a prompt": (body(messages=question("x" * 20_000)), 400),
        "truncated video": (inline(video[: len(video) // 3]), 422),
        "garbage after a container header": (inline(video[:40] + b"\x07" * 500), 422),
        "text file as video": (inline(b"this is a text file" * 10), 415),
        "empty video": (inline(b""), 415),
        "playlist": (inline(b"#EXTM3U\nfile:///etc/passwd\n"), 415),
        "n too high": (body(n=9), 400),
        "unknown field": (body(max_token=3), 400),
        "tools": (body(tools=[{"type": "function"}]), 400),
    }
    for name, (data, status) in cases.items():
        got, answer = post(endpoint, data)
        assert got == status, (name, got, answer)
        assert set(answer["error"]) == {"message", "type", "param", "code"}, name
    assert call(endpoint, "/v1/chat/completions", b"{", {"Content-Length": str(2**30)})[0] == 413  # before its body
    assert post(endpoint, b"x", "/v1/files")[0] == 415
    assert post(endpoint, b"{}", "/v1/nothing")[0] == 404


@pytest.mark.cluster
def test_the_openai_package_talks_files_models_and_second_turns(endpoint: Endpoint) -> None:
    """A second turn with the first one's message object was refused before."""
    client = endpoint.client
    assert client.models.retrieve(MODEL).id == MODEL
    uploaded = client.files.create(
        file=endpoint.video, purpose="vision", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert client.files.content(uploaded.id).read() == endpoint.video.read_bytes()
    assert [file.id for file in client.files.list()] == [uploaded.id]
    first: Any = [*question("<media>", uploaded.id), *question("What?")]
    options: Any = {"model": MODEL, "max_tokens": 5000, "stop": None, "tools": openai.omit, "user": "me"}
    one = client.chat.completions.create(messages=first, **{**options, "max_tokens": 8})
    second = [*first, one.choices[0].message, *question("Why?")]
    two = client.chat.completions.create(messages=second, **options, reasoning_effort="low", logit_bias={})
    assert two.usage is not None
    assert two.usage.completion_tokens <= 256
    assert two.choices[0].finish_reason in ("stop", "length")
    client.files.delete(uploaded.id)


@pytest.mark.cluster
def test_slow_clients_and_overrides_are_bounded_before_the_gateway(endpoint: Endpoint) -> None:
    """Ray Serve's own server waits for ever, and lets clients switch off its timeouts."""
    port = int(endpoint.url.rpartition(":")[2])
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9"
    )
    held = [socket.create_connection(("127.0.0.1", port)) for _ in range(700)]  # the limit is 512
    try:
        for connection in held:
            with contextlib.suppress(OSError):  # one of those above the limit, closed by now
                connection.sendall(head + b"\r\n\r\n")
        time.sleep(STALL_S + 0.5)
        with urllib.request.urlopen(f"{endpoint.url}/health/live", timeout=10) as response:
            assert response.status == 200
        held[0].settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            assert held[0].recv(12) in (b"", b"HTTP/1.1 408")  # on a slow machine its body is late first
    finally:
        for connection in held:
            connection.close()
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{endpoint.url}/nothing", timeout=10)
    assert json.load(caught.value)["error"]["code"] == "unknown_url"


@pytest.mark.cluster
def test_a_large_body_of_wrong_items_holds_up_nobody(endpoint: Endpoint) -> None:
    """Before: 2 MiB of them held the gateway's event loop for 6 s."""
    start = f'{{"model": "{MODEL}", "messages": [{{"role": "user", "content": ['.encode()
    body = start + b"1," * ((16 * 2**20 - len(start)) // 2)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, endpoint, body)
        slowest = 0.0
        while not answer.done():
            began = time.monotonic()
            assert call(endpoint, "/health/live") == (200, {"status": "live"})
            slowest = max(slowest, time.monotonic() - began)
    status, error = answer.result()
    assert (status, error["error"]["code"]) == (400, "too_many_values")
    assert slowest < 3


@pytest.mark.cluster
def test_a_client_cannot_override_rays_timeout(endpoint: Endpoint) -> None:
    """Without the gateway's middleware in Ray's proxy the first is a 408 in plain text."""
    body = json.dumps({"model": MODEL, "messages": question("What?"), "max_tokens": 4}).encode()
    for headers in ({"x-request-timeout-seconds": "0.001"}, {"X_Request_Timeout_Seconds": "0.001"}):
        status, answer = call(endpoint, "/v1/chat/completions", body, headers)
        assert (status, answer.get("object")) == (200, "chat.completion")


@pytest.mark.cluster
def test_health_and_metrics_are_served(endpoint: Endpoint) -> None:
    with urllib.request.urlopen(f"{endpoint.url}/health/ready", timeout=10) as response:
        assert json.load(response) == {"status": "ready", "features": True, "engine": True}
    with urllib.request.urlopen(f"{endpoint.url}/metrics", timeout=10) as response:
        assert b"timeviper_gateway_requests_total" in response.read()


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The job's module, without its signal handlers."""
    monkeypatch.setattr(serve.signal, "signal", lambda *_: None)
    return serve


def test_beyond_loopback_keys_are_required(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], job: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, anyone who reached the port was answered."""
    config = tmp_path / "serve.yaml"
    config.write_text((ROOT / "ray_configs/tiny/serve.yaml").read_text().replace("127.0.0.1", "0.0.0.0"))
    monkeypatch.setattr(job.ray_cluster, "connect", lambda **_: pytest.fail("started"))
    assert job.main(["--config", str(config)]) == 1
    assert "listens on 0.0.0.0; set gateway.api_keys" in capsys.readouterr().err


def test_the_address_that_the_job_prints_is_a_url() -> None:
    """Before, http://::1:8000, which clients do not parse."""
    hosts = {"127.0.0.1": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::1": "[::1]", "::": "[::1]", "a.b": "a.b"}
    assert {host: serve._url_host(host) for host in hosts} == hosts


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("engine.engine.num_slotz=3", "applications.0.args.engine.engine.num_slotz"),
        ("weights", "must read key=value"),
    ],
)
def test_an_invalid_setting_is_an_error_with_its_name(
    override: str, message: str, capsys: pytest.CaptureFixture[str], job: ModuleType
) -> None:
    assert job.main(["--config", str(ROOT / "ray_configs/tiny/serve.yaml"), override]) == 1
    assert message in capsys.readouterr().err
