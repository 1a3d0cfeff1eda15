"""A Ray task per plan page, then a graph of actors over write tasks.

fused   tasks -> [decode, encode, write, commit]
split   tasks -> [decode] -> [encode, write, commit]
"""

from __future__ import annotations

import gc
import itertools
import logging
import os
import pickle
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch

from timeviper_platform.common import storage
from timeviper_platform.common.listing import pages
from timeviper_platform.common.ray_cluster import connect, has_cluster
from timeviper_platform.data.media.medium import Medium
from timeviper_platform.data.plan.segments import PlanSpec, Segment, plan_page
from timeviper_platform.data.preprocess.calibrate import Calibration, calibrate, sample_of
from timeviper_platform.data.preprocess.config import ExecutionConfig
from timeviper_platform.data.preprocess.progress import RunMetrics
from timeviper_platform.data.preprocess.tasks import TaskResult, WriteTask, cut_tasks
from timeviper_platform.data.preprocess.worker import DecodeWorker, EncodeWorker, FusedWorker, WorkerSpec

logger = logging.getLogger(__name__)

PLAN_CPUS = 0.25

TASKS_PER_ACTOR = 2
"""An actor decodes or encodes one and writes the other."""

TASKS_PER_GRAPH = 4096
"""Maximum tasks in the driver's memory."""

MAX_BLOCK_BYTES = 512 << 20
"""Maximum size of a task's frames in the object store."""


def plan_on_ray(pages: Iterable[list[Medium]], spec: PlanSpec) -> Iterator[pa.Table]:
    """Plans with a Ray task per page."""
    import ray

    with connect():
        remote_plan = ray.remote(num_cpus=PLAN_CPUS)(plan_remotely)
        running: deque[Any] = deque()
        max_running = max(2, round(num_cpus() / PLAN_CPUS))
        for page in pages:
            running.append(remote_plan.remote(page, spec))
            if len(running) == max_running:
                yield from tables_of(ray.get(running.popleft()))
        while running:
            yield from tables_of(ray.get(running.popleft()))


def plan_remotely(page: list[Medium], spec: PlanSpec) -> tuple[list[pa.Table], int]:
    """Returns the PLAN tables of a page and the number of storage retries."""
    before = storage.num_retries()
    return list(plan_page(page, spec)), storage.num_retries() - before


def tables_of(result: tuple[list[pa.Table], int]) -> list[pa.Table]:
    tables, retries = result
    storage.add_retries(retries)
    return tables


def run_on_ray(missing: Collection[Segment], spec: WorkerSpec, config: ExecutionConfig) -> Iterator[TaskResult]:
    """Yields task results as they finish.

    Raises:
        ValueError: if one file's frames exceed a block of the object store.
    """
    frame_bytes = spec.image_size**2 * 3
    block_bytes = config.frames_per_file * frame_bytes
    if config.mode != "fused" and block_bytes > MAX_BLOCK_BYTES:
        raise ValueError(
            f"{config.frames_per_file = } makes blocks of {block_bytes} bytes; in modes split and auto use at most"
            f" {MAX_BLOCK_BYTES // frame_bytes}"
        )
    with connect():
        config = settle_mode(config, missing, spec)
        num_decoders, num_encoders = worker_slots(config)
        logger.info("%d segments to process; starting %d workers", len(missing), num_encoders)
        num_workers = num_encoders if config.mode == "fused" else max(num_encoders, num_decoders)
        for tasks in pages(cut_tasks(missing, config.frames_per_file, num_workers), TASKS_PER_GRAPH):
            yield from _run_graph(tasks, spec, config)


def settle_mode(config: ExecutionConfig, missing: Iterable[Segment], spec: WorkerSpec) -> ExecutionConfig:
    """Replaces mode auto by the faster mode, measured in a worker."""
    import ray

    if config.mode != "auto":
        return config
    options = {"num_cpus": config.cpus_per_worker, "num_gpus": config.gpus_per_worker or None}
    found: Calibration | None = ray.get(ray.remote(**options)(_calibrate).remote(sample_of(missing), spec))
    if found is None:
        return replace(config, mode="fused")
    num_decoders, num_encoders = worker_slots(config)
    has_gpu = spec.encoder.device != "cpu"
    mode = found.best_mode(num_decoders, num_encoders, num_cores=num_cpus(), has_gpu=has_gpu)
    logger.info(
        "mode %s: a frame takes %.1f ms to decode and %.1f ms to encode, with %d decoders and %d encoders",
        *(mode, 1e3 * found.decode_seconds / found.frames, 1e3 * found.encode_seconds / found.frames),
        *(num_decoders, num_encoders),
    )
    return replace(config, mode=mode)


def _calibrate(segments: list[Segment], spec: WorkerSpec) -> Calibration | None:
    torch.set_num_threads(spec.num_threads)
    return calibrate(segments, spec, spec.new_encoder())


