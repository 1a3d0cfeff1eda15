"""The serving suite at toy sizes: its questions on a gateway without Ray, and one group on a Ray."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import uvicorn

from timeviper_model.config import TINY
from timeviper_platform.benchmarks.serving import first_token
from timeviper_platform.benchmarks.serving.endpoint import (
    ENCODE_BATCH_FRAMES,
    Endpoint,
    make_folders,
    serve_values,
)
from timeviper_platform.benchmarks.serving.failures import disconnect_rows
from timeviper_platform.benchmarks.serving.load import ask, question, with_session
from timeviper_platform.benchmarks.serving.suite import SERVING_GROUPS
from timeviper_platform.benchmarks.serving.throughput import LocalEngine
from timeviper_platform.benchmarks.video.clips import ClipSpec, make_clip
from timeviper_platform.cli.benchmark import SUITES
from timeviper_platform.common.config import parse_config
from timeviper_platform.serving.app import ServeConfig
from timeviper_platform.serving.engine.service import EngineService
from timeviper_platform.serving.features.service import FeatureService
from timeviper_platform.serving.gateway.routes import create_app
from timeviper_platform.serving.messages import FeatureReference, Refusal

NUM_FRAMES = 2 * ENCODE_BATCH_FRAMES


async def read(reference: FeatureReference) -> AsyncGenerator[np.ndarray | Refusal]:
    yield reference.ref


@contextmanager
def endpoint_without_ray(config: ServeConfig) -> Iterator[Endpoint]:
    """The application in a thread."""
    features = FeatureService(config.weights, config.features, lambda array: array)
    engine = EngineService(config.weights, config.engine, read)
    server = uvicorn.Server(
        uvicorn.Config(create_app(config.gateway, features, engine), port=0, log_level="warning")  # type: ignore[arg-type]
    )

    async def run() -> None:
        await server.serve()
        await features.close()  # in the loop that starts its children

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    try:
        yield Endpoint(url=f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}")
    finally:
        server.should_exit = True
        thread.join(20)
        engine.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serving")


def test_the_second_questions_of_uploads_and_stored_media_are_compared_with_cold_ones(folder: Path) -> None:
    folders = make_folders(folder, TINY, media={"film": NUM_FRAMES})
    values = serve_values(folders, engine={"engine": {"num_slots": 2, "prefix_cache_bytes": 2**26}})
    clip = folder / "clip.mp4"
    make_clip(clip, ClipSpec(seconds=NUM_FRAMES, fps=1, width=64, height=64))
    with endpoint_without_ray(parse_config(ServeConfig, values)) as endpoint:
        ratios = [
            first_token._pair(endpoint, first_token._new_file(clip, 0), first_token._new_file(clip, 1)),
            first_token._pair(endpoint, "feature://film", None),
        ]
        body = question("Question 0?", max_tokens=6)
        answers = with_session(lambda session: asyncio.gather(*(ask(session, endpoint, body) for _ in range(2))))  # type: ignore[arg-type,return-value]
        wrong = with_session(lambda session: ask(session, endpoint, question("?", "feature://none", max_tokens=1)))
    assert all(ratio > 0 for ratio in ratios)
    for answer in answers:  # type: ignore[attr-defined]
        assert (answer.status, answer.num_tokens, len(answer.tokens), answer.error) == (200, 6, 6, "")
        assert 0 < answer.first_seconds <= answer.seconds
    assert (wrong.status, wrong.error, wrong.is_whole) == (404, "media_not_found", False)
    LocalEngine(folders).run(2, 6)  # takes the same weights


def test_the_suite_has_a_group_for_every_bar() -> None:
    assert list(SUITES["serving"]()) == list(SERVING_GROUPS)
    assert set(SERVING_GROUPS) >= {
        "throughput",
        "haproxy",
        "edge",
        "first",
        "second",
        "overload",
        "kill",
        "disconnect",
        "film",
    }


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_a_group_starts_and_ends_a_ray_of_its_own() -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    (row,) = disconnect_rows(repeats=1, num_tokens=64)
    assert row.value > 0
    left: list[Any] = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
    assert not [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
