"""Row groups about HTTP itself.

throughput   tokens per second over those of the engine in process, and the time that HTTP adds to a request
haproxy      the same behind HAProxy with Ray Serve's throughput mode
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import torch

from timeviper_model.batching.prompt import Turn, build_sample
from timeviper_model.inference.answer import SamplingParams
from timeviper_model.inference.engine import InferenceEngine
from timeviper_model.inference.requests import EngineConfig, Request
from timeviper_model.weights.weights_folder import from_pretrained, load_tokenizer
from timeviper_platform.benchmarks.measure import Row, compare
from timeviper_platform.benchmarks.serving.endpoint import (
    NUM_SLOTS,
    Endpoint,
    ServingFolders,
    make_folders,
    serve_values,
    serving_endpoint,
)
from timeviper_platform.benchmarks.serving.load import ask, question, with_session

COMMAND = "python jobs/benchmark.py serving --only throughput"
HAPROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}


def throughput_rows(*, num_tokens: int = 256, repeats: int = 5, num_single: int = 100) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="timeviper-serving-") as folder:
        folders = make_folders(Path(folder), media={})
        engine = LocalEngine(folders)
        with serving_endpoint(serve_values(folders)) as endpoint:
            found = compare(
                lambda: over_http(endpoint, num_tokens), lambda: engine.run(NUM_SLOTS, num_tokens), repeats=repeats
            )
            added = single_seconds(endpoint, num_single) - engine.single_seconds(num_single)
    return [
        Row(
            name=f"tokens/s over HTTP over those of the engine in process, {NUM_SLOTS} streams of {num_tokens} tokens"
            f" (spread {found.noise:.0%})",
            value=found.speedup,
            unit="",
            bar=">= 0.89",
            command=COMMAND,
        ),
        Row(name="p50 that HTTP adds to a request of one token", value=1000 * added, unit="ms", command=COMMAND),
    ]


def haproxy_rows(*, num_tokens: int = 256, repeats: int = 5, num_single: int = 40) -> list[Row]:
    """The application behind HAProxy against the same behind Ray's proxy, in turn, then alone against the engine."""
    command = "python jobs/benchmark.py serving --only haproxy"
    with tempfile.TemporaryDirectory(prefix="timeviper-serving-") as folder:
        folders = make_folders(Path(folder), media={})
        values = serve_values(folders, gateway={"allow_anonymous": True})
        engine = LocalEngine(folders)
        with serving_endpoint(values, environment=HAPROXY) as haproxy:

            def ours() -> None:
                over_http(haproxy, num_tokens)

            with serving_endpoint(values) as proxy:
                turns = [
                    [single_seconds(haproxy, num_single), single_seconds(proxy, num_single)] for _ in range(repeats)
                ]
                over_proxy = compare(ours, lambda: over_http(proxy, num_tokens), repeats=repeats)
            over_engine = compare(ours, lambda: engine.run(NUM_SLOTS, num_tokens), repeats=repeats)
        alone = engine.single_seconds(num_single)
    through_haproxy, through_proxy = (
        1000 * (statistics.median(seconds) - alone) for seconds in zip(*turns, strict=True)
    )
    load = f"{NUM_SLOTS} streams of {num_tokens} tokens"
    return [
        Row(
            name=f"tokens/s behind HAProxy in throughput mode over those of the engine in process, {load}"
            f" (spread {over_engine.noise:.0%})",
            value=over_engine.speedup,
            unit="",
            bar=">= 0.89",
            command=command,
        ),
        Row(
            name=f"the same over those behind Ray's own proxy (spread {over_proxy.noise:.0%})",
            value=over_proxy.speedup,
            unit="x",
            command=command,
        ),
        Row(
            name="p50 that HTTP adds to a request of one token, behind HAProxy in throughput mode",
            value=through_haproxy,
            unit="ms",
            command=command,
        ),
        Row(name="the same in turn behind Ray's own proxy", value=through_proxy, unit="ms", command=command),
    ]


class LocalEngine:
    """The engine of the endpoint, in this process, on one thread."""

    def __init__(self, folders: ServingFolders) -> None:
        self._tokenizer = load_tokenizer(folders.weights)
        self._engine = InferenceEngine(
            from_pretrained(folders.weights).eval(), EngineConfig(num_slots=NUM_SLOTS), tokenizer=self._tokenizer
        )

    def run(self, num_requests: int, num_tokens: int) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for number in range(num_requests):
                sample = build_sample(
                    self._tokenizer, [Turn(role="user", text=f"Question {number}?")], [], add_generation_prompt=True
                )
                sampling = SamplingParams(max_new_tokens=num_tokens, num_logprobs=0)
                features = torch.zeros(0, self._engine.feature_size)
                self._engine.submit(Request(prompt=sample, vision_features=features, sampling=sampling))
            while self._engine.has_work:
                self._engine.step()
        finally:
            torch.set_num_threads(threads)

    def single_seconds(self, count: int) -> float:
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            self.run(1, 1)
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)


def over_http(endpoint: Endpoint, num_tokens: int) -> None:
    """Raises RuntimeError if an answer is not whole."""

    async def run(session: object) -> list[int]:
        answers = await asyncio.gather(
            *(
                ask(session, endpoint, question(f"Question {number}?", max_tokens=num_tokens))  # type: ignore[arg-type]
                for number in range(NUM_SLOTS)
            )
        )
        return [answer.num_tokens for answer in answers]

    counts = with_session(run)
    if set(counts) != {num_tokens}:
        raise RuntimeError(f"answers of {sorted(set(counts))} tokens instead of {num_tokens}; see the endpoint's log")


def single_seconds(endpoint: Endpoint, count: int) -> float:
    async def run(session: object) -> float:
        body = question("Question 0?", max_tokens=1)
        return statistics.median([(await ask(session, endpoint, body)).seconds for _ in range(count)])  # type: ignore[arg-type]

    return with_session(run)
