"""Groups samples into packs that do not depend on the world size.

seeded order of an epoch  ->  best fit from a sorted buffer, whole samples  ->  packs 0, 1, 2, ...
packs continue from epoch to epoch; step s takes packs [s * G, (s + 1) * G)
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from timeviper_platform.training.batches.sizes import SampleTable

PLAN_VERSION = 1
"""Increase it when the same inputs give other packs; resuming an older run then fails."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackingConfig:
    """Caps of one pack."""

    max_tokens: int
    """Maximum text and vision tokens per pack; longer samples are rejected."""
    max_frames: int | None = None
    """Maximum frames per pack, where frames limit memory."""
    buffer_size: int = 64
    """Samples searched for the best fit."""
    pad_to_max_tokens: bool = False
    """Pad every pack to max_tokens, for kernels compiled per shape."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "buffer_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")


class Pack(NamedTuple):
    num_tokens: int
    vision_counts: tuple[int, ...]
    """Vision tokens of each sample."""
    num_targets: int
    indices: tuple[int, ...] = ()
    """Indices into the SampleTable; empty for a hypothetical pack."""

    @property
    def num_vision_tokens(self) -> int:
        return sum(self.vision_counts)


class PackPosition(NamedTuple):
    epoch: int
    next_pack: int
    """Index within the epoch."""


class PackPlan:
    """Packs of every epoch, computed on first use."""

    def __init__(self, table: SampleTable, config: PackingConfig, seed: int) -> None:
        self.table = table
        self._config = config
        self._seed = seed
        self._epochs: dict[int, list[list[int]]] = {}
        description = {"version": PLAN_VERSION, "seed": seed, "samples": table.fingerprint, **asdict(config)}
        self.hash = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()

    def epoch(self, epoch: int) -> list[Pack]:
        """Raises ValueError when the weights leave the epoch empty."""
        return [self._pack(indices) for indices in self._groups(epoch)]

    def num_packs(self, epoch: int) -> int:
        return len(self._groups(epoch))

    def num_steps(self, packs_per_step: int, num_epochs: int) -> int:
        return -(-sum(map(self.num_packs, range(num_epochs))) // packs_per_step)

    def take(self, position: PackPosition, count: int, *, num_epochs: int | None) -> tuple[list[Pack], PackPosition]:
        """Returns the next `count` packs, or fewer at the end of the plan, and the position after them."""
        packs: list[Pack] = []
        epoch, start = position
        while len(packs) < count and (num_epochs is None or epoch < num_epochs):
            groups = self._groups(epoch)
            taken = groups[start : start + count - len(packs)]
            packs += map(self._pack, taken)
            start += len(taken)
            if start >= len(groups):
                epoch, start = epoch + 1, 0
        return packs, PackPosition(epoch, start)

    def _groups(self, epoch: int) -> list[list[int]]:
        if epoch not in self._epochs:
            order = epoch_order(self.table.weights, self._seed, epoch)
            if not len(order):
                raise ValueError(f"epoch {epoch} has no samples: the weights sum to {self.table.weights.sum():.3g}")
            groups = pack_best_fit(order, self.table.num_tokens, self.table.num_frames, self._config)
            while len(self._epochs) > 1:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = groups
        return self._epochs[epoch]

    def _pack(self, indices: Sequence[int]) -> Pack:
        chosen = np.asarray(indices)
        return Pack(
            num_tokens=int(self.table.num_tokens[chosen].sum()),
            vision_counts=tuple(self.table.num_vision_tokens[chosen].tolist()),
            num_targets=int(self.table.num_targets[chosen].sum()),
            indices=tuple(indices),
        )


def epoch_order(weights: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Returns sample indices, each `weight` times; fractions of a weight are drawn."""
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    times = np.floor(weights).astype(np.int64) + (generator.random(len(weights)) < weights % 1.0)
    return generator.permutation(np.repeat(np.arange(len(weights)), times))


def pack_best_fit(
    order: Sequence[int] | np.ndarray, num_tokens: np.ndarray, num_frames: np.ndarray, config: PackingConfig
) -> list[list[int]]:
    """Returns the sample indices of each pack.

    A pack opens with the sample that waited longest, then takes the longest that fit.
    """
    # items are (tokens, arrival, index); the buffer is sorted by tokens, the queue by arrival
    items = [(int(num_tokens[index]), arrival, int(index)) for arrival, index in enumerate(order)]
    arrivals = {item[1]: item for item in items[: config.buffer_size]}  # insertion order = longest wait first
    buffer = sorted(arrivals.values())
    upcoming = iter(items[config.buffer_size :])
    packs = []
    while buffer:
        indices: list[int] = []
        tokens, frames = config.max_tokens, config.max_frames
        item: tuple[int, int, int] | None = next(iter(arrivals.values()))
        while item is not None:
            buffer.remove(item)
            del arrivals[item[1]]
            indices.append(item[2])
            tokens -= item[0]
            frames = None if frames is None else frames - int(num_frames[item[2]])
            refill = next(upcoming, None)
            if refill is not None:
                bisect.insort(buffer, refill)
                arrivals[refill[1]] = refill
            item = _longest_that_fits(buffer, num_frames, tokens, frames)
        packs.append(indices)
    return packs


def _longest_that_fits(
    buffer: list[tuple[int, int, int]], num_frames: np.ndarray, tokens: int, frames: int | None
) -> tuple[int, int, int] | None:
    for item in reversed(buffer[: bisect.bisect_right(buffer, tokens, key=lambda item: item[0])]):
        if frames is None or int(num_frames[item[2]]) <= frames:
            return item
    return None


def assign_packs(costs: Sequence[float], world_size: int) -> list[list[int]]:
    """Assigns costly packs first, each to the least loaded rank. A rank gets at most ceil(G / world_size).

    assign_packs([5, 1, 4, 2], 2) -> [[0, 1], [2, 3]]
    """
    limit = -(-len(costs) // world_size)
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0.0] * world_size
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        rank = min((r for r in range(world_size) if len(ranks[r]) < limit), key=lambda r: (loads[r], r))
        ranks[rank].append(index)
        loads[rank] += costs[index]
    return [sorted(indices) for indices in ranks]
