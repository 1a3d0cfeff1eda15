"""A rank's steps, read by Ray Data: tasks in, batches out in the same order, built by processes on any node.

With trainer.py the one module of training/ that imports Ray. The order is the plan's and never Ray Data's: a task says
which rows are in a step, so that a run resumes in the middle of an epoch whatever Ray Data knows.
Both travel as pickles, which only this module writes and reads, inside one cluster, as Ray's own arguments do.
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

from timeviper_platform.training.batches.loader import BatchLoader, LoaderConfig, Prefetcher
from timeviper_platform.training.batches.packing import PackPosition
from timeviper_platform.training.batches.step_batches import StepBatches, StepReader, StepTask, step_bytes

STEPS_PER_GRAPH = 512
"""All tasks of a graph stand in the rank's memory; new readers for the next one hide behind what waits."""

COLUMN = "item"


def prefetch_on_ray(
    loader: BatchLoader, start: PackPosition, first_step: int, last_step: int, config: LoaderConfig
) -> Prefetcher[StepBatches]:
    """The PrefetchSteps on the connected cluster."""
    steps = _steps(loader.reader, loader.tasks(start, first_step, last_step), config)
    return Prefetcher(steps, num_bytes=step_bytes, max_bytes=config.prefetch_bytes)


def _steps(reader: StepReader, tasks: Iterable[StepTask], config: LoaderConfig) -> Iterator[StepBatches]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    compute = ray.data.ActorPoolStrategy(size=config.num_readers, max_tasks_in_flight_per_actor=2)
    left = iter(tasks)
    while page := list(islice(left, STEPS_PER_GRAPH)):
        # a block a task, put there by the rank: see graph.py of data/
        dataset = ray.data.from_arrow([_table(task) for task in page]).map_batches(
            _Read,
            fn_constructor_args=(reader,),
            compute=compute,
            num_cpus=config.cpus_per_reader,
            batch_size=1,
            batch_format="pyarrow",
            zero_copy_batch=True,
        )
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for value in table[COLUMN]:
                yield pickle.loads(value.as_buffer())


class _Read:
    """The actor: a table of one task to a table of one step."""

    def __init__(self, reader: StepReader) -> None:
        torch.set_num_threads(1)
        self._reader = reader

    def __call__(self, table: pa.Table) -> pa.Table:
        (value,) = table[COLUMN]
        return _table(self._reader.read(pickle.loads(value.as_buffer())))


def _table(item: Any) -> pa.Table:
    return pa.table({COLUMN: pa.array([pickle.dumps(item)], pa.large_binary())})
