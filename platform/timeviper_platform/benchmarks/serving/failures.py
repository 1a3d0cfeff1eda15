"""Row groups `kill` and `disconnect`: an engine replica that dies under load, and clients that leave."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import aiohttp

from timeviper_platform.benchmarks.measure import Row
from timeviper_platform.benchmarks.serving.endpoint import (
    ENGINE,
    Endpoint,
    make_folders,
    serve_values,
    serving_endpoint,
)
from timeviper_platform.benchmarks.serving.load import HttpAnswer, ask, question, with_session

NUM_TOKENS = 512


def kill_rows(*, num_streams: int = 32, num_tokens: int = NUM_TOKENS) -> list[Row]:
    command = "python jobs/benchmark.py serving --only kill"
    with tempfile.TemporaryDirectory(prefix="timeviper-serving-") as folder:
        folders = make_folders(Path(folder), media={})
        two = {"min_replicas": 2, "max_replicas": 2}
        values = serve_values(
            folders, engine={"engine": {"num_slots": 8}}, deployments={"engine": {"autoscaling": two}}
        )
        with serving_endpoint(values) as endpoint:
            answers, num_started, next_s = with_session(
                lambda session: _kill_one(session, endpoint, num_streams, num_tokens)
            )
    broken = [answer for answer in answers if not answer.is_whole]
    unstarted = [answer for answer in broken if not answer.tokens]
    return [
        Row(
            name=f"questions without a token that fail when one of two engine replicas is killed ({num_streams} asked,"
            f" {num_started} had started, {len(broken) - len(unstarted)} of those ended in an error event)",
            value=float(len(unstarted)),
            unit="",
            bar="<= 0",
            command=command,
        ),
        Row(name="the next answer after the kill", value=next_s, unit="s", bar="<= 20", command=command),
    ]


async def _kill_one(
    session: aiohttp.ClientSession, endpoint: Endpoint, num_streams: int, num_tokens: int
) -> tuple[list[HttpAnswer], int, float]:
    started: set[int] = set()

    async def stream(number: int) -> HttpAnswer:
        body = question(f"Question {number}?", max_tokens=num_tokens)
        return await ask(
            session, endpoint, body, on_tokens=lambda answer: started.add(number) if answer.tokens else None
        )

    streams = [asyncio.create_task(stream(number)) for number in range(num_streams)]
    while len(started) < num_streams // 4:
        await asyncio.sleep(0.01)
    victim = (await asyncio.to_thread(endpoint.replicas, ENGINE))[0]
    num_started, killed = len(started), time.perf_counter()
    victim.kill()
    while True:
        if (await ask(session, endpoint, question("Next?", max_tokens=1))).is_whole:
            break
        await asyncio.sleep(0.2)
    next_s = time.perf_counter() - killed
    return list(await asyncio.gather(*streams)), num_started, next_s


def disconnect_rows(*, repeats: int = 10, num_tokens: int = NUM_TOKENS) -> list[Row]:
    command = "python jobs/benchmark.py serving --only disconnect"
    with tempfile.TemporaryDirectory(prefix="timeviper-serving-") as folder:
        folders = make_folders(Path(folder), media={})
        with serving_endpoint(serve_values(folders, engine={"engine": {"num_slots": 1}})) as endpoint:
            idle, after = with_session(lambda session: _disconnect(session, endpoint, repeats, num_tokens))
    return [
        Row(
            name="first token of a waiting question after the slot's client has left, over that on an idle endpoint"
            f" (one slot; {1000 * statistics.median(idle):.0f} ms idle)",
            value=statistics.median(after) / statistics.median(idle),
            unit="",
            bar="<= 2",
            command=command,
        )
    ]


async def _disconnect(
    session: aiohttp.ClientSession, endpoint: Endpoint, repeats: int, num_tokens: int
) -> tuple[list[float], list[float]]:
    """Returns first-token seconds of a question: alone, and from the moment another client leaves."""
    idle, after = [], []
    for number in range(repeats + 1):
        idle.append((await ask(session, endpoint, question("Alone?", max_tokens=1))).first_seconds)
        running = asyncio.Event()
        body = question(f"Long {number}?", max_tokens=num_tokens)
        first = asyncio.create_task(ask(session, endpoint, body, on_tokens=lambda _, event=running: event.set()))  # type: ignore[misc]
        await running.wait()
        waiting = asyncio.create_task(ask(session, endpoint, question("Waiting?", max_tokens=1)))
        await asyncio.sleep(0.05)
        left = time.perf_counter()
        first.cancel()
        await asyncio.wait({first})
        await waiting
        after.append(time.perf_counter() - left)
    return idle[1:], after[1:]