def _run_graph(tasks: Sequence[WriteTask], spec: WorkerSpec, config: ExecutionConfig) -> Iterator[TaskResult]:
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    # One block per task from the driver: read tasks need a whole CPU, and a small machine has none left.
    dataset = ray.data.from_arrow([to_block([task]) for task in tasks])
    for step in _steps(spec, config, len(tasks)):
        dataset = dataset.map_batches(batch_size=1, batch_format="pyarrow", zero_copy_batch=True, **step)
    metrics = RunMetrics()
    for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for result in from_block(block):
            metrics.add(result)
            yield result


def _steps(spec: WorkerSpec, config: ExecutionConfig, num_tasks: int) -> list[dict[str, Any]]:
    import ray

    def actors(step: type[_Step], in_flight: int, num_gpus: float | None = None, **pool: Any) -> dict[str, Any]:
        compute = ray.data.ActorPoolStrategy(
            **pool,
            max_tasks_in_flight_per_actor=in_flight,
            max_concurrent_calls_per_actor=TASKS_PER_ACTOR,
            enable_true_multi_threading=True,
        )
        resources = {"num_cpus": config.cpus_per_worker} | ({"num_gpus": num_gpus} if num_gpus else {})
        return {"fn": step, "fn_constructor_args": (spec,), "compute": compute, **resources}

    num_decoders, num_encoders = (min(slots, num_tasks) for slots in worker_slots(config))
    min_size = min(config.min_workers or config.initial_workers or num_encoders, num_encoders)
    initial_size = min(config.initial_workers or min_size, num_encoders)
    pool = {"min_size": min_size, "max_size": num_encoders, "initial_size": initial_size}
    if config.mode == "fused":
        return [actors(FusedStep, TASKS_PER_ACTOR, config.gpus_per_worker, **pool)]
    return [
        # a third task would wait here although another decoder may be free
        actors(DecodeStep, TASKS_PER_ACTOR, size=num_decoders),
        actors(EncodeStep, TASKS_PER_ACTOR + 1, config.gpus_per_worker, **pool),
    ]


def worker_slots(config: ExecutionConfig) -> tuple[int, int]:
    """Decoding and encoding processes, on the connected cluster or this machine."""
    if has_cluster():
        import ray

        with connect():
            num_gpus = int(ray.cluster_resources().get("GPU", 1))
    else:
        num_gpus = torch.cuda.device_count()
    num_encoders = num_gpus if config.gpus_per_worker else num_cpus()
    return config.num_decode_workers or num_cpus(), config.num_workers or max(1, num_encoders)


def num_cpus() -> int:
    if not has_cluster():
        return os.cpu_count() or 1
    import ray

    with connect():
        return max(1, int(ray.cluster_resources().get("CPU", 1)))


class _Step:
    worker: ClassVar[type[FusedWorker] | type[DecodeWorker] | type[EncodeWorker]]

    def __init__(self, spec: WorkerSpec) -> None:
        self._worker = self.worker(spec)
        gc.collect()
        gc.freeze()  # the 400 000 objects loaded so far stay: scanning them takes 0.25 s per collection

    def __call__(self, block: pa.Table) -> pa.Table:
        return to_block([self._worker.process(task) for task in from_block(block)])


class FusedStep(_Step):
    worker = FusedWorker


class DecodeStep(_Step):
    worker = DecodeWorker


class EncodeStep(_Step):
    worker = EncodeWorker


def to_block(values: Sequence[WriteTask | TaskResult]) -> pa.Table:
    """Pickles values into Arrow rows whose arrays are read without a copy."""
    rows = []
    for value in values:
        arrays: list[pickle.PickleBuffer] = []
        pickled = pickle.dumps(value, protocol=5, buffer_callback=arrays.append)
        rows.append({"pickled": pickled, "arrays": [array.raw() for array in arrays]})
    return pa.Table.from_pylist(rows, schema=BLOCK)


def from_block(block: pa.Table) -> list[Any]:
    """Returns the values; their arrays are views of the block."""
    return [
        pickle.loads(pickled.as_py(), buffers=_buffers(arrays.values))
        for pickled, arrays in zip(block["pickled"], block["arrays"], strict=True)
    ]


def _buffers(values: pa.LargeBinaryArray) -> list[pa.Buffer]:
    """Slices of the array's memory, where scalars would be copies."""
    _, offsets, data = values.buffers()
    if not len(values):
        return []
    bounds = np.frombuffer(offsets, np.int64)[values.offset : values.offset + len(values) + 1].tolist()
    return [data.slice(start, end - start) for start, end in itertools.pairwise(bounds)]


BLOCK = pa.schema([("pickled", pa.large_binary()), ("arrays", pa.large_list(pa.large_binary()))])
