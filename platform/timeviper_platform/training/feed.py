"""A rank's micro-batches of every step, from the global plan: reads features ahead in a thread.

Knows which packs of a step are this rank's, and builds their tensors. Does not know the model, the loss or
DeepSpeed. Every rank gets ceil(G / world_size) micro-batches a step: unequal numbers would deadlock ZeRO, so what is
missing is a dummy that weighs nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from timeviper_model.batch import PackedBatch, Sample
from timeviper_platform.training.collate import batch_bytes, collate, dummy_batch, read_vision_rows
from timeviper_platform.training.plan import Pack, PackPlan, PlanPosition, assign_packs
from timeviper_platform.training.prefetch import Prefetcher
from timeviper_platform.training.sample_table import sample_sizes
from timeviper_platform.training.samples import BuiltSample, Reject, SampleBuilder, SampleRows

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedConfig:
    """How far a rank reads ahead."""

    prefetch_bytes: int = 256 << 20
    """batches that wait, in bytes"""
    cache_bytes: int = 256 << 20
    """row groups of the feature store kept in memory"""
    max_damaged_samples: int = 100
    """samples whose features cannot be read are counted and left out; a run that meets more of them ends"""


class MicroBatch(NamedTuple):
    """One forward and backward pass."""

    batch: PackedBatch
    is_dummy: bool
    pack: int = -1
    """number within the step"""
    sample_ids: tuple[str, ...] = ()


class Damaged(NamedTuple):
    """A sample that is left out of its pack."""

    reject: Reject
    num_tokens: int
    num_targets: int


class StepBatches(NamedTuple):
    """What one rank needs for one step; the counts are those of the GLOBAL batch and equal on every rank.

    They are the plan's: what is found to be damaged when it is read is in `damaged`, until all ranks agree on it.
    """

    step: int
    micro_batches: list[MicroBatch]
    num_targets: int
    num_tokens: int
    num_vision_tokens: int
    num_samples: int
    num_padding_tokens: int
    """padding inside packs and dummies, over all ranks"""
    fill: float
    """tokens / token budget of the step's packs"""
    end: PlanPosition
    """where the plan stands after this step"""
    damaged: list[Damaged]
    """samples that THIS rank cannot read"""


