"""Row group `prefill`: memory and time of long videos, savings of TransV, and speed-up over an all-attention model.

Long prefills run in their own process. The peak is that of resident memory beyond the model and a short prefill.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from timeviper_model.analysis.transformer_twin import attention_weights, mamba_weights, transformer_twin
from timeviper_model.config import PATTERN_LETTERS, HybridConfig, TimeViperConfig
from timeviper_model.inference.chunked_transv import plan_sites
from timeviper_model.inference.prefill import Prefill
from timeviper_model.ops.ssd import chunk_length
from timeviper_model.timeviper import TimeViper
from timeviper_platform.benchmarks.measure import Row, peak_resident_bytes, reset_peak, resident_bytes
from timeviper_platform.benchmarks.model.models import (
    NUM_QUESTION,
    NUM_SYSTEM,
    TOKENS_PER_FRAME,
    iter_features,
    make_model,
    narrow_config,
    video_question,
)

COMMAND = "python jobs/benchmark.py model --only prefill"
WARM_UP_FRAMES = 200
"""More than one chunk per layer range, so that all chunk buffers exist before the peak is reset."""


class PrefillRun(NamedTuple):
    peak_bytes: int
    """Resident memory beyond the model."""
    seconds: float
    block_seconds: dict[str, float]
    """Seconds by kind of block: mamba, mlp, attention."""

    @property
    def linear_seconds(self) -> float:
        return self.block_seconds["mamba"] + self.block_seconds["mlp"]


def prefill_rows(
    *,
    width: int = 128,
    frames: tuple[int, int] = (1000, 10000),
    transv_frames: int = 500,
    repeats: int = 5,
    run: Callable[[TimeViperConfig, int], PrefillRun] | None = None,
) -> list[Row]:
    """Long against short prefills and one control by `run` (a process each), and TransV in this process.

    The control takes minutes for the long video, nearly all in attention.
    """
    run = run or run_apart
    label = f"width {width}, 56 blocks, the paper's plan"
    config = narrow_config(width)
    short, long = frames
    runs = [[run(config, count) for count in frames] for _ in range(3)]
    by_side = list(zip(*runs, strict=True))
    peaks, linear, seconds = (
        [statistics.median(getattr(one, name) for one in side) for side in by_side]
        for name in ("peak_bytes", "linear_seconds", "seconds")
    )
    attention = [statistics.median(one.block_seconds["attention"] for one in side) for side in by_side]
    growth = math.log(long / short)
    return [
        _row(f"prefill of {long} frames ({label})", seconds[1], "s", None),
        _row(
            f"prefill of {long} frames: peak memory over {long / short:g} times that of {short} ({label})",
            peaks[1] / (peaks[0] * long / short),
            "x",
            "<= 1.15",
        ),
        _row(
            f"exponent of the Mamba and MLP blocks' time, {short} to {long} frames ({label})",
            math.log(linear[1] / linear[0]) / growth,
            "",
            "<= 1.05",
        ),
        _row(f"attention blocks' share of the time at {long} frames ({label})", attention[1] / seconds[1], "", None),
        _row(f"attention blocks' share of the time at {short} frames ({label})", attention[0] / seconds[0], "", None),
        *_control_rows(config, long, seconds[1], run),
        *_transv_rows(width, transv_frames, repeats),
    ]


def run_apart(config: TimeViperConfig, num_frames: int) -> PrefillRun:
    """One prefill in its own process, with as many threads as here."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_run_in_process, config, num_frames, torch.get_num_threads()).result()


def run_prefill(model: TimeViper, num_frames: int) -> PrefillRun:
    prompt = video_question(num_frames)
    ids, kinds = torch.tensor(prompt.input_ids), torch.tensor(prompt.token_kind)
    with torch.inference_mode(), timed_blocks(model) as block_seconds:
        cache = model.new_cache(1, device="cpu", dtype=torch.float32)
        reset_peak()
        before, start = resident_bytes(), time.perf_counter()
        reading = Prefill(model, ids, kinds, lambda: iter_features(num_frames), cache, 0)
        while reading.advance() is None:
            pass
        seconds = time.perf_counter() - start
        return PrefillRun(peak_resident_bytes() - before, seconds, dict(block_seconds))


