"""HTTP clients on aiohttp: one question, and many at once."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

from timeviper_platform.benchmarks.serving.endpoint import MODEL, Endpoint

T = TypeVar("T")
TIMEOUT_S = 1800.0


@dataclass(slots=True)
class HttpAnswer:
    status: int = 0
    """0 when the connection failed."""
    first_seconds: float = 0.0
    """Until the first token; 0 without any."""
    seconds: float = 0.0
    num_tokens: int = 0
    tokens: list[str] = field(default_factory=list)
    cached_tokens: int = 0
    error: str = ""
    """Code of an error event or body."""
    has_retry_after: bool = False

    @property
    def is_whole(self) -> bool:
        return self.status == 200 and not self.error


def question(text: str, url: str | None = None, *, max_tokens: int, **values: Any) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "video_url", "video_url": {"url": url}}] if url else []
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    return {
        "model": MODEL,
        "messages": messages,
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,  # random weights give tokens without text, which would otherwise send nothing
        **values,
    }


def with_session(run: Callable[[aiohttp.ClientSession], Coroutine[Any, Any, T]]) -> T:
    async def main() -> T:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            return await run(session)

    return asyncio.run(main())


async def ask(
    session: aiohttp.ClientSession,
    endpoint: Endpoint,
    body: dict[str, Any],
    *,
    on_tokens: Callable[[HttpAnswer], None] | None = None,
) -> HttpAnswer:
    """Streams an answer. `on_tokens` is called after each event with the answer so far."""
    answer, start = HttpAnswer(), time.perf_counter()
    try:
        async with session.post(f"{endpoint.url}/v1/chat/completions", json=body) as response:
            answer.status = response.status
            answer.has_retry_after = "Retry-After" in response.headers
            if response.status != 200:
                answer.error = (await response.json())["error"]["code"] or ""
            else:
                async for line in response.content:
                    if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                        continue
                    _add(answer, json.loads(line[6:]), time.perf_counter() - start)
                    if on_tokens is not None:
                        on_tokens(answer)
    except (aiohttp.ClientError, ConnectionError) as error:
        answer.error = type(error).__name__
    answer.seconds = time.perf_counter() - start
    return answer


def _add(answer: HttpAnswer, event: dict[str, Any], seconds: float) -> None:
    if "error" in event:
        answer.error = event["error"]["code"] or "error"
    for choice in event.get("choices", []):
        answer.tokens += [entry["token"] for entry in (choice.get("logprobs") or {}).get("content") or []]
    if answer.tokens:
        answer.first_seconds = answer.first_seconds or seconds
    if event.get("usage"):
        answer.num_tokens = event["usage"]["completion_tokens"]
        answer.cached_tokens = event["usage"]["prompt_tokens_details"]["cached_tokens"]


async def upload(session: aiohttp.ClientSession, endpoint: Endpoint, path: Path) -> str:
    with path.open("rb") as file:
        form = aiohttp.FormData({"purpose": "vision"})
        form.add_field("file", file, filename=path.name, content_type="video/mp4")
        async with session.post(f"{endpoint.url}/v1/files", data=form) as response:
            response.raise_for_status()
            return str((await response.json())["id"])
