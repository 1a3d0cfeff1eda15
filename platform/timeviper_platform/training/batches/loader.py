"""A rank's micro-batches of every step, from the global plan: read ahead in a thread, or by Ray Data (ray_loader.py).

Knows which packs of a step are this rank's. Does not know the model, the loss or DeepSpeed; how a pack becomes tensors
is in step_batches.py. Every rank gets ceil(G / world_size) micro-batches a step: unequal numbers would deadlock ZeRO,
so what is missing is a dummy that weighs nothing.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from torch import Tensor

from timeviper_model.batching.batch import Sample
from timeviper_platform.training.batches.collate import read_vision_rows
from timeviper_platform.training.batches.packing import Pack, PackPlan, PackPosition, PackShape, assign_packs
from timeviper_platform.training.batches.rows import SampleRows
from timeviper_platform.training.batches.samples import SampleBuilder
from timeviper_platform.training.batches.step_batches import (
    BatchShape,
    PackTask,
    StepBatches,
    StepReader,
    StepTask,
    step_bytes,
)

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Iterates `source` in a thread; at most `max_bytes` wait, and always at least one item.

    An exception of the source comes out of the consumer's `next()`. Close it to end the thread early.

    Args:
        source: what to run ahead of.
        num_bytes: size of an item.
        max_bytes: how much may wait.
    """

    def __init__(self, source: Iterator[T], *, num_bytes: Callable[[T], int], max_bytes: int) -> None:
        self._source = source
        self._num_bytes = num_bytes
        self._max_bytes = max_bytes
        self._waiting: deque[tuple[T, int]] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._finished = False
        self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._finished)
            if self._waiting:
                item, size = self._waiting.popleft()
                self._bytes -= size
                self._changed.notify_all()
                return item
            if self._error is not None:
                raise self._error
            raise StopIteration

    def close(self) -> None:
        """Ends the thread and forgets what waits."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            for item in self._source:
                size = self._num_bytes(item)
                with self._changed:
                    self._changed.wait_for(
                        lambda size=size: (  # type: ignore[misc]  # a default binds the loop's value
                            self._closed or not self._waiting or self._bytes + size <= self._max_bytes
                        )
                    )
                    if self._closed:
                        return
                    self._waiting.append((item, size))
                    self._bytes += size
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, which raises it
            self._error = error
        finally:
            with self._changed:
                self._finished = True
                self._changed.notify_all()


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderConfig:
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
            raise ValueError(f"loader: {self.num_readers = } must be at least 1, {self.cpus_per_reader = } above 0")


class BatchLoader:
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
        shape: BatchShape,
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

    def tasks(self, start: PackPosition, first_step: int, last_step: int) -> Iterator[StepTask]:
        """What is to be read for the steps after `first_step`, up to and with `last_step`, from position `start`."""
        position = start
        for step in range(first_step + 1, last_step + 1):
            packs, position = self._plan.take(position, self._shape.packs_per_step, num_epochs=self._shape.num_epochs)
            if not packs:
                raise RuntimeError(f"the plan ends before {step = } of {last_step}; this is a bug in the phase's steps")
            yield self._task(step, packs, position)

    def steps(self, start: PackPosition, first_step: int, last_step: int) -> Iterator[StepBatches]:
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

    def _task(self, step: int, packs: list[Pack], end: PackPosition) -> StepTask:
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


PrefetchSteps = Callable[[BatchLoader, PackPosition, int, int, LoaderConfig], Prefetcher[StepBatches]]
"""(loader, start, first_step, last_step, config) to `loader.steps(start, first_step, last_step)`, read before they are
asked for. Close it when leaving early."""


def prefetch_in_thread(
    loader: BatchLoader, start: PackPosition, first_step: int, last_step: int, config: LoaderConfig
) -> Prefetcher[StepBatches]:
    """The PrefetchSteps that needs nobody else.

    Raises:
        ValueError: when the configuration asks for Ray Data.
    """
    if config.reader != "thread":
        raise ValueError(f"{config.reader = } needs Ray: submit jobs/train.py, or choose thread")
    steps = loader.steps(start, first_step, last_step)
    return Prefetcher(steps, num_bytes=step_bytes, max_bytes=config.prefetch_bytes)