class Feed:
    """Steps `first_step` up to `last_step` of a phase, in order. Close it when leaving early.

    Args:
        plan: the global plan.
        rows: what the plan's table was measured on.
        builder: the builder it was measured with.
        shape: sizes that the batches must have.
        rank: whose micro-batches.
        world_size: how many share a step.
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
    ) -> None:
        self._plan = plan
        self._rows = rows
        self._builder = builder
        self._shape = shape
        self._rank = rank
        self._world_size = world_size

    @property
    def num_micro_steps(self) -> int:
        """Micro-batches of every rank in every step."""
        return -(-self._shape.packs_per_step // self._world_size)

    def prefetch(
        self, start: PlanPosition, first_step: int, last_step: int, config: FeedConfig
    ) -> Prefetcher[StepBatches]:
        """Steps `first_step + 1` to `last_step` read ahead in a thread."""
        return Prefetcher(
            self.steps(start, first_step, last_step), num_bytes=_step_bytes, max_bytes=config.prefetch_bytes
        )

    def steps(self, start: PlanPosition, first_step: int, last_step: int) -> Iterator[StepBatches]:
        """The batches of the steps after `first_step`, up to and with `last_step`, from plan position `start`."""
        position = start
        for step in range(first_step + 1, last_step + 1):
            packs, position = self._plan.take(position, self._shape.packs_per_step, num_epochs=self._shape.num_epochs)
            if not packs:
                raise RuntimeError(f"the plan ends before {step = } of {last_step}; this is a bug in the phase's steps")
            yield self._step(step, packs, position)

    def samples(self, entries: Sequence[int]) -> Iterator[tuple[Sample, Tensor]]:
        """Held-out entries of the plan's table with their vision rows (num_vision_tokens, dim), one after another.

        What cannot be read is left out, and the log names it.
        """
        for entry in entries:
            row = self._rows[int(self._plan.table.rows[entry])]
            item = self._build(row, entry)
            try:
                features = read_vision_rows(self._builder.store, item.media, self._shape.dim)
            except RuntimeError as error:
                logger.warning("held-out sample %s is left out: %s", row["sample_id"], error)
            else:
                yield item.sample, features

    def _step(self, step: int, packs: list[Pack], end: PlanPosition) -> StepBatches:
        costs = [self._shape.cost(pack) for pack in packs]
        own = assign_packs(costs, self._world_size)[self._rank]
        dummy = dummy_batch(self._shape.dim, pad_token_id=self._shape.pad_token_id)
        damaged: list[Damaged] = []
        micro_batches = [self._micro_batch(number, packs[number], dummy, damaged) for number in own]
        micro_batches += [MicroBatch(dummy, is_dummy=True)] * (self.num_micro_steps - len(own))
        num_tokens = sum(pack.num_tokens for pack in packs)
        num_dummies = self.num_micro_steps * self._world_size - len(packs)
        padding = num_dummies * len(dummy.input_ids)
        if self._shape.pad_to is not None:
            padding += self._shape.pad_to * len(packs) - num_tokens
        return StepBatches(
            step=step,
            micro_batches=micro_batches,
            num_targets=sum(pack.num_targets for pack in packs),
            num_tokens=num_tokens,
            num_vision_tokens=sum(pack.num_vision_tokens for pack in packs),
            num_samples=sum(len(pack.entries) for pack in packs),
            num_padding_tokens=padding,
            fill=num_tokens / (len(packs) * self._shape.max_tokens),
            end=end,
            damaged=damaged,
        )

    def _micro_batch(self, number: int, pack: Pack, dummy: PackedBatch, damaged: list[Damaged]) -> MicroBatch:
        """The pack's tensors; what it has lost is added to `damaged`."""
        rows = [self._rows[int(self._plan.table.rows[entry])] for entry in pack.entries]
        shape = self._shape
        batch, wrong = collate(
            [self._build(row, entry) for row, entry in zip(rows, pack.entries, strict=True)],
            self._builder.store,
            shape.dim,
            pad_to=shape.pad_to,
            pad_token_id=shape.pad_token_id,
        )
        for place, detail in wrong.items():
            entry = pack.entries[place]
            reject = Reject(rows[place]["sample_id"], "damaged_features", detail)
            table = self._plan.table
            damaged.append(Damaged(reject, int(table.num_tokens[entry]), int(table.num_targets[entry])))
        sample_ids = tuple(row["sample_id"] for place, row in enumerate(rows) if place not in wrong)
        if batch is None:
            return MicroBatch(dummy, is_dummy=True)
        return MicroBatch(batch, is_dummy=False, pack=number, sample_ids=sample_ids)

    def _build(self, row: dict[str, Any], entry: int) -> BuiltSample:
        """The row's sample, held against the plan.

        Raises:
            RuntimeError: when it is not what was planned with.
        """
        item: BuiltSample | Reject = self._builder.build(row)
        planned = self._plan.table.sizes(entry)
        if isinstance(item, Reject):
            raise RuntimeError(
                f"sample {item.sample_id} was usable when the plan was made and is not now: {item.detail};"
                " the samples or the feature store changed under the run"
            )
        if sample_sizes(item) != planned:
            raise RuntimeError(
                f"sample {row['sample_id']} has (tokens, vision tokens, frames, targets) {sample_sizes(item)}, planned"
                f" were {planned}: the samples or the feature store changed under the run, or the folder of kept sizes,"
                " sample-tables beside the runs, is another release's and must be removed"
            )
        return item


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedShape:
    """Sizes of a phase's batches."""

    packs_per_step: int
    max_tokens: int
    pad_to: int | None
    dim: int
    pad_token_id: int
    num_epochs: int | None
    vision_cost: float
    """cost of a vision token where a text token costs 1: the mean over blocks of the share that TransV keeps"""

    def cost(self, pack: Pack) -> float:
        """What a pack costs, for the balance between ranks."""
        return pack.num_tokens - pack.num_vision_tokens * (1.0 - self.vision_cost)


def _step_bytes(step: StepBatches) -> int:
    return sum(batch_bytes(item.batch) for item in step.micro_batches)
