"""Row group `edge`: a body of 16 MiB of wrong list items; its refusal, other clients meanwhile, and memory."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import aiohttp
import psutil

from timeviper_platform.benchmarks.measure import Row
from timeviper_platform.benchmarks.serving.endpoint import (
    MODEL,
    Endpoint,
    make_folders,
    serve_values,
    serving_endpoint,
)
from timeviper_platform.benchmarks.serving.load import with_session

COMMAND = "python jobs/benchmark.py serving --only edge"
POLL_S = 0.01


def edge_rows(*, num_bytes: int = 16 << 20, repeats: int = 5) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="timeviper-serving-") as folder:
        values = serve_values(make_folders(Path(folder), media={}), gateway={"max_request_bytes": 2 * num_bytes})
        with serving_endpoint(values) as endpoint:
            gateway = endpoint.replicas("gateway")[0]
            seconds, live_seconds, grown = with_session(
                lambda session: _refusals(session, endpoint, gateway, num_bytes, repeats)
            )
    size = f"{num_bytes >> 20} MiB of wrong list items"
    return [
        Row(name=f"{size}: until 400", value=seconds, unit="s", bar="<= 0.3", command=COMMAND),
        Row(name="the slowest /health/live meanwhile", value=live_seconds, unit="s", bar="<= 0.1", command=COMMAND),
        Row(name="the gateway's memory, growth", value=grown / 1e6, unit="MB", bar="<= 100", command=COMMAND),
    ]


async def _refusals(
    session: aiohttp.ClientSession, endpoint: Endpoint, gateway: psutil.Process, num_bytes: int, repeats: int
) -> tuple[float, float, int]:
    """Returns the median time to a refusal, the slowest answer of another client, and the gateway's growth in bytes."""
    head, tail = f'{{"model":"{MODEL}","messages":[{{"role":"user","content":[0'.encode(), b"]}]}"
    body = head + b",0" * ((num_bytes - len(head) - len(tail)) // 2) + tail
    slowest, most = 0.0, 0
    is_done = asyncio.Event()

    async def watch() -> None:
        nonlocal slowest, most
        while not is_done.is_set():
            start = time.perf_counter()
            async with session.get(f"{endpoint.url}/health/live") as response:
                response.raise_for_status()
            slowest, most = max(slowest, time.perf_counter() - start), max(most, gateway.memory_info().rss)
            await asyncio.sleep(POLL_S)

    await _refused(session, endpoint, body[: len(head)] + tail)  # imports
    before, seconds = gateway.memory_info().rss, []
    watching = asyncio.create_task(watch())
    for _ in range(repeats):
        seconds.append(await _refused(session, endpoint, body))
    is_done.set()
    await watching
    return statistics.median(seconds), slowest, most - before


async def _refused(session: aiohttp.ClientSession, endpoint: Endpoint, body: bytes) -> float:
    """Returns the seconds until 400; raises RuntimeError for another answer."""
    start = time.perf_counter()
    headers = {"content-type": "application/json"}
    async with session.post(f"{endpoint.url}/v1/chat/completions", data=body, headers=headers) as response:
        text = await response.text()
    if response.status != 400:
        raise RuntimeError(f"a body of {len(body)} bytes got {response.status}: {text[:200]}")
    return time.perf_counter() - start
