"""connections: slow and greedy clients of a server as Ray Serve starts it, and Ray's own errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
import uvicorn.config
from starlette.types import ASGIApp, Receive, Scope, Send

from timeviper_platform.serving.gateway import connections
from timeviper_platform.serving.gateway.config import ConnectionLimits
from timeviper_platform.serving.gateway.connections import BoundedProtocol, RayAnswers, environment, middlewares

GET = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers GET at once and POST after its body."""
    if scope["method"] == "POST":
        while (await receive()).get("more_body"):
            pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def early(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers before it reads the body."""
    await answer({**scope, "method": "GET"}, receive, send)


@asynccontextmanager
async def serving(app: ASGIApp = answer) -> AsyncIterator[int]:
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, lifespan="off")  # as Ray Serve: no `http`
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        await task


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Applies limits as Ray Serve does: variables, then its callback."""
    for name in ("limits", "counts_clients"):
        monkeypatch.setattr(BoundedProtocol, name, getattr(BoundedProtocol, name))
    monkeypatch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", uvicorn.config.HTTP_PROTOCOLS["auto"])

    def apply(**values: Any) -> None:
        for name, value in environment(ConnectionLimits(**values)).items():
            monkeypatch.setenv(name, value)
        assert [entry.cls for entry in middlewares()] == [RayAnswers]

    return apply


def run(scenario: Callable[[int], Awaitable[None]], app: ASGIApp = answer) -> None:
    async def main() -> None:
        async with asyncio.timeout(20), serving(app) as port:
            await scenario(port)

    asyncio.run(main())


async def send(port: int, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    return reader, writer


async def closed(reader: asyncio.StreamReader) -> bool:
    try:
        return await asyncio.wait_for(reader.read(), 5) == b""
    except ConnectionResetError:
        return True


def test_headers_that_do_not_end_are_closed_even_if_they_trickle(limits: Callable[..., None]) -> None:
    limits(header_timeout_s=0.4)

    async def scenario(port: int) -> None:
        silent, _ = await send(port, b"")
        begun, writer = await send(port, b"GET / HTTP/1.1\r\n")
        second, again = await send(port, GET)
        assert b"200 OK" in await second.readuntil(b"ok")
        again.write(b"GET /")  # the second request of a connection too

        async def trickle() -> None:
            for number in range(40):  # 2 s
                await asyncio.sleep(0.05)
                writer.write(b"X-%d: 1\r\n" % number)

        trickling = asyncio.create_task(trickle())
        for reader in (silent, begun, second):
            assert await closed(reader)
        assert not trickling.done()
        trickling.cancel()

    run(scenario)


def test_headers_above_the_limit_are_refused(limits: Callable[..., None]) -> None:
    limits(max_header_bytes=2000)

    async def scenario(port: int) -> None:
        reader, _ = await send(port, b"GET / HTTP/1.1\r\n" + b"X-Long: " + b"x" * 5000)
        text = await reader.read()
        assert text.startswith(b"HTTP/1.1 400 ")
        assert json.loads(text.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"
        reader, _ = await send(port, b"this is not HTTP\r\n\r\n")
        assert b"invalid_http" in await reader.read()

    run(scenario)


def test_a_client_that_holds_all_its_connections_still_gets_an_answer(
    limits: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, 600 bodies that were held back blocked every route."""
    limits(max_per_client=20)
    monkeypatch.setattr(connections, "STALL_S", 0.2)

    async def scenario(port: int) -> None:
        held = [await send(port, POST) for _ in range(20)]
        await asyncio.sleep(0.4)
        reader, _ = await send(port, GET)
        assert b"200 OK" in await reader.readuntil(b"ok")
        assert await closed(held[0][0])
        held[1][1].write(bytes(100))  # the others go on
        assert b"200 OK" in await held[1][0].readuntil(b"ok")

    run(scenario)


def test_running_answers_are_not_closed_for_new_connections(limits: Callable[..., None]) -> None:
    limits(max_per_client=2)
    release = asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await release.wait()
        await answer(scope, receive, send)

    async def scenario(port: int) -> None:
        running = [await send(port, GET) for _ in range(2)]
        await asyncio.sleep(0.1)
        refused, writer = await send(port, POST)
        writer.write(bytes(100))
        head, _, body = (await refused.read()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 429 ")
        assert b"retry-after: 1" in head.lower()
        assert json.loads(body)["error"]["code"] == "too_many_connections"
        release.set()
        for reader, _ in running:
            assert b"200 OK" in await reader.readuntil(b"ok")

    run(scenario, slow)


def test_far_above_the_limit_connections_are_closed_unread(
    limits: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits(max_per_client=2)
    monkeypatch.setattr(connections, "REFUSED_CONNECTIONS", 3)

    async def scenario(port: int) -> None:
        held = [await send(port, b"") for _ in range(5)]
        await asyncio.sleep(0.1)
        assert await closed((await send(port, GET))[0])
        held[0][1].write(GET)
        assert b"200 OK" in await held[0][0].readuntil(b"ok")
        held[4][1].write(GET)
        assert b"429 Too Many" in await held[4][0].read()

    run(scenario)


def test_a_connection_about_to_be_used_is_not_closed_for_a_new_one(limits: Callable[..., None]) -> None:
    """Before, a client's pooled connection was reset while its next request was on its way."""
    limits(max_per_client=2)

    async def scenario(port: int) -> None:
        pool = [await send(port, GET) for _ in range(2)]
        for reader, _ in pool:
            await reader.readuntil(b"ok")
        refused, _ = await send(port, GET)
        assert b"429 Too Many" in await refused.read()
        for reader, writer in pool:
            writer.write(GET)
            assert b"200 OK" in await reader.readuntil(b"ok")

    run(scenario)


def test_an_upload_on_its_way_is_not_closed_for_a_new_connection(
    limits: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits(max_per_client=1)
    monkeypatch.setattr(connections, "STALL_S", 0.5)

    async def scenario(port: int) -> None:
        reader, writer = await send(port, POST)
        for _ in range(10):
            await asyncio.sleep(0.1)
            writer.write(bytes(10))
            await asyncio.sleep(0.02)
            refused, _ = await send(port, GET)
            assert b"429 Too Many" in await refused.read()
        assert b"200 OK" in await reader.readuntil(b"ok")

    run(scenario)


def test_behind_haproxy_one_address_is_all_clients(
    limits: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    limits(max_per_client=2)

    async def scenario(port: int) -> None:
        held = [await send(port, POST) for _ in range(5)]
        await asyncio.sleep(0.1)
        for reader, writer in held:
            writer.write(bytes(100))
            assert b"200 OK" in await reader.readuntil(b"ok")

    run(scenario)


def test_an_answer_that_nobody_reads_is_closed(limits: Callable[..., None]) -> None:
    limits(write_timeout_s=0.3)

    async def long(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(64):
            await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": number < 63})

    async def scenario(port: int) -> None:
        _, writer = await send(port, GET)
        transport = writer.transport
        assert isinstance(transport, asyncio.ReadTransport)
        transport.pause_reading()
        await asyncio.sleep(0.1)
        assert BoundedProtocol._open
        while BoundedProtocol._open:
            await asyncio.sleep(0.05)

    run(scenario, long)


def test_a_request_answered_before_its_end_does_not_stay_open(
    limits: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits()
    monkeypatch.setattr(connections, "LINGER_S", 0.2)

    async def scenario(port: int) -> None:
        reader, writer = await send(port, POST)
        assert b"200 OK" in await reader.readuntil(b"ok")
        writer.write(b"x")  # a trickle that would keep an idle connection alive
        assert await closed(reader)

    run(scenario, early)


@pytest.mark.parametrize("connection", ["close", "keep-alive"])
def test_a_client_that_is_still_sending_gets_the_answer(limits: Callable[..., None], connection: str) -> None:
    limits(max_header_bytes=2000)
    num_chunks, chunk = 16, bytes(1 << 20)

    async def scenario(port: int) -> None:
        head = f"POST / HTTP/1.1\r\nHost: x\r\nConnection: {connection}\r\nContent-Length: {num_chunks << 20}\r\n\r\n"
        reader, writer = await send(port, head.encode())
        for _ in range(num_chunks):
            writer.write(chunk)
            await writer.drain()
        assert b"200 OK" in await reader.readuntil(b"ok")
        if connection == "close":
            assert await closed(reader)
        else:
            writer.write(GET)
            assert b"200 OK" in await reader.readuntil(b"ok")

    run(scenario, early)


def test_a_next_request_may_be_slow(limits: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, it was taken for the rest of an answered one, and its connection closed."""
    limits()
    monkeypatch.setattr(connections, "LINGER_S", 0.1)

    async def scenario(port: int) -> None:
        reader, writer = await send(port, GET + POST)
        assert b"200 OK" in await reader.readuntil(b"ok")
        await asyncio.sleep(0.5)
        writer.write(bytes(100))
        assert b"200 OK" in await reader.readuntil(b"ok")

    run(scenario)


def test_a_trickle_after_its_answer_is_closed(limits: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    limits()
    monkeypatch.setattr(connections, "LINGER_MAX_S", 0.5)

    async def scenario(port: int) -> None:
        reader, writer = await send(port, POST)
        assert b"200 OK" in await reader.readuntil(b"ok")
        end = asyncio.create_task(closed(reader))
        for _ in range(50):
            if end.done():
                break
            writer.write(b"x")
            await asyncio.sleep(0.1)
        assert await end

    run(scenario, early)


def ray_says(status: int, *, kind: bytes = b"text/plain", headers: tuple[tuple[bytes, bytes], ...] = ()) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        started = [(b"content-type", kind), (b"content-length", b"6"), *headers]
        await send({"type": "http.response.start", "status": status, "headers": started})
        await send({"type": "http.response.body", "body": b"secret"})

    return app


def call(app: ASGIApp, path: str = "/v1/models", headers: Any = ()) -> tuple[int, dict[bytes, bytes], bytes]:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "headers": list(headers), "method": "GET"}
    asyncio.run(RayAnswers(app)(scope, receive, send))  # type: ignore[arg-type]
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], dict(sent[0]["headers"]), body


@pytest.mark.parametrize(
    ("status", "path", "expected", "code"),
    [
        (404, "/v1/models", 503, "unavailable"),  # no application: starting, or shutting down
        (404, "/other", 404, "unknown_url"),
        (408, "/v1/models", 408, "timeout"),
        (429, "/v1/models", 429, "busy"),
        (500, "/v1/models", 500, "internal_error"),
        (503, "/v1/models", 503, "unavailable"),
    ],
)
def test_rays_errors_are_in_openais_format(status: int, path: str, expected: int, code: str) -> None:
    got, headers, body = call(ray_says(status), path)
    assert (got, json.loads(body)["error"]["code"]) == (expected, code)
    assert headers[b"content-type"] == b"application/json"
    assert headers[b"content-length"] == str(len(body)).encode()
    assert (b"retry-after" in headers) == (expected in (429, 503))


def test_rays_own_retry_after_is_kept_and_other_answers_pass() -> None:
    assert call(ray_says(429, headers=((b"retry-after", b"7"),)))[1][b"retry-after"] == b"7"
    assert call(ray_says(404, kind=b"application/json"))[2] == b"secret"
    assert call(ray_says(200))[2] == b"secret"
    assert call(ray_says(503), "/-/healthz")[2] == b"secret"


def test_headers_that_override_the_servers_timeouts_are_dropped() -> None:
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend(scope["headers"])
        await ray_says(200)(scope, receive, send)

    kept = (b"x-request-id", b"id-1")
    overrides = [(b"x-request-timeout-seconds", b"-1"), (b"x-request-disconnect-disabled", b"?1")]
    call(app, headers=[*overrides, kept, (b"x-request-id", b"x" * 500)])
    assert seen == [kept]
