"""Groups samples into packs that do not depend on the world size.

seeded order of an epoch  ->  best fit from a sorted buffer, whole samples  ->  packs 0, 1, 2, ...
packs continue from epoch to epoch; step s takes packs [s * G, (s + 1) * G)
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from timeviper_platform.common.machine_cache import machine_file
from timeviper_platform.training.batches.sizes import SampleTable

MIN_SHARED_SAMPLES = 200_000
"""Minimum samples of a plan that the processes of a machine share; smaller plans take less than a second."""
ARRIVAL_BITS = 40
ARRIVAL_MASK = (1 << ARRIVAL_BITS) - 1

PLAN_VERSION = 1
"""Increase it when the same inputs give other packs; resuming an older run then fails."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackingConfig:
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


class PackedOrder(NamedTuple):
    """Sample indices of an epoch, pack after pack."""

    indices: np.ndarray
    """(num_samples,)"""
    offsets: np.ndarray
    """(num_packs + 1,): pack p holds indices[offsets[p] : offsets[p + 1]]."""

    @property
    def num_packs(self) -> int:
        return len(self.offsets) - 1

    def pack(self, number: int) -> list[int]:
        pack: list[int] = self.indices[self.offsets[number] : self.offsets[number + 1]].tolist()
        return pack


class PackPlan:
    """Packs of every epoch, computed on first use; large epochs once per machine."""

    def __init__(self, table: SampleTable, config: PackingConfig, seed: int) -> None:
        self.table = table
        self._config = config
        self._seed = seed
        self._epochs: dict[int, PackedOrder] = {}
        description = {"version": PLAN_VERSION, "seed": seed, "samples": table.fingerprint, **asdict(config)}
        self.hash = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()

    def epoch(self, epoch: int) -> list[Pack]:
        """Raises ValueError when the weights leave the epoch empty."""
        order = self._order(epoch)
        return [self._pack(order.pack(number)) for number in range(order.num_packs)]

    def num_packs(self, epoch: int) -> int:
        return self._order(epoch).num_packs

    def num_steps(self, packs_per_step: int, num_epochs: int) -> int:
        return -(-sum(map(self.num_packs, range(num_epochs))) // packs_per_step)

    def take(self, position: PackPosition, count: int, *, num_epochs: int | None) -> tuple[list[Pack], PackPosition]:
        """Returns the next `count` packs, or fewer at the end of the plan, and the position after them."""
        packs: list[Pack] = []
        epoch, start = position
        while len(packs) < count and (num_epochs is None or epoch < num_epochs):
            order = self._order(epoch)
            stop = min(order.num_packs, start + count - len(packs))
            packs += [self._pack(order.pack(number)) for number in range(start, stop)]
            start = stop
            if start >= order.num_packs:
                epoch, start = epoch + 1, 0
        return packs, PackPosition(epoch, start)

    def _order(self, epoch: int) -> PackedOrder:
        if epoch not in self._epochs:
            packed = self._computed(epoch) if len(self.table) < MIN_SHARED_SAMPLES else self._shared(epoch)
            while len(self._epochs) > 1:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = packed
        return self._epochs[epoch]

    def _computed(self, epoch: int) -> PackedOrder:
        order = epoch_order(self.table.weights, self._seed, epoch)
        if not len(order):
            raise ValueError(f"epoch {epoch} has no samples: the weights sum to {self.table.weights.sum():.3g}")
        return pack_best_fit(order, self.table.num_tokens, self.table.num_frames, self._config)

    def _shared(self, epoch: int) -> PackedOrder:
        def write(path: Path) -> None:
            packed = self._computed(epoch)
            with path.open("wb") as file:
                np.save(file, np.concatenate([[packed.num_packs], packed.offsets, packed.indices]))

        values = np.load(machine_file("packs", f"{self.hash}-{epoch}.npy", write), mmap_mode="r")
        first = int(values[0]) + 2
        return PackedOrder(values[first:], values[1:first])

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
) -> PackedOrder:
    """Packs the samples `order`.

    A pack opens with the sample that waited longest, then takes the longest that fit.
    """
    order = np.asarray(order, np.int64)
    arrivals = np.arange(len(order))
    # one integer per sample, sorted by tokens, then arrival: comparing tuples takes most of the time
    keys: list[int] = ((num_tokens[order].astype(np.int64) << ARRIVAL_BITS) | arrivals).tolist()
    frames = None if config.max_frames is None else num_frames[order].tolist()
    buffer, upcoming = sorted(keys[: config.buffer_size]), keys[: config.buffer_size - 1 : -1]
    is_packed = bytearray(len(keys))
    packed, offsets, oldest = [], [0], 0
    while buffer:
        while is_packed[oldest]:
            oldest += 1
        index = bisect_left(buffer, keys[oldest])
        tokens_left, frames_left = config.max_tokens, config.max_frames
        while index >= 0:
            key = buffer.pop(index)
            arrival = key & ARRIVAL_MASK
            is_packed[arrival] = True
            packed.append(arrival)
            tokens_left -= key >> ARRIVAL_BITS
            if upcoming:
                insort(buffer, upcoming.pop())
            index = bisect_left(buffer, (tokens_left + 1) << ARRIVAL_BITS) - 1
            if frames is not None and frames_left is not None:
                frames_left -= frames[arrival]
                while index >= 0 and frames[buffer[index] & ARRIVAL_MASK] > frames_left:
                    index -= 1
        offsets.append(len(packed))
    return PackedOrder(order[packed], np.array(offsets))


def assign_packs(costs: Sequence[float], world_size: int) -> list[list[int]]:
    """Assigns costly packs first, each to the least loaded rank. A rank gets at most ceil(packs / world_size).

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
