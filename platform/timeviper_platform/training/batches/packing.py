"""The global pack plan: which samples share a pack, and which packs a step takes.

Purely numbers: a function of (seed, epoch, sizes and weights of the samples, caps of a pack). The world size never
enters, so a run on two ranks and its continuation on three see the same packs in the same order. Reads nothing.

    epoch's order (seeded)  ->  best fit from a sorted buffer of 64, whole samples  ->  packs 0, 1, 2, ...
    the stream of packs runs on from epoch to epoch; step s takes packs [s * G, (s + 1) * G) of it
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
"""Raise it whenever the same inputs give other packs: a resumed run then refuses instead of mixing two orders."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackingConfig:
    """Caps of one pack."""

    max_tokens: int
    """text and vision tokens of one pack; a longer sample is a reject"""
    max_frames: int | None = None
    """frames of one pack, for mixtures whose frames rather than tokens fill the memory"""
    buffer_size: int = 64
    """samples among which the best fit is looked for"""
    pad_to_max_tokens: bool = False
    """give every pack the same length, for kernels that are compiled by shape"""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "buffer_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")


class Pack(NamedTuple):
    """Entries of the SampleTable that share one flat sequence, in their order in it."""

    entries: tuple[int, ...]
    num_tokens: int
    num_vision_tokens: int
    num_targets: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PackShape:
    """The sizes of one pack that decide what it costs to compute, and what its activations take."""

    num_tokens: int
    vision_counts: tuple[int, ...]
    """vision tokens of each sample"""
    num_targets: int


class PackPosition(NamedTuple):
    """Where a run stands in the stream of packs."""

    epoch: int
    next_pack: int
    """index within the epoch"""


class PackPlan:
    """Packs of every epoch, made when first asked for.

    Args:
        table: sizes of the usable samples.
        config: caps of one pack.
        seed: of the epochs' orders.
    """

    def __init__(self, table: SampleTable, config: PackingConfig, seed: int) -> None:
        self.table = table
        self._config = config
        self._seed = seed
        self._epochs: dict[int, list[Pack]] = {}
        description = {"version": PLAN_VERSION, "seed": seed, "samples": table.fingerprint, **asdict(config)}
        self.hash = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()

    def epoch(self, number: int) -> list[Pack]:
        """The packs of an epoch; the last two asked for are kept.

        Raises:
            ValueError: when the weights leave an epoch without samples.
        """
        if number not in self._epochs:
            order = epoch_order(self.table.weights, self._seed, number)
            if not len(order):
                raise ValueError(f"epoch {number} has no samples: the weights sum to {self.table.weights.sum():.3g}")
            groups = pack_best_fit(order, self.table.num_tokens, self.table.num_frames, self._config)
            while len(self._epochs) > 1:
                del self._epochs[min(self._epochs)]
            self._epochs[number] = [self._pack(entries) for entries in groups]
        return self._epochs[number]

    def take(self, position: PackPosition, count: int, *, num_epochs: int | None) -> tuple[list[Pack], PackPosition]:
        """The next `count` packs and where they end; fewer where `num_epochs` end before."""
        packs: list[Pack] = []
        epoch, start = position
        while len(packs) < count and (num_epochs is None or epoch < num_epochs):
            available = self.epoch(epoch)
            taken = available[start : start + count - len(packs)]
            packs += taken
            start += len(taken)
            if start >= len(available):
                epoch, start = epoch + 1, 0
        return packs, PackPosition(epoch, start)

    def pack_shape(self, pack: Pack) -> PackShape:
        """Sizes of one of its packs."""
        counts = self.table.num_vision_tokens[list(pack.entries)]
        return PackShape(num_tokens=pack.num_tokens, vision_counts=tuple(counts.tolist()), num_targets=pack.num_targets)

    def num_steps(self, packs_per_step: int, num_epochs: int) -> int:
        """Steps that show `num_epochs` epochs once; the last may have fewer packs."""
        num_packs = sum(len(self.epoch(number)) for number in range(num_epochs))
        return -(-num_packs // packs_per_step)

    def _pack(self, entries: Sequence[int]) -> Pack:
        chosen = np.asarray(entries)
        return Pack(
            entries=tuple(entries),
            num_tokens=int(self.table.num_tokens[chosen].sum()),
            num_vision_tokens=int(self.table.num_vision_tokens[chosen].sum()),
            num_targets=int(self.table.num_targets[chosen].sum()),
        )


def epoch_order(weights: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Entries in the order of an epoch: each as often as its weight says, a fraction by a seeded draw."""
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    times = np.floor(weights).astype(np.int64) + (generator.random(len(weights)) < weights % 1.0)
    return generator.permutation(np.repeat(np.arange(len(weights)), times))


def pack_best_fit(
    order: Sequence[int] | np.ndarray, num_tokens: np.ndarray, num_frames: np.ndarray, config: PackingConfig
) -> list[list[int]]:
    """Packs of whole entries: each opens with the entry that has waited longest, then takes the longest that fits.

    The first rule keeps anything from waiting for ever, the second fills the pack.
    """
    # an item is (tokens, place in the order, entry): sorted by tokens it is the buffer, by place the queue
    entries_in_order = [(int(num_tokens[entry]), place, int(entry)) for place, entry in enumerate(order)]
    arrivals = {item[1]: item for item in entries_in_order[: config.buffer_size]}  # insertion order = waiting longest
    buffer = sorted(arrivals.values())
    upcoming = iter(entries_in_order[config.buffer_size :])
    packs = []
    while buffer:
        entries: list[int] = []
        tokens, frames = config.max_tokens, config.max_frames
        item: tuple[int, int, int] | None = next(iter(arrivals.values()))
        while item is not None:
            buffer.remove(item)
            del arrivals[item[1]]
            entries.append(item[2])
            tokens -= item[0]
            frames = None if frames is None else frames - int(num_frames[item[2]])
            refill = next(upcoming, None)
            if refill is not None:
                bisect.insort(buffer, refill)
                arrivals[refill[1]] = refill
            item = _longest_that_fits(buffer, num_frames, tokens, frames)
        packs.append(entries)
    return packs


def _longest_that_fits(
    buffer: list[tuple[int, int, int]], num_frames: np.ndarray, tokens: int, frames: int | None
) -> tuple[int, int, int] | None:
    for number in range(bisect.bisect_right(buffer, tokens, key=lambda item: item[0]) - 1, -1, -1):
        if frames is None or int(num_frames[buffer[number][2]]) <= frames:
            return buffer[number]
    return None


def assign_packs(costs: Sequence[float], world_size: int) -> list[list[int]]:
    """Pack numbers of each rank: the costliest first to the rank with the least, at most ceil(G / world_size) each.

    assign_packs([5, 1, 4, 2], 2) -> [[0, 1], [2, 3]]
    """
    limit = -(-len(costs) // world_size)
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0.0] * world_size
    for number in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
        rank = min((r for r in range(world_size) if len(ranks[r]) < limit), key=lambda r: (loads[r], r))
        ranks[rank].append(number)
        loads[rank] += costs[number]
    return [sorted(numbers) for numbers in ranks]
