"""Validation on held-out samples: loss and exact answers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from timeviper_model.timeviper import TimeViper
from timeviper_platform.training.batches.loader import BatchLoader
from timeviper_platform.training.batches.packing import PackPlan, PackPosition
from timeviper_platform.training.batches.rows import SampleRows
from timeviper_platform.training.batches.samples import SampleBuilder
from timeviper_platform.training.batches.sizes import Measure, count_rejects
from timeviper_platform.training.batches.step_batches import BatchShape, StepBatches
from timeviper_platform.training.config import PhaseConfig
from timeviper_platform.training.step import TrainContext, validation_loss
from timeviper_platform.training.validation.exact_match import AnswerTask, answer_task, exact_match_share

logger = logging.getLogger(__name__)

LOSS = "validation_loss"


@dataclass(frozen=True, kw_only=True, slots=True)
class Validator:
    loader: BatchLoader
    """Loader of one epoch."""
    num_steps: int
    answer_entries: list[int]
    """Indices of the samples that this rank answers."""
    num_answer_rounds: int
    """Largest number of answers of any rank."""

    def validate(
        self,
        forward: Any,
        model: TimeViper,
        context: TrainContext,
        *,
        before_batch: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """Returns metrics by name; collective.

        Args:
            forward: the ds_engine, or a bare model.
            model: model with whole parameters, if answers are generated.
            before_batch: called equally often on every rank.
        """
        started = time.perf_counter()
        metrics = {LOSS: validation_loss(forward, self._steps(before_batch), context)}
        if self.num_answer_rounds:
            tasks = self._answer_tasks(before_batch)
            metrics["validation_exact_match"] = exact_match_share(
                model, tasks, device=context.device, dtype=context.dtype
            )
        return metrics | {"validation_seconds": time.perf_counter() - started}

    def _steps(self, before_batch: Callable[[], None]) -> Iterator[StepBatches]:
        before_batch()
        for batches in self.loader.steps(PackPosition(0, 0), 0, self.num_steps):
            yield batches
            before_batch()

    def _answer_tasks(self, before_batch: Callable[[], None]) -> Iterator[AnswerTask]:
        for number in range(self.num_answer_rounds):
            before_batch()
            for sample, features in self.loader.samples(self.answer_entries[number : number + 1]):
                yield answer_task(sample, features)


def build_validator(
    phase: PhaseConfig, builder: SampleBuilder, shape: BatchShape, measure: Measure, *, rank: int, world_size: int
) -> Validator | None:
    if phase.validation is None:
        return None
    rows = SampleRows.read(phase.validation.samples)
    caps = phase.packing
    table = measure(rows, builder, max_tokens=caps.max_tokens, max_frames=caps.max_frames)
    plan = PackPlan(table, caps, seed=0)
    logger.info("validation: %d samples, rejects %s", len(table), count_rejects(table.rejects))
    num_answers = min(len(table), phase.validation.num_answers)
    return Validator(
        loader=BatchLoader(plan, rows, builder, replace(shape, num_epochs=1), rank=rank, world_size=world_size),
        num_steps=plan.num_steps(shape.packs_per_step, 1),
        answer_entries=list(range(rank, num_answers, world_size)),
        num_answer_rounds=-(-num_answers // world_size),
    )
