"""A look at the held-out samples: their loss, and how many the model answers by itself.

Knows which batches and answers are a rank's. Does not know when a look is due, whether ranks make it between two steps
or a process beside them (beside.py), nor what they do between batches: who asks says so, and may end the look there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from timeviper_model.timeviper import TimeViper
from timeviper_platform.training.batches.loader import BatchLoader
from timeviper_platform.training.batches.packing import PackPlan, PackPosition
from timeviper_platform.training.batches.rows import SampleRows
from timeviper_platform.training.batches.samples import SampleBuilder
from timeviper_platform.training.batches.sizes import Measure, count_rejects
from timeviper_platform.training.batches.step_batches import BatchShape, StepBatches
from timeviper_platform.training.config import PhaseConfig, ValidationConfig
from timeviper_platform.training.step import validation_loss
from timeviper_platform.training.validation.exact_match import AnswerTask, answer_task, exact_match_share

logger = logging.getLogger(__name__)

LOSS = "validation_loss"


@dataclass(frozen=True, kw_only=True, slots=True)
class Validator:
    """The held-out samples of a phase, as one rank reads them."""

    loader: BatchLoader
    """one epoch"""
    num_steps: int
    answer_entries: list[int]
    """entries that THIS rank answers"""
    num_answer_rounds: int
    """entries of the rank that has most"""


def build_validator(
    phase: PhaseConfig, builder: SampleBuilder, shape: BatchShape, measure: Measure, *, rank: int, world_size: int
) -> Validator | None:
    """The phase's held-out samples, None without any. Their order matters to nothing: the seed is 0."""
    if phase.validation is None:
        return None
    rows = SampleRows.read(phase.validation.samples)
    caps = phase.packing
    table = measure(rows, builder, max_tokens=caps.max_tokens, max_frames=caps.max_frames)
    plan = PackPlan(table, caps, seed=0)
    logger.info("held out: %d samples, rejects %s", len(table), count_rejects(table.rejects))
    num_answers = min(len(table), phase.validation.num_answers)
    return Validator(
        loader=BatchLoader(plan, rows, builder, replace(shape, num_epochs=1), rank=rank, world_size=world_size),
        num_steps=plan.num_steps(shape.packs_per_step, 1),
        answer_entries=list(range(rank, num_answers, world_size)),
        num_answer_rounds=-(-num_answers // world_size),
    )


def validation_due(config: ValidationConfig | None, step: int, num_steps: int) -> Literal["task", "ranks"] | None:
    """Who looks at the samples after this step of a phase of `num_steps`; None when no look is due."""
    if config is None or step == 0:
        return None
    if step == num_steps:
        return "ranks"
    return config.where if step % config.every_steps == 0 else None


def look_at_held_out(
    forward: Any,
    model: TimeViper,
    held_out: Validator,
    *,
    use_transv: bool,
    device: torch.device,
    dtype: torch.dtype,
    between: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """The figures of a look, by their names in a row of metrics; collective where torch.distributed is up.

    Args:
        forward: the ds_engine in the state to look at, as it was afterwards; or the model alone.
        model: with whole parameters, where answers are asked for.
        held_out: the samples.
        use_transv: as in training.
        device: of the model.
        dtype: of activations.
        between: called before every batch and answer, as often on every rank; may hold a collective, and may raise.
    """
    started = time.perf_counter()
    steps = _steps(held_out, between)
    figures = {LOSS: validation_loss(forward, steps, use_transv=use_transv, device=device, dtype=dtype)}
    if held_out.num_answer_rounds:
        tasks = _tasks(held_out, between)
        figures["validation_exact_match"] = exact_match_share(model, tasks, device=device, dtype=dtype)
    return figures | {"validation_seconds": time.perf_counter() - started}


def _steps(held_out: Validator, between: Callable[[], None]) -> Iterator[StepBatches]:
    between()
    for batches in held_out.loader.steps(PackPosition(0, 0), 0, held_out.num_steps):
        yield batches
        between()


def _tasks(held_out: Validator, between: Callable[[], None]) -> Iterator[AnswerTask]:
    """This rank's; one that has fewer than others comes to `between` as often."""
    for number in range(held_out.num_answer_rounds):
        between()
        for sample, features in held_out.loader.samples(held_out.answer_entries[number : number + 1]):
            yield answer_task(sample, features)
