"""Values of one training step: its planned counts, the packs that a rank reads, and their micro-batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from timeviper_model.batching.batch import PackedBatch
from timeviper_platform.training.batches.packing import Pack, PackPosition


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchShape:
    """Sizes of a phase's batches."""

    packs_per_step: int
    max_tokens: int
    """Token budget of one pack."""
    pad_to: int | None
    """Padded length of every pack; None leaves packs unpadded."""
    dim: int
    """Width of a vision row."""
    pad_token_id: int
    num_epochs: int | None
    vision_cost: float
    """Cost of a vision token relative to a text token: the share that TransV keeps, averaged over blocks."""

    def cost(self, pack: Pack) -> float:
        """Relative cost of a pack, for balancing ranks."""
        return pack.num_tokens - pack.num_vision_tokens * (1.0 - self.vision_cost)


class StepCounts(NamedTuple):
    """Counts of a step's GLOBAL batch, equal on every rank."""

    step: int
    num_targets: int
    num_tokens: int
    num_vision_tokens: int
    num_samples: int
    num_padding_tokens: int
    """Padding inside packs and dummies, over all ranks."""
    fill: float
    """Tokens / token budget of the step's packs."""
    flops: float
    """Operations of the model's forward and backward passes."""
    end: PackPosition
    """Position in the plan after this step."""


class PackTask(NamedTuple):
    """A pack to read. Can be sent to another process."""

    pack_index: int
    """Index within the step."""
    rows: list[dict[str, Any]]
    """SAMPLES rows in the pack's order."""
    sizes: list[tuple[int, ...]]
    """Planned `TokenizedSample.sizes` of each sample."""


class DamagedSample(NamedTuple):
    """A sample left out of its pack because its features cannot be read."""

    sample_id: str
    detail: str
    num_tokens: int
    num_targets: int


class MicroBatch(NamedTuple):
    """Input of one forward and backward pass."""

    batch: PackedBatch
    is_dummy: bool = False
    """True for a batch that only keeps the ranks in step; its loss has weight 0."""
    pack_index: int = -1
    """Index within the step."""
    sample_ids: tuple[str, ...] = ()
    damaged: tuple[DamagedSample, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Memory of its tensors."""
        return sum(getattr(self.batch, name).nbytes for name in self.batch.__slots__)


class StepBatches(NamedTuple):
    """One rank's part of a step."""

    counts: StepCounts
    """As planned, damaged samples included."""
    micro_batches: list[MicroBatch]

    @property
    def damaged(self) -> list[DamagedSample]:
        """Samples that THIS rank cannot read."""
        return [sample for item in self.micro_batches for sample in item.damaged]

    @property
    def num_bytes(self) -> int:
        """Memory of its tensors."""
        return sum(item.num_bytes for item in self.micro_batches)
