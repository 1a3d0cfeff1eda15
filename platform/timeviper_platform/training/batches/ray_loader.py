"""Reads a rank's steps with Ray Data, on any node.

The plan decides the rows of each step, so a run can resume within an epoch.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import pyarrow as pa
import ray
import ray.data
import torch

from timeviper_platform.training.batches.collate import PackReader
from timeviper_platform.training.batches.loader import BatchLoader, LoaderConfig, Prefetcher
from timeviper_platform.training.batches.packing import PackPosition
from timeviper_platform.training.batches.step_batches import PackTask, StepBatches, StepCounts

STEPS_PER_GRAPH = 512
"""Maximum steps per Ray Data graph; limits the tasks in memory."""

COLUMN = "item"


def prefetch_on_ray(
    loader: BatchLoader,
    start: PackPosition,
    first_step: int,
    last_step: int,
    config: LoaderConfig,
    *,
    steps_per_graph: int = STEPS_PER_GRAPH,
) -> Prefetcher[StepBatches]:
    steps = _steps(loader, loader.tasks(start, first_step, last_step), config, steps_per_graph)
    return Prefetcher(steps, num_bytes=lambda step: step.num_bytes, max_bytes=config.prefetch_bytes)


def _steps(
    loader: BatchLoader, tasks: Iterable[tuple[StepCounts, list[PackTask]]], config: LoaderConfig, steps_per_graph: int
) -> Iterator[StepBatches]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    compute = ray.data.ActorPoolStrategy(size=config.num_readers, max_tasks_in_flight_per_actor=2)
    left = iter(tasks)
    while page := list(islice(left, steps_per_graph)):
        # one block per task keeps the plan's order
        dataset = ray.data.from_arrow([_table(packs) for _, packs in page]).map_batches(
            _Read,
            fn_constructor_args=(loader.reader,),
            compute=compute,
            num_cpus=config.cpus_per_reader,
            batch_size=1,
            batch_format="pyarrow",
            zero_copy_batch=True,
        )
        tables = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        values = (value for table in tables for value in table[COLUMN])
        for (counts, _), value in zip(page, values, strict=True):
            yield loader.batches(counts, pickle.loads(value.as_buffer()))


class _Read:
    """Actor that turns one step's packs into micro-batches."""

    def __init__(self, reader: PackReader) -> None:
        torch.set_num_threads(1)
        self._reader = reader

    def __call__(self, table: pa.Table) -> pa.Table:
        (value,) = table[COLUMN]
        return _table(self._reader.read(pickle.loads(value.as_buffer())))


def _table(item: Any) -> pa.Table:
    return pa.table({COLUMN: pa.array([pickle.dumps(item)], pa.large_binary())})
