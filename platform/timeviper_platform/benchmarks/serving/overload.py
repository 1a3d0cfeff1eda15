"""Row group `overload`: five times the load that the endpoint can take, and how replicas follow it."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

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

COMMAND = "python jobs/benchmark.py serving --only overload"
NUM_SLOTS, NUM_QUEUED, NUM_WAITING = 8, 32, 256
"""Default slots, queue, and requests waiting for a replica."""
FACTOR = 5.0
MEMORY_AT = 1 / 3
"""Share of the load after which memory is compared with that at its end."""
SCALING = {"max_replicas": 2, "metrics_interval_s": 0.5, "look_back_period_s": 2.0, "upscale_delay_s": 1.0}


class Load(NamedTuple):
    answers: list[HttpAnswer]
    memory: tuple[int, int]
    """Bytes of the first replicas, early and late."""
    second_replica_s: float
    back_s: float


def overload_rows(*, seconds: float = 60.0, num_tokens: int = 64) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="timeviper-serving-") as folder:
        folders = make_folders(Path(folder), media={})
        values = serve_values(
            folders,
            engine={"engine": {"num_slots": NUM_SLOTS, "max_queued_requests": NUM_QUEUED}},
            deployments={"engine": {"autoscaling": {**SCALING, "downscale_delay_s": 3.0}}},
        )
        with serving_endpoint(values) as endpoint:
            rate = with_session(lambda session: _capacity(session, endpoint, num_tokens))
            load = with_session(lambda session: _overload(session, endpoint, FACTOR * rate, seconds, num_tokens))
    accepted = sorted(answer.seconds for answer in load.answers if answer.is_whole)
    refused = [answer for answer in load.answers if answer.status == 429]
    refusal_s = _percentile(sorted(answer.seconds for answer in refused), 0.5)
    errors = [answer for answer in load.answers if not answer.is_whole and answer.status != 429]
    kinds = Counter(f"{answer.status} {answer.error}" for answer in errors)
    kinds_text = f" ({', '.join(f'{count} of {kind}' for kind, count in sorted(kinds.items()))})" if kinds else ""
    bound = (NUM_SLOTS + NUM_QUEUED + NUM_WAITING + 1) / rate
    offered = f"{FACTOR:g} x {rate:.1f} requests/s for {seconds:.0f} s"
    values_of: list[tuple[str, float, str, str | None]] = [
        (
            f"accepted p99 over (queue + 1) x service time, {offered} ({len(accepted)} accepted, p99"
            f" {_percentile(accepted, 0.99):.1f} s)",
            _percentile(accepted, 0.99) / bound,
            "",
            "<= 1",
        ),
        (
            "refused without 429 and Retry-After",
            float(sum(not answer.has_retry_after for answer in refused)),
            "",
            "<= 0",
        ),
        ("until a refusal arrives, median", refusal_s, "s", None),
        (f"other failures beside {len(refused)} of 429{kinds_text}", float(len(errors)), "", "<= 0"),
        ("memory of the replicas, end over a third of the load", load.memory[1] / load.memory[0], "", "<= 1.1"),
        ("a second engine replica answers after the load began", load.second_replica_s, "s", "<= 15"),
        ("one engine replica again after the last answer", load.back_s, "s", "<= 30"),
    ]
    return [Row(name=name, value=value, unit=unit, bar=bar, command=COMMAND) for name, value, unit, bar in values_of]


async def _capacity(session: aiohttp.ClientSession, endpoint: Endpoint, num_tokens: int) -> float:
    """Answers per second with every slot taken, over three rounds."""
    rates = []
    for number in range(3):
        start = time.perf_counter()
        bodies = [question(f"Round {number}, {slot}?", max_tokens=num_tokens) for slot in range(NUM_SLOTS)]
        await asyncio.gather(*(ask(session, endpoint, body) for body in bodies))
        rates.append(NUM_SLOTS / (time.perf_counter() - start))
    return statistics.median(rates)


async def _overload(
    session: aiohttp.ClientSession, endpoint: Endpoint, rate: float, seconds: float, num_tokens: int
) -> Load:
    start = time.perf_counter()
    tasks: list[asyncio.Task[HttpAnswer]] = []
    early = second = 0.0
    watching = asyncio.create_task(_watch(endpoint, 2))
    for number in itertools.count():
        due = number / rate
        if due >= seconds:
            break
        await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(session, endpoint, question(f"Load {number}?", max_tokens=num_tokens))))
        if not early and due >= MEMORY_AT * seconds:
            early = float(await asyncio.to_thread(endpoint.resident_bytes))
    late = await asyncio.to_thread(endpoint.resident_bytes)
    answers = await asyncio.gather(*tasks)
    second = await watching - start
    last = time.perf_counter()
    back = await _watch(endpoint, 1) - last
    return Load(list(answers), (int(early), late), second, back)


async def _watch(endpoint: Endpoint, count: int, timeout_s: float = 180.0) -> float:
    deadline = time.perf_counter() + timeout_s
    while time.perf_counter() < deadline:
        if len(await asyncio.to_thread(endpoint.replicas, ENGINE)) == count:
            return time.perf_counter()
        await asyncio.sleep(0.5)
    return float("inf")


def _percentile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("inf")
