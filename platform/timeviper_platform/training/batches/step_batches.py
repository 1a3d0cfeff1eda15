"""Counts and batches of one training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from timeviper_model.batching.batch import PackedBatch
from timeviper_platform.training.batches.packing import Pack, PackPosition


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchShape:
    packs_per_step: int
    max_tokens: int
    """Token budget of one pack."""
    pad_to: int | None
    dim: int
    """Width of a vision row."""
    pad_token_id: int
    num_epochs: int | None
    vision_cost: float
    """Cost of a vision token relative to text: the share that TransV keeps, averaged over blocks."""

    def cost(self, pack: Pack) -> float:
        return pack.num_tokens - pack.num_vision_tokens * (1.0 - self.vision_cost)


class StepCounts(NamedTuple):
    """Counts of a step's GLOBAL batch, equal on every rank."""

    step: int
    num_targets: int
    num_tokens: int
    num_vision_tokens: int
    num_samples: int
    num_padding_tokens: int
    """Padding of packs and dummies."""
    fill: float
    """Tokens / token budget."""
    flops: float
    """Forward and backward operations."""
    end: PackPosition
    """Plan position after this step."""


class PackTask(NamedTuple):
    """A pack to read. Can be pickled."""

    pack_index: int
    rows: list[dict[str, Any]]
    sizes: list[tuple[int, ...]]
    """Planned `TokenizedSample.sizes`."""


class DamagedSample(NamedTuple):
    sample_id: str
    detail: str
    num_tokens: int
    num_targets: int


class MicroBatch(NamedTuple):
    batch: PackedBatch
    is_dummy: bool = False
    """True for a batch of loss weight 0 that keeps the ranks in step."""
    pack_index: int = -1
    sample_ids: tuple[str, ...] = ()
    damaged: tuple[DamagedSample, ...] = ()

    @property
    def num_bytes(self) -> int:
        return sum(getattr(self.batch, name).nbytes for name in self.batch.__slots__)


class StepBatches(NamedTuple):
    counts: StepCounts
    """Planned counts, including damaged samples."""
    micro_batches: list[MicroBatch]

    @property
    def damaged(self) -> list[DamagedSample]:
        return [sample for item in self.micro_batches for sample in item.damaged]

    @property
    def num_bytes(self) -> int:
        return sum(item.num_bytes for item in self.micro_batches)
