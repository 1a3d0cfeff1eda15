"""A step's tensors, out of the rows that the plan gave it.

Knows samples, the feature store's reader and the sizes that batches must have; does not know the plan or who asks. A
task and a reader can both be sent to another process: see loader.py and ray_loader.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from timeviper_model.batching.batch import PackedBatch
from timeviper_platform.training.batches.collate import batch_bytes, collate, dummy_batch
from timeviper_platform.training.batches.packing import Pack, PackPosition
from timeviper_platform.training.batches.samples import Reject, SampleBuilder, TokenizedSample
from timeviper_platform.training.batches.sizes import SampleSizes, sample_sizes


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
    flops: float
    """operations of the forward and backward passes that the model needs"""
    end: PackPosition
    """where the plan stands after this step"""
    damaged: list[Damaged]
    """samples that THIS rank cannot read"""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchShape:
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


class PackTask(NamedTuple):
    """A pack to be built."""

    number: int
    """within the step"""
    rows: list[dict[str, Any]]
    """SAMPLES rows, in the pack's order"""
    sizes: list[SampleSizes]
    """of each, as planned"""


class StepTask(NamedTuple):
    """A rank's part of a step, before a feature is read."""

    step: StepBatches
    """without micro-batches"""
    packs: list[PackTask]
    num_dummies: int


class StepReader:
    """Tasks to batches.

    Args:
        builder: the builder that the plan's table was measured with.
        shape: sizes that the batches must have.
    """

    def __init__(self, builder: SampleBuilder, shape: BatchShape) -> None:
        self.builder = builder
        self.shape = shape
        self.dummy = dummy_batch(shape.dim, pad_token_id=shape.pad_token_id)

    def read(self, task: StepTask) -> StepBatches:
        """The step with its micro-batches, and with what of it is damaged.

        Raises:
            RuntimeError: when a sample is not what was planned with.
        """
        damaged: list[Damaged] = []
        micro_batches = [self._micro_batch(pack, damaged) for pack in task.packs]
        micro_batches += [MicroBatch(self.dummy, is_dummy=True)] * task.num_dummies
        return task.step._replace(micro_batches=micro_batches, damaged=damaged)

    def build(self, row: dict[str, Any], planned: SampleSizes) -> TokenizedSample:
        """The row's sample, held against the plan.

        Raises:
            RuntimeError: when it is not what was planned with.
        """
        item: TokenizedSample | Reject = self.builder.build(row)
        if isinstance(item, Reject):
            raise RuntimeError(
                f"sample {item.sample_id} was usable when the plan was made and is not now: {item.detail};"
                " the samples or the feature store changed under the run"
            )
        if sample_sizes(item) != planned:
            raise RuntimeError(
                f"sample {row['sample_id']} has (tokens, vision tokens, frames, targets) {tuple(sample_sizes(item))},"
                f" planned were {tuple(planned)}: the samples or the feature store changed under the run, or the folder"
                " of kept sizes, sample-tables beside the runs, is another release's and must be removed"
            )
        return item

    def _micro_batch(self, pack: PackTask, damaged: list[Damaged]) -> MicroBatch:
        """The pack's tensors; what it has lost is added to `damaged`."""
        built = [self.build(row, planned) for row, planned in zip(pack.rows, pack.sizes, strict=True)]
        shape = self.shape
        batch, wrong = collate(
            built, self.builder.store, shape.dim, pad_to=shape.pad_to, pad_token_id=shape.pad_token_id
        )
        for place, detail in wrong.items():
            reject = Reject(pack.rows[place]["sample_id"], "damaged_features", detail)
            damaged.append(Damaged(reject, pack.sizes[place].num_tokens, pack.sizes[place].num_targets))
        if batch is None:
            return MicroBatch(self.dummy, is_dummy=True)
        sample_ids = tuple(row["sample_id"] for place, row in enumerate(pack.rows) if place not in wrong)
        return MicroBatch(batch, is_dummy=False, pack=pack.number, sample_ids=sample_ids)


def step_bytes(step: StepBatches) -> int:
    """Memory of a step's tensors."""
    return sum(batch_bytes(item.batch) for item in step.micro_batches)
