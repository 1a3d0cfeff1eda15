"""Plans and reads a rank's micro-batches.

Every rank runs ceil(packs_per_step / world_size) of them per step, because unequal numbers would deadlock ZeRO.
Missing ones are dummies of weight 0.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from torch import Tensor

from timeviper_model.batching.batch import Sample
from timeviper_platform.training.batches.collate import PackReader
from timeviper_platform.training.batches.packing import Pack, PackPlan, PackPosition, assign_packs
from timeviper_platform.training.batches.rows import SampleRows
from timeviper_platform.training.batches.samples import SampleBuilder
from timeviper_platform.training.batches.step_batches import BatchShape, MicroBatch, PackTask, StepBatches, StepCounts

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Iterates `source` in a thread, at most `max_bytes` and at least one item ahead."""

    def __init__(self, source: Iterator[T], *, num_bytes: Callable[[T], int], max_bytes: int) -> None:
        self._source = source
        self._num_bytes = num_bytes
        self._max_bytes = max_bytes
        self._queue: deque[tuple[T, int]] = deque()
        self._queued_bytes = 0
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
            self._changed.wait_for(lambda: self._queue or self._finished)
            if self._queue:
                item, size = self._queue.popleft()
                self._queued_bytes -= size
                self._changed.notify_all()
                return item
            if self._error is not None:
                raise self._error
            raise StopIteration

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            for item in self._source:
                size = self._num_bytes(item)
                with self._changed:
                    self._changed.wait_for(
                        lambda size=size: (  # type: ignore[misc]  # a default binds the loop's value
                            self._closed or not self._queue or self._queued_bytes + size <= self._max_bytes
                        )
                    )
                    if self._closed:
                        return
                    self._queue.append((item, size))
                    self._queued_bytes += size
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - raised in the consumer
            self._error = error
        finally:
            with self._changed:
                self._finished = True
                self._changed.notify_all()


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderConfig:
    """Where a rank's batches are read, and how far ahead."""

    reader: Literal["thread", "ray_data"] = "thread"
    """thread: in a thread of the rank. ray_data: in Ray Data processes on any node. Both give the same batches."""
    num_readers: int = 2
    """Reader processes per rank (ray_data only)."""
    cpus_per_reader: float = 0.5
    """CPUs reserved per reader (ray_data only)."""
    prefetch_bytes: int = 256 << 20
    """Maximum bytes of batches read ahead."""
    cache_bytes: int = 256 << 20
    """Bytes of feature-store row groups cached in each reading process."""
    max_damaged_samples: int = 100
    """Maximum samples left out because their features cannot be read; above it, the run fails."""

    def __post_init__(self) -> None:
        if self.num_readers < 1 or self.cpus_per_reader <= 0:
            raise ValueError(f"loader: {self.num_readers = } must be at least 1, {self.cpus_per_reader = } above 0")


class BatchLoader:
    """One rank's batches for the steps of a phase."""

    def __init__(
        self,
        plan: PackPlan,
        rows: SampleRows,
        builder: SampleBuilder,
        shape: BatchShape,
        *,
        rank: int,
        world_size: int,
        pack_flops: Callable[[Pack], float] | None = None,
    ) -> None:
        self._plan = plan
        self._rows = rows
        self._shape = shape
        self._rank = rank
        self._world_size = world_size
        self._pack_flops = pack_flops
        self.reader = PackReader(builder, shape)

    @property
    def num_micro_steps(self) -> int:
        """Micro-batches per rank and step."""
        return -(-self._shape.packs_per_step // self._world_size)

    def steps(self, start: PackPosition, first_step: int, last_step: int) -> Iterator[StepBatches]:
        """Yields steps first_step + 1 .. last_step, whose packs begin at `start`."""
        for counts, packs in self.tasks(start, first_step, last_step):
            yield self.batches(counts, self.reader.read(packs))

    def tasks(
        self, start: PackPosition, first_step: int, last_step: int
    ) -> Iterator[tuple[StepCounts, list[PackTask]]]:
        """Yields the counts and this rank's packs of these steps."""
        position = start
        for step in range(first_step + 1, last_step + 1):
            packs, position = self._plan.take(position, self._shape.packs_per_step, num_epochs=self._shape.num_epochs)
            if not packs:
                raise RuntimeError(f"the plan ends before {step = } of {last_step}; this is a bug in the phase's steps")
            own = assign_packs([self._shape.cost(pack) for pack in packs], self._world_size)[self._rank]
            tasks = [PackTask(index, *self._planned(packs[index].indices)) for index in own]
            yield self._counts(step, packs, position), tasks

    def batches(self, counts: StepCounts, micro_batches: list[MicroBatch]) -> StepBatches:
        """Adds dummies up to `num_micro_steps`."""
        dummy = MicroBatch(self.reader.dummy, is_dummy=True)
        return StepBatches(counts, micro_batches + [dummy] * (self.num_micro_steps - len(micro_batches)))

    def samples(self, indices: Sequence[int]) -> Iterator[tuple[Sample, Tensor]]:
        """Yields samples and vision rows (num_vision_tokens, dim). Logs and skips unreadable ones."""
        for index in indices:
            ((row,), (sizes,)) = self._planned([index])
            item = self.reader.tokenize(row, sizes)
            try:
                features = self.reader.read_features(item)
            except RuntimeError as error:
                logger.warning("validation sample %s is left out: %s", row["sample_id"], error)
            else:
                yield item.sample, features

    def _counts(self, step: int, packs: list[Pack], end: PackPosition) -> StepCounts:
        num_tokens = sum(pack.num_tokens for pack in packs)
        padding = (self.num_micro_steps * self._world_size - len(packs)) * len(self.reader.dummy.input_ids)
        if self._shape.pad_to is not None:
            padding += self._shape.pad_to * len(packs) - num_tokens
        return StepCounts(
            step=step,
            num_targets=sum(pack.num_targets for pack in packs),
            num_tokens=num_tokens,
            num_vision_tokens=sum(pack.num_vision_tokens for pack in packs),
            num_samples=sum(len(pack.indices) for pack in packs),
            num_padding_tokens=padding,
            fill=num_tokens / (len(packs) * self._shape.max_tokens),
            flops=0.0 if self._pack_flops is None else sum(map(self._pack_flops, packs)),
            end=end,
        )

    def _planned(self, indices: Sequence[int]) -> tuple[list[dict[str, Any]], list[tuple[int, ...]]]:
        table = self._plan.table
        rows = [self._rows[int(table.row_indices[index])] for index in indices]
        return rows, [table.sizes(index) for index in indices]


PrefetchSteps = Callable[[BatchLoader, PackPosition, int, int, LoaderConfig], Prefetcher[StepBatches]]
"""(loader, start, first_step, last_step, config) -> `loader.steps(...)`, read ahead."""


def prefetch_in_thread(
    loader: BatchLoader, start: PackPosition, first_step: int, last_step: int, config: LoaderConfig
) -> Prefetcher[StepBatches]:
    """Raises ValueError when the configuration selects Ray Data."""
    if config.reader != "thread":
        raise ValueError(f"{config.reader = } needs Ray: submit jobs/train.py, or set loader.reader: thread")
    steps = loader.steps(start, first_step, last_step)
    return Prefetcher(steps, num_bytes=lambda step: step.num_bytes, max_bytes=config.prefetch_bytes)
