"""Row group `film`: a stored video of 10,000 frames, answered over HTTP by narrow weights with the blocks of the 9B."""

from __future__ import annotations

import tempfile
from pathlib import Path

from timeviper_platform.benchmarks.measure import Row
from timeviper_platform.benchmarks.model.models import narrow_config
from timeviper_platform.benchmarks.serving.endpoint import (
    ENGINE,
    Endpoint,
    make_folders,
    serve_values,
    serving_endpoint,
)
from timeviper_platform.benchmarks.serving.load import HttpAnswer, ask, question, with_session

COMMAND = "python jobs/benchmark.py serving --only film"


def film_rows(*, num_frames: int = 10_000, width: int = 64) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="timeviper-serving-") as folder:
        folders = make_folders(Path(folder), narrow_config(width), media={"film": num_frames})
        engine = {"engine": {"num_slots": 1, "prefix_cache_bytes": 2**31}}
        with serving_endpoint(serve_values(folders, engine=engine)) as endpoint:
            before = endpoint.replicas(ENGINE)[0].memory_info().rss
            first, second = (_asked(endpoint, text) for text in ("What happens?", "When does it rain?"))
            grown = endpoint.replicas(ENGINE)[0].memory_info().rss - before
    name = f"stored video of {num_frames} frames, width {width}, 56 blocks"
    return [
        Row(name=f"first token, {name}", value=first.first_seconds, unit="s", command=COMMAND),
        Row(name=f"first token of the second question, {name}", value=second.first_seconds, unit="s", command=COMMAND),
        Row(name=f"memory that the engine has grown by, {name}", value=grown / 2**20, unit="MiB", command=COMMAND),
    ]


def _asked(endpoint: Endpoint, text: str) -> HttpAnswer:
    body = question(text, "feature://film", max_tokens=8)
    answer = with_session(lambda session: ask(session, endpoint, body))
    if not answer.is_whole:
        raise RuntimeError(f"the question ended with {answer.status} {answer.error}")
    return answer
