"""Row group `prefix`: time to first token of the second question on a video against the first, through the engine.

Each pair has its own video. The second answer must equal that of an engine without a cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from timeviper_model.config import parse_transv_plan
from timeviper_model.inference.answer import SamplingParams
from timeviper_model.inference.engine import InferenceEngine
from timeviper_model.inference.memory import prefix_entry_bytes
from timeviper_model.inference.requests import EngineConfig, Request, Token
from timeviper_model.timeviper import TimeViper
from timeviper_platform.benchmarks.measure import Row
from timeviper_platform.benchmarks.model.models import (
    NUM_SYSTEM,
    TOKENS_PER_FRAME,
    iter_features,
    make_model,
    narrow_config,
    video_question,
)

COMMAND = "python jobs/benchmark.py model --only prefix"
NUM_ANSWER = 8
"""Answer tokens to compare."""
NUM_SECONDS = 5
"""Second questions per first one; they are 100 times faster and vary more."""
WIDTH = 512
"""Wide enough that Python overhead does not dominate."""
PLANS = (
    ("the paper's plan", "uni_7_0.5-attn_39_0.9", ">= 12.3"),
    ("its uniform site alone", "uni_7_0.5", ">= 100"),
)
"""Name, plan and bar. 12.3 is 85 % of the 14.5 x less work of blocks 39-55 on a tenth of the tokens."""


class Answer(NamedTuple):
    first_token_seconds: float
    ids: list[int]


def prefix_rows(*, width: int = WIDTH, num_frames: int = 1024, repeats: int = 5) -> list[Row]:
    """For both plans: speed-up of the second first token, and bytes of the cache entry."""
    rows = []
    for name, plan, bar in PLANS:
        model = make_model(narrow_config(width, plan=parse_transv_plan(plan)))
        rows += plan_rows(model, f"width {width}, {num_frames} frames, {name}", bar, num_frames, repeats)
    return rows


def answer_question(engine: InferenceEngine, num_frames: int, *, video: str, question: int) -> Answer:
    request = Request(
        prompt=video_question(num_frames, seed=question),
        vision_features=lambda: iter_features(num_frames),
        sampling=SamplingParams(max_new_tokens=NUM_ANSWER),
        prefix_key=video,
    )
    start, first, ids = time.perf_counter(), 0.0, []
    engine.submit(request)
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, Token):
                first = first or time.perf_counter() - start
                ids.append(event.id)
    return Answer(first, ids)


def make_engine(model: TimeViper, *, prefix_cache_bytes: int) -> InferenceEngine:
    config = EngineConfig(num_slots=1, max_prompt_tokens=2**20, prefix_cache_bytes=prefix_cache_bytes)
    engine = InferenceEngine(model, config)
    engine.end_token_ids = frozenset()  # every answer has full length
    return engine


def plan_rows(
    model: TimeViper,
    name: str,
    bar: str,
    num_frames: int,
    repeats: int,
    *,
    answer: Callable[..., Answer] = answer_question,
) -> list[Row]:
    """Rows of one plan; `answer` answers a question about a video.

    Raises:
        RuntimeError: if an answer from the cache differs from an uncached one.
    """
    engine = make_engine(model, prefix_cache_bytes=2**34)
    uncached = answer(make_engine(model, prefix_cache_bytes=0), num_frames, video="0", question=2)
    ratios = []
    for number in range(repeats):
        first = answer(engine, num_frames, video=f"{number}", question=1).first_token_seconds
        seconds = []
        for _ in range(NUM_SECONDS):
            second = answer(engine, num_frames, video=f"{number}", question=2)
            if second.ids != uncached.ids:
                raise RuntimeError(f"{name}: with the prefix cache the tokens are {second.ids}, without {uncached.ids}")
            seconds.append(second.first_token_seconds)
        ratios.append(first / statistics.median(seconds))
    stats = engine.stats()
    assert (stats.prefix_hits, stats.prefix_entries) == (NUM_SECONDS * repeats, repeats)
    num_vision = num_frames * TOKENS_PER_FRAME
    planned = prefix_entry_bytes(model.config, NUM_SYSTEM, num_vision, dtype=torch.float32)
    return [
        Row(
            name=f"second question's first token, times faster than the first's ({name}; {repeats} videos of"
            f" {min(ratios):.4g} to {max(ratios):.4g})",
            value=statistics.median(ratios),
            unit="x",
            bar=bar,
            command=COMMAND,
        ),
        Row(
            name=f"prefix entry, deviation from the planned bytes ({name})",
            value=100 * abs(stats.prefix_bytes / repeats / planned - 1),
            unit="%",
            bar="<= 5",
            command=COMMAND,
        ),
    ]
