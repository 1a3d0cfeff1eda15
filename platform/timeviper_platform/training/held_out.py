"""A look at the held-out samples between two steps: their loss, and how many the model answers by itself.

Knows which batches and answers are a rank's. Does not know when a look is due, nor what the ranks do between batches:
who asks says so, and may end the look there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from timeviper_platform.training.answers import AnswerTask, answer_task, exact_match_share
from timeviper_platform.training.feed import Feed
from timeviper_platform.training.phase import Phase
from timeviper_platform.training.plan import PlanPosition
from timeviper_platform.training.step import held_out_loss
from timeviper_platform.training.step_batches import StepBatches

logger = logging.getLogger(__name__)

LOSS = "held_out_loss"


def is_look_due(phase: Phase, step: int) -> bool:
    """True when the samples are to be looked at after this step."""
    held_out = phase.config.held_out
    if held_out is None or step == 0:
        return False
    return step % held_out.every_steps == 0 or step == phase.num_steps


def look_at_held_out(
    ds_engine: Any, phase: Phase, *, device: torch.device, dtype: torch.dtype, between: Callable[[], None]
) -> dict[str, float]:
    """The figures of a look, by their names in a row of metrics; collective.

    Args:
        ds_engine: in the state to look at; as it was afterwards.
        phase: with held-out samples.
        device: of this rank.
        dtype: of activations.
        between: called before every batch and answer, as often on every rank; may hold a collective, and may raise.
    """
    feed, held_out = phase.held_out, phase.config.held_out
    assert feed is not None
    assert held_out is not None
    started = time.perf_counter()
    steps = _steps(feed, phase.num_held_out_steps, between)
    use_transv = phase.config.use_transv
    figures = {LOSS: held_out_loss(ds_engine, steps, use_transv=use_transv, device=device, dtype=dtype)}
    if held_out.num_answers:
        tasks = _tasks(feed, phase, between)
        figures["held_out_exact_match"] = exact_match_share(ds_engine.module, tasks, device=device, dtype=dtype)
    return figures | {"held_out_s": time.perf_counter() - started}


def _steps(feed: Feed, num_steps: int, between: Callable[[], None]) -> Iterator[StepBatches]:
    between()
    for batches in feed.steps(PlanPosition(0, 0), 0, num_steps):
        yield batches
        between()


def _tasks(feed: Feed, phase: Phase, between: Callable[[], None]) -> Iterator[AnswerTask]:
    """This rank's; one that has fewer than others comes to `between` as often."""
    for number in range(phase.num_answer_rounds):
        between()
        for sample, features in feed.samples(phase.answer_entries[number : number + 1]):
            yield answer_task(sample, features)
