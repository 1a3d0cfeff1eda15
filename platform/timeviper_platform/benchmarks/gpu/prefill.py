"""Row group `prefill`: seconds and memory of long videos in the shape of the 9B, with and without TransV.

Each prompt is read with logits of its last position, as in the engine, and of all positions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from timeviper_model.analysis.dropping import with_plan
from timeviper_model.batching.batch import Sample
from timeviper_model.config import PRESETS, TimeViperConfig
from timeviper_model.inference.prefill import Prefill
from timeviper_model.timeviper import TimeViper
from timeviper_platform.benchmarks.gpu.device import (
    Measurement,
    free_memory,
    iter_features,
    make_model,
    make_row,
    measure,
    peak_bytes,
)
from timeviper_platform.benchmarks.measure import Row
from timeviper_platform.benchmarks.model.models import video_question

logger = logging.getLogger(__name__)


def prefill_rows(
    device: torch.device,
    *,
    config: TimeViperConfig = PRESETS["9b"],
    frames: tuple[int, ...] = (256, 1024, 10000),
    repeats: int = 3,
    read: Callable[..., object] | None = None,
) -> list[Row]:
    """Seconds and peak memory by frames, plan and logits. `read` replaces `read_prompt`."""
    read = read or read_prompt
    model, words = make_model(config, device)
    models = {"the paper's plan": model, "no TransV": with_plan(model, ())}
    rows: list[Row] = []
    for number, num_frames in enumerate(frames):
        seconds: list[float] = []
        for plan, planned in models.items():
            for logits in ("the last position", "all positions"):
                name = f"prefill of {num_frames} frames, {plan}, logits of {logits} ({words})"
                taken = _measured(
                    planned,
                    num_frames,
                    device,
                    all_logits=logits != "the last position",
                    repeats=repeats,
                    warm_up=not number,
                    read=read,
                )
                rows += _rows(name, taken)
                if isinstance(taken, Measurement) and logits == "the last position":
                    seconds.append(taken.seconds)
        if len(seconds) == 2:
            ratio = seconds[1] / seconds[0]
            rows.append(make_row("prefill", f"prefill of {num_frames} frames, times faster with TransV", ratio, "x"))
    return rows


@torch.inference_mode()
def read_prompt(
    model: TimeViper, prompt: Sample, num_frames: int, device: torch.device, *, all_logits: bool = False
) -> Tensor:
    """Logits (V,) after the prompt, or (T', V) of all positions that remain."""
    cache = model.new_cache(1, device=device, dtype=model.lm_head.weight.dtype)
    ids = torch.tensor(prompt.input_ids, device=device)
    kinds = torch.tensor(prompt.token_kind, dtype=torch.int8, device=device)
    chunks: list[Tensor] = []
    last: Any = model.backbone.block(model.config.text.num_hidden_layers - 1)
    handle = last.register_forward_hook(lambda _, __, hidden_TD: chunks.append(hidden_TD)) if all_logits else None
    try:
        features = partial(iter_features, model.config, num_frames, device)
        reading = Prefill(model, ids, kinds, features, cache, 0, all_tokens=all_logits)
        while (logits := reading.advance()) is None:
            pass
    finally:
        if handle is not None:
            handle.remove()
    return model.logits(torch.cat(chunks)) if all_logits else logits


def _measured(
    model: TimeViper,
    num_frames: int,
    device: torch.device,
    *,
    all_logits: bool,
    repeats: int,
    warm_up: bool,
    read: Callable[..., object],
) -> Measurement | int:
    """Measurement of a prefill, or the bytes in use when memory ran out."""
    prompt = video_question(num_frames)
    free_memory(device)
    try:
        return measure(
            lambda: read(model, prompt, num_frames, device, all_logits=all_logits),
            device,
            repeats=repeats,
            warm_up=warm_up,
        )
    except torch.OutOfMemoryError as error:
        logger.warning("prefill of %d frames: %s", num_frames, str(error).split("\n")[0])
        return peak_bytes(device)


def _rows(name: str, taken: Measurement | int) -> list[Row]:
    if not isinstance(taken, Measurement):
        return [make_row("prefill", f"{name}: OUT OF MEMORY, peak memory", taken / 1e9, "GB")]
    return [
        make_row("prefill", f"{name}: median of {taken.num_passes}", taken.seconds, "s"),
        make_row("prefill", f"{name}: peak memory, weights included", taken.peak_bytes / 1e9, "GB"),
    ]
