"""A rank's micro-batches of every step, from the global plan: read ahead in a thread, or by Ray Data (ray_feed.py).

Knows which packs of a step are this rank's. Does not know the model, the loss or DeepSpeed; how a pack becomes tensors
is in step_batches.py. Every rank gets ceil(G / world_size) micro-batches a step: unequal numbers would deadlock ZeRO,
so what is missing is a dummy that weighs nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from timeviper_model.batch import Sample
from timeviper_platform.training.collate import read_vision_rows
from timeviper_platform.training.plan import Pack, PackPlan, PackShape, PlanPosition, assign_packs
from timeviper_platform.training.prefetch import Prefetcher
from timeviper_platform.training.sample_rows import SampleRows
from timeviper_platform.training.samples import SampleBuilder
from timeviper_platform.training.step_batches import (
    FeedShape,
    PackTask,
    StepBatches,
    StepReader,
    StepTask,
    step_bytes,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedConfig:
    """Who reads for a rank, and how far ahead."""

    reader: Literal["thread", "ray_data"] = "thread"
    """a thread of the rank; or Ray Data on any node of the cluster, where decompressing and building would take the
    rank's own cores. The batches are the same"""
    num_readers: int = 2
    """ray_data alone: processes for each rank"""
    cpus_per_reader: float = 0.5
    """ray_data alone"""
    prefetch_bytes: int = 256 << 20
    """batches that wait, in bytes"""
    cache_bytes: int = 256 << 20
    """row groups of the feature store kept in memory, by each process that reads"""
    max_damaged_samples: int = 100
    """samples whose features cannot be read are counted and left out; a run that meets more of them ends"""

    def __post_init__(self) -> None:
        if self.num_readers < 1 or self.cpus_per_reader <= 0:
            raise ValueError(f"feed: {self.num_readers = } must be at least 1, {self.cpus_per_reader = } above 0")


class Feed:
    """Steps of a phase, in order.

    Args:
        plan: the global plan.
        rows: what the plan's table was measured on.
        builder: the builder it was measured with.
        shape: sizes that the batches must have.
        rank: whose micro-batches.
        world_size: how many share a step.
        pack_flops: operations of a pack's forward and backward pass; None = nobody asks.
    """

    def __init__(
        self,
        plan: PackPlan,
        rows: SampleRows,
        builder: SampleBuilder,
        shape: FeedShape,
        *,
        rank: int,
        world_size: int,
        pack_flops: Callable[[PackShape], float] | None = None,
    ) -> None:
        self._plan = plan
        self._rows = rows
        self._shape = shape
        self._rank = rank
        self._world_size = world_size
        self._pack_flops = pack_flops
        self.reader = StepReader(builder, shape)

    @property
    def num_micro_steps(self) -> int:
        """Micro-batches of every rank in every step."""
        return -(-self._shape.packs_per_step // self._world_size)

    def tasks(self, start: PlanPosition, first_step: int, last_step: int) -> Iterator[StepTask]:
        """What is to be read for the steps after `first_step`, up to and with `last_step`, from position `start`."""
        position = start
        for step in range(first_step + 1, last_step + 1):
            packs, position = self._plan.take(position, self._shape.packs_per_step, num_epochs=self._shape.num_epochs)
            if not packs:
                raise RuntimeError(f"the plan ends before {step = } of {last_step}; this is a bug in the phase's steps")
            yield self._task(step, packs, position)

    def steps(self, start: PlanPosition, first_step: int, last_step: int) -> Iterator[StepBatches]:
        """The same steps, read."""
        return map(self.reader.read, self.tasks(start, first_step, last_step))

    def samples(self, entries: Sequence[int]) -> Iterator[tuple[Sample, Tensor]]:
        """Held-out entries of the plan's table with their vision rows (num_vision_tokens, dim), one after another.

        What cannot be read is left out, and the log names it.
        """
        for entry in entries:
            row = self._rows[int(self._plan.table.rows[entry])]
            item = self.reader.build(row, self._plan.table.sizes(entry))
            try:
                features = read_vision_rows(self.reader.builder.store, item.media, self._shape.dim)
            except RuntimeError as error:
                logger.warning("held-out sample %s is left out: %s", row["sample_id"], error)
            else:
                yield item.sample, features

    def _task(self, step: int, packs: list[Pack], end: PlanPosition) -> StepTask:
        own = assign_packs([self._shape.cost(pack) for pack in packs], self._world_size)[self._rank]
        num_tokens = sum(pack.num_tokens for pack in packs)
        padding = (self.num_micro_steps * self._world_size - len(packs)) * len(self.reader.dummy.input_ids)
        if self._shape.pad_to is not None:
            padding += self._shape.pad_to * len(packs) - num_tokens
        batches = StepBatches(
            step=step,
            micro_batches=[],
            num_targets=sum(pack.num_targets for pack in packs),
            num_tokens=num_tokens,
            num_vision_tokens=sum(pack.num_vision_tokens for pack in packs),
            num_samples=sum(len(pack.entries) for pack in packs),
            num_padding_tokens=padding,
            fill=num_tokens / (len(packs) * self._shape.max_tokens),
            flops=0.0 if self._pack_flops is None else sum(map(self._pack_flops, map(self._plan.pack_shape, packs))),
            end=end,
            damaged=[],
        )
        tasks = [self._pack_task(number, packs[number]) for number in own]
        return StepTask(batches, tasks, self.num_micro_steps - len(own))

    def _pack_task(self, number: int, pack: Pack) -> PackTask:
        table = self._plan.table
        rows = [self._rows[int(table.rows[entry])] for entry in pack.entries]
        return PackTask(number, rows, [table.sizes(entry) for entry in pack.entries])


ReadAhead = Callable[[Feed, PlanPosition, int, int, FeedConfig], Prefetcher[StepBatches]]
"""(feed, start, first_step, last_step, config) to `feed.steps(start, first_step, last_step)`, read before they are
asked for. Close it when leaving early."""


def read_in_thread(
    feed: Feed, start: PlanPosition, first_step: int, last_step: int, config: FeedConfig
) -> Prefetcher[StepBatches]:
    """The ReadAhead that needs nobody else.

    Raises:
        ValueError: when the configuration asks for Ray Data.
    """
    if config.reader != "thread":
        raise ValueError(f"{config.reader = } needs Ray: submit jobs/train.py, or choose thread")
    steps = feed.steps(start, first_step, last_step)
    return Prefetcher(steps, num_bytes=step_bytes, max_bytes=config.prefetch_bytes)