@contextmanager
def timed_blocks(model: TimeViper) -> Iterator[dict[str, float]]:
    """Seconds in the forward of each kind of block, by hooks."""
    seconds: dict[str, float] = dict.fromkeys(PATTERN_LETTERS.values(), 0.0)
    started: dict[Any, float] = defaultdict(float)

    def start(block: Any, _: object) -> None:
        started[block] = time.perf_counter()

    def stop(kind: str, block: Any) -> None:
        seconds[kind] += time.perf_counter() - started[block]

    handles = []
    for layer, kind in enumerate(model.config.text.block_types):
        block: Any = model.backbone.block(layer)
        handles.append(block.register_forward_pre_hook(start))
        handles.append(block.register_forward_hook(lambda block, _, __, kind=kind: stop(kind, block)))
    yield seconds
    for handle in handles:
        handle.remove()


def count_flops(config: TimeViperConfig, num_frames: int) -> float:
    """FLOPs of the blocks in the prefill of a question about a video, by formula.

    Counts two operations per weight and token, and the unmasked half of causal attention and of the quadratic form
    within scan chunks; scan states (arXiv 2405.21060, section 6) are written and read once.
    """
    text, present = config.text, num_frames * TOKENS_PER_FRAME
    assert isinstance(text, HybridConfig)
    plans = plan_sites(config, present)
    query_size, inner, state = (
        text.num_attention_heads * text.head_dim,
        text.mamba_intermediate_size,
        text.ssm_state_size,
    )
    total = 0.0
    for layer, kind in enumerate(text.block_types):
        present = plans[layer].num_kept if layer in plans else present
        tokens = NUM_SYSTEM + NUM_QUESTION + present
        if kind == "mlp":
            total += tokens * 4 * text.hidden_size * text.intermediate_size
        elif kind == "attention":
            total += tokens * (2 * attention_weights(text) + 2 * tokens * query_size)
        else:
            chunk = chunk_length(text.chunk_size, state, torch.device("cpu"))
            within = chunk * (text.n_groups * state + inner)
            total += tokens * (2 * mamba_weights(text) + within + 4 * inner * state)
    return total


def _transv_rows(width: int, num_frames: int, repeats: int) -> list[Row]:
    with_plan, without = make_model(narrow_config(width)), make_model(narrow_config(width, plan=()))
    run_prefill(with_plan, num_frames)
    pairs = [[run_prefill(model, num_frames).linear_seconds for model in (with_plan, without)] for _ in range(repeats)]
    ours, control = (statistics.median(pair[side] for pair in pairs) for side in (0, 1))
    name = f"Mamba and MLP blocks' time without TransV over with the paper's plan (width {width}, {num_frames} frames)"
    return [_row(name, control / ours, "x", ">= 2.04")]


def _control_rows(
    config: TimeViperConfig, num_frames: int, seconds: float, run: Callable[[TimeViperConfig, int], PrefillRun]
) -> list[Row]:
    """Measured and counted speed-up over attention everywhere, under the same plan."""
    control = transformer_twin(config)
    measured = run(control, num_frames).seconds / seconds
    promised = count_flops(control, num_frames) / count_flops(config, num_frames)
    name = f"width {config.text.hidden_size}, {num_frames} frames, the paper's plan in both; one pass of the control"
    return [
        _row(f"prefill, times faster than the all-attention control ({name})", measured, "x", None),
        _row(f"the same by counted operations ({name})", promised, "x", None),
        _row(f"share of the counted speed-up that is measured ({name})", measured / promised, "", ">= 0.7"),
    ]


def _run_in_process(config: TimeViperConfig, num_frames: int, num_threads: int) -> PrefillRun:
    torch.set_num_threads(num_threads)
    model = make_model(config)
    run_prefill(model, min(WARM_UP_FRAMES, num_frames))
    return run_prefill(model, num_frames)


def _row(name: str, value: float, unit: str, bar: str | None) -> Row:
    return Row(name=name, value=value, unit=unit, bar=bar, command=COMMAND)
