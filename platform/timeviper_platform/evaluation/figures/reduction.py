"""Compares ways to drop vision tokens: scores and prefill time, with equally many tokens at the end."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import truediv
from typing import Any

import torch

from timeviper_model.analysis.dropping import with_plan
from timeviper_model.batching.batch import PackedBatch
from timeviper_model.config import TextConfig, TransVSite, progressive_importance
from timeviper_model.inference.chunked_transv import plan_sites
from timeviper_model.inference.prefill import prefill
from timeviper_model.timeviper import TimeViper
from timeviper_platform.evaluation.answering import Answerer
from timeviper_platform.evaluation.figures.speed import random_prompt
from timeviper_platform.evaluation.figures.sweeps import TaskPrompts, measure, score_row

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReductionConfig:
    """Other plans for weights that were trained with a plan; `timeviper ablation` trains a model per plan instead."""

    keep: float | None = None
    """Share of vision tokens at the last block; null = that of the trained plan."""
    num_frames: int = 1024
    """Length of the random video whose prefill is timed."""
    repeats: int = 5
    """Timed prefills of each plan, in turn, after an untimed one; the result is the median of the turns' ratios."""

    def __post_init__(self) -> None:
        if self.num_frames < 1 or self.repeats < 1 or not 0.0 < (self.keep or 1.0) <= 1.0:
            raise ValueError(f"{self}: frames and repeats must be at least 1, keep above 0 and at most 1")


def reduction_plans(
    text: TextConfig, trained: Sequence[TransVSite], keep: float | None
) -> dict[str, tuple[TransVSite, ...]]:
    """Plans by name, all with `keep` at the end.

    Raises:
        ValueError: without a trained plan and without `keep`, or for a model without attention.
    """
    if keep is None and not trained:
        raise ValueError("the weights have no TransV site; set reduction.keep")
    end = trained[-1].keep if keep is None else keep
    attention = [layer for layer, kind in enumerate(text.block_types) if kind == "attention"]
    if not attention:
        raise ValueError("figure reduction compares plans that select by attention; the weights have no such block")
    first = min((site.layer for site in trained), default=attention[0])
    own = () if keep is not None and (not trained or trained[-1].keep != keep) else tuple(trained)
    none = partial(TransVSite, transfer="none")
    plans: dict[str, tuple[TransVSite, ...]] = {
        "none": (),
        "uniform": (none(layer=first, select="uniform", keep=end),),
        "attention": (none(layer=attention[-1], select="attention", keep=end),),
    }
    if own:
        plans |= {"TransV": own, "TD": tuple(replace(site, transfer="none") for site in own)}
    return plans | {
        "PDrop": tuple(
            none(layer=layer, select="attention", keep=end ** (count / len(attention)))
            for count, layer in enumerate(attention, start=1)
        ),
        "EVS": (none(layer=0, select="evs", keep=end),),
        "importance": progressive_importance(text, end),
    }


def reduction_rows(
    model: TimeViper,
    answerer_of: Callable[[TimeViper], Answerer],
    tasks: Sequence[TaskPrompts],
    config: ReductionConfig,
    *,
    max_new_tokens: int,
) -> Iterator[dict[str, Any]]:
    """Yields a row per plan: scores by task, and prefill time over that without drops (CPU time without a GPU)."""
    text, plans = model.config.text, reduction_plans(model.config.text, model.config.transv, config.keep)
    seconds = _prefill_seconds(model, plans, config)
    baselines: dict[str, Any] = {}
    for name, sites in plans.items():
        twin = with_plan(model, sites)
        answerer = answerer_of(twin)
        generate = partial(answerer.generate, max_new_tokens=max_new_tokens)
        present = _present_by_block(twin, 10_000)
        row: dict[str, Any] = {
            "plan": name,
            "kept_at_the_end": present[-1] / 10_000,
            "kept_on_average": sum(present) / (10_000 * text.num_hidden_layers),
            "prefill_seconds": seconds[name],
            "prefill_num_frames": config.num_frames,
            "prefill_time_over_none": statistics.median(map(truediv, seconds[name], seconds["none"])),
        }
        for task in tasks:
            found = measure(answerer, task, generate, twin.target_log_probs)
            baseline = baselines.setdefault(task.task, found)
            row |= {f"{task.task}_{key}": value for key, value in score_row(task, found, baseline).items()}
        yield row


def _present_by_block(model: TimeViper, num_vision: int) -> list[int]:
    plans, present, counts = plan_sites(model.config, num_vision), num_vision, []
    for layer in range(model.config.text.num_hidden_layers):
        present = plans[layer].num_kept if layer in plans else present
        counts.append(present)
    return counts


def _prefill_seconds(
    model: TimeViper, plans: dict[str, tuple[TransVSite, ...]], config: ReductionConfig
) -> dict[str, list[float]]:
    batch = random_prompt(model, config.num_frames, 0)
    seconds: dict[str, list[float]] = {name: [] for name in plans}
    for turn in range(config.repeats + 1):
        for name, sites in plans.items():
            spent = _seconds(with_plan(model, sites), batch)
            seconds[name] += [spent] * (turn > 0)
    return seconds


@torch.inference_mode()
def _seconds(model: TimeViper, batch: PackedBatch) -> float:
    weight = model.lm_head.weight
    cache = model.new_cache(1, device=weight.device, dtype=weight.dtype)
    clock = time.process_time if weight.device.type == "cpu" else time.perf_counter  # other processes do not count
    started = clock()
    prefill(model, batch, cache, 0).tolist()
    return clock() - started
