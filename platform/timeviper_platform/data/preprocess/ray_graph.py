"""A Ray task per plan page, then a Ray Data pipeline over write tasks whose pools follow the cluster.

fused   tasks -> [decode, encode, write, commit]
split   tasks -> [decode] -> [encode, write, commit]
"""

from __future__ import annotations

import gc
import itertools
import logging
import math
import os
import pickle
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from timeviper_platform.common import storage
from timeviper_platform.common.cluster_checks import check_cluster_can_give, working_nodes
from timeviper_platform.common.ray_cluster import connect, has_cluster
from timeviper_platform.data.media.medium import Medium
from timeviper_platform.data.plan.segments import PlanSpec, Segment, plan_page
from timeviper_platform.data.preprocess.calibrate import Calibration, calibrate, sample_of
from timeviper_platform.data.preprocess.config import ExecutionConfig
from timeviper_platform.data.preprocess.node_log import NodeLog
from timeviper_platform.data.preprocess.progress import RunMetrics
from timeviper_platform.data.preprocess.tasks import TaskResult, WriteTask, cut_tasks
from timeviper_platform.data.preprocess.worker import DecodeWorker, EncodeWorker, FusedWorker, WorkerSpec

logger = logging.getLogger(__name__)

PLAN_CPUS = 0.25

TASKS_PER_ACTOR = 2
"""An actor decodes or encodes one and writes the other."""

TASKS_PER_ROUND = 131_072
"""Maximum tasks per Ray Data pipeline: half an hour of 64 GPUs. Each pipeline starts new actors."""

SEGMENTS_PER_ROUND = 8 * TASKS_PER_ROUND
"""Maximum segments in the object store, at about 200 bytes each."""

BLOCKS_PER_ROUND = 4096
"""Blocks of a large round, or more for many workers. Each costs the driver milliseconds and 43 KB, so it holds several
tasks.
"""

BLOCKS_PER_WORKER = 16
"""Minimum blocks per worker in a large round, because workers wait for the last block."""

FRAMES_PER_ROW = 4096
"""Maximum frames of the tasks whose results reach the driver together: 7 s of a GPU of 617 frames/s."""

DECODE_MARGIN = 1.1
"""Factor on the decoders that the calibration requires: a waiting GPU costs more than a waiting core."""

UNKNOWN_SLOTS = 8
"""Number of workers assumed when a small input is cut into tasks while no node is up."""

MAX_BLOCK_BYTES = 512 << 20
"""Maximum size of a task's frames in the object store."""


class Nodes(NamedTuple):
    """What a cluster, or this machine, offers."""

    resources: Sequence[Mapping[str, float]]
    """CPU and GPU of each node"""

    @classmethod
    def now(cls) -> Nodes:
        if not has_cluster():
            return cls([{"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}])
        with connect():
            return cls([node["Resources"] for node in working_nodes()])

    def total(self, name: str) -> float:
        return sum(node.get(name, 0.0) for node in self.resources)

    @property
    def num_cpus(self) -> int:
        return max(1, int(self.total("CPU")))


def pool_sizes(nodes: Nodes, config: ExecutionConfig, cost: Calibration | None) -> tuple[int, int]:
    """Returns the numbers of decoders and encoders that the nodes hold; fused workers are encoders."""
    cpus, gpus = config.cpus_per_worker, config.gpus_per_worker
    if gpus:
        room = sum(int(node.get("GPU", 0.0) / gpus + 1e-9) for node in nodes.resources)
    else:  # one per CPU, although a worker reserves less
        room = sum(int(node.get("CPU", 0.0)) for node in nodes.resources if node.get("CPU", 0.0) >= cpus)
    if config.mode == "fused":
        return 0, _bounded(room, config)
    seconds = (1.0, 1.0) if cost is None else (cost.decode_seconds, max(1e-9, cost.encode_seconds))
    if not gpus and config.num_workers is None:  # both share the CPUs
        total = sum(int(node.get("CPU", 0.0) / cpus + 1e-9) for node in nodes.resources)
        room = round(total * seconds[1] / sum(seconds))
    encoders = _bounded(room, config)
    if config.num_decode_workers is not None:
        return config.num_decode_workers, encoders
    free = int((nodes.total("CPU") - encoders * cpus) / cpus + 1e-9)
    return max(1, min(_decoders_for(encoders, seconds), free)), encoders


def _bounded(room: int, config: ExecutionConfig) -> int:
    return max(config.min_workers or 1, min(room, config.num_workers or room))


def _decoders_for(num_encoders: int, seconds: tuple[float, float]) -> int:
    return max(1, math.ceil(num_encoders * DECODE_MARGIN * seconds[0] / seconds[1]))


def plan_on_ray(pages: Iterable[list[Medium]], spec: PlanSpec) -> Iterator[pa.Table]:
    import ray

    with connect():
        remote_plan = ray.remote(num_cpus=PLAN_CPUS)(plan_remotely)
        running: deque[Any] = deque()
        for page in pages:
            running.append(remote_plan.remote(page, spec))
            if len(running) > max(2, Nodes.now().num_cpus / PLAN_CPUS):
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
        check_workers_fit(config)
        config, cost = settle_mode(config, missing, spec)
        nodes = Nodes.now()
        num_workers = max(pool_sizes(nodes, config, cost)) if nodes.resources else UNKNOWN_SLOTS
        logger.info("%d segments to process; starting %d workers", len(missing), num_workers)
        num_tasks = sum(segment.num_frames for segment in missing) // config.frames_per_file
        tasks = cut_tasks(missing, config.frames_per_file, num_workers)
        metrics = RunMetrics(spec.feature_store)
        with NodeLog():
            for blocks in rounds(tasks, num_tasks, num_workers, tasks_per_row(config)):
                steps = pipeline_steps(spec, config, cost, Nodes.now(), len(blocks))
                for result in run_round(blocks, steps):
                    metrics.add(result)
                    yield result


def check_workers_fit(config: ExecutionConfig) -> None:
    """Raises ValueError if no node of the connected Ray can ever hold a worker."""
    check_cluster_can_give(
        {"CPU": config.cpus_per_worker} | ({"GPU": config.gpus_per_worker} if config.gpus_per_worker else {}),
        wanted_by="each worker (execution.gpus_per_worker, execution.cpus_per_worker)",
        way_out="add such a node, or lower them (without GPUs also encoder.device=cpu)",
    )


def settle_mode(
    config: ExecutionConfig, missing: Iterable[Segment], spec: WorkerSpec
) -> tuple[ExecutionConfig, Calibration | None]:
    """Measures costs in a worker if a setting depends on them; replaces mode auto by the faster mode."""
    if config.mode == "fused" or (config.mode == "split" and config.num_decode_workers is not None):
        return config, None
    cost = calibrate_on_ray(sample_of(missing), spec, config)
    if cost is None:
        return replace(config, mode="fused" if config.mode == "auto" else config.mode), None
    if config.mode == "auto":
        nodes = Nodes.now()
        slots = pool_sizes(nodes, replace(config, mode="split"), cost)
        mode = cost.best_mode(*slots, num_cores=nodes.num_cpus, has_gpu=spec.encoder.device != "cpu")
        config = replace(config, mode=mode)
    logger.info(
        "mode %s: a frame takes %.1f ms to decode and %.1f ms to encode",
        *(config.mode, 1e3 * cost.decode_seconds / cost.frames, 1e3 * cost.encode_seconds / cost.frames),
    )
    return config, cost


def calibrate_on_ray(segments: list[Segment], spec: WorkerSpec, config: ExecutionConfig) -> Calibration | None:
    """Measures in a task with a worker's resources: the driver needs no GPU. Waits until a node has them."""
    import ray

    options = {"num_cpus": config.cpus_per_worker, "num_gpus": config.gpus_per_worker or None}
    with connect():
        check_workers_fit(config)
        found: Calibration | None = ray.get(ray.remote(**options)(calibrate_here).remote(segments, spec))
        return found


def calibrate_here(segments: list[Segment], spec: WorkerSpec) -> Calibration | None:
    torch.set_num_threads(spec.num_threads)
    return calibrate(segments, spec, spec.new_encoder())


def tasks_per_row(config: ExecutionConfig) -> int:
    """Returns how many results reach the driver together: one on CPUs, which are slow, and in split mode."""
    is_fast = config.mode == "fused" and config.gpus_per_worker > 0
    return max(1, FRAMES_PER_ROW // config.frames_per_file) if is_fast else 1


def rounds(
    tasks: Iterable[WriteTask], num_tasks: int, num_workers: int, tasks_per_row: int = 1
) -> Iterator[list[pa.Table]]:
    """Yields the blocks of each round. Only a large round has several tasks in a block.

    Args:
        num_tasks: an estimate, such as a lower bound.
        tasks_per_row: must be fixed: when Ray repeats a call, it skips as many rows as it already has.
    """
    max_blocks = max(BLOCKS_PER_ROUND, BLOCKS_PER_WORKER * num_workers)
    iterator, num_done = iter(tasks), 0
    while True:
        per_block = max(1, -(-min(TASKS_PER_ROUND, num_tasks - num_done) // max_blocks))
        blocks: list[pa.Table] = []
        num_segments = 0
        while len(blocks) < max_blocks and num_segments < SEGMENTS_PER_ROUND:
            if not (block := list(itertools.islice(iterator, per_block))):
                break
            blocks.append(to_block(block, tasks_per_row))
            num_segments += sum(len(task.segments) for task in block)
            num_done += len(block)
        if not blocks:
            return
        yield blocks


def run_round(blocks: list[pa.Table], steps: Sequence[dict[str, Any]]) -> Iterator[TaskResult]:
    """Runs one Ray Data pipeline; yields results as they finish. Empties `blocks`, which are in the object store."""
    import ray

    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    context.target_max_block_size = 1  # bytes: each row of results is a separate block and arrives at once
    # a pool grows while all actors have all calls they may have, and shrinks when one has none
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    context.autoscaling_config.actor_pool_util_downscaling_threshold = 0.0
    # From the driver: read tasks need a whole CPU, and a small machine has none left.
    with ray.data.DataContext.current(context):
        dataset = ray.data.from_arrow(blocks)
        blocks.clear()
        for step in steps:
            dataset = dataset.map_batches(batch_size=1, batch_format="pyarrow", zero_copy_batch=True, **step)
    for bundle in dataset.iter_internal_ref_bundles():  # `iter_batches` calls an actor for its statistics per block
        for block in ray.get(bundle.block_refs):
            yield from from_block(block)


def pipeline_steps(
    spec: WorkerSpec, config: ExecutionConfig, cost: Calibration | None, nodes: Nodes, num_blocks: int
) -> list[dict[str, Any]]:
    """Returns the arguments of `Dataset.map_batches` for each step.

    Pools start with the workers that `nodes` hold, at most one per block.
    """
    import ray

    def actors(step: type[_Step], cpus: float, in_flight: int, num_gpus: float = 0.0, **pool: Any) -> dict[str, Any]:
        compute = ray.data.ActorPoolStrategy(
            **pool,
            max_tasks_in_flight_per_actor=in_flight,
            max_concurrent_calls_per_actor=TASKS_PER_ACTOR,
            enable_true_multi_threading=True,
        )
        resources = {"num_cpus": cpus} | ({"num_gpus": num_gpus} if num_gpus else {})
        return {"fn": step, "fn_constructor_args": (spec,), "compute": compute, **resources}

    num_decoders, num_encoders = (min(size, num_blocks) for size in pool_sizes(nodes, config, cost))
    initial_size = min(config.initial_workers or num_encoders, num_blocks)
    min_size = min(config.min_workers or 1, initial_size)
    pool = {"min_size": min_size, "max_size": config.num_workers, "initial_size": initial_size}
    if config.mode == "fused":
        return [actors(FusedStep, fused_cpus(config, nodes), TASKS_PER_ACTOR, config.gpus_per_worker, **pool)]
    decoders: dict[str, Any] = {"min_size": 1, "initial_size": num_decoders}
    if config.num_decode_workers is not None:
        decoders = {"size": num_decoders}
    elif config.num_workers is not None and cost is not None:
        wanted = _decoders_for(config.num_workers, (cost.decode_seconds, max(1e-9, cost.encode_seconds)))
        decoders["max_size"] = max(num_decoders, wanted)
    return [
        # a third task would wait here although another decoder may be free
        actors(DecodeStep, config.cpus_per_worker, TASKS_PER_ACTOR, **decoders),
        actors(EncodeStep, config.cpus_per_worker, TASKS_PER_ACTOR + 1, config.gpus_per_worker, **pool),
    ]


def fused_cpus(config: ExecutionConfig, nodes: Nodes) -> float:
    """Returns the CPUs that a fused worker reserves: more than configured, if a node would hold more workers than CPUs.

    Example: 16 CPUs hold 21 workers of 0.75 CPUs, but 16 of 16 / 16.99.
    """
    largest = max((node.get("CPU", 0.0) for node in nodes.resources), default=0.0)
    if config.gpus_per_worker or config.num_workers is not None:
        return config.cpus_per_worker
    return max(config.cpus_per_worker, largest / (largest + 0.99))


class _Step:
    worker: ClassVar[type[FusedWorker] | type[DecodeWorker] | type[EncodeWorker]]

    def __init__(self, spec: WorkerSpec) -> None:
        spec.proof.check()
        self._worker = self.worker(spec)
        gc.collect()
        gc.freeze()  # the 400 000 objects loaded so far stay: scanning them takes 0.25 s per collection

    def __call__(self, block: pa.Table) -> pa.Table:
        results = [self._worker.process(task) for task in from_block(block)]
        return to_block(results, len(results))


class FusedStep(_Step):
    worker = FusedWorker


class DecodeStep(_Step):
    worker = DecodeWorker


class EncodeStep(_Step):
    worker = EncodeWorker


def to_block(values: Sequence[WriteTask | TaskResult], values_per_row: int = 1) -> pa.Table:
    """Pickles values into Arrow rows whose arrays are read without a copy."""
    rows = []
    for start in range(0, len(values), values_per_row):
        arrays: list[pickle.PickleBuffer] = []
        row = list(values[start : start + values_per_row])
        pickled = pickle.dumps(row, protocol=5, buffer_callback=arrays.append)
        rows.append({"pickled": pickled, "arrays": [array.raw() for array in arrays]})
    return pa.Table.from_pylist(rows, schema=BLOCK)


def from_block(block: pa.Table) -> list[Any]:
    """Returns the values; their arrays are views of the block."""
    rows = zip(block["pickled"], block["arrays"], strict=True)
    return [
        value for pickled, arrays in rows for value in pickle.loads(pickled.as_py(), buffers=_buffers(arrays.values))
    ]


def _buffers(values: pa.LargeBinaryArray) -> list[pa.Buffer]:
    """Slices of the array's memory, where scalars would be copies."""
    _, offsets, data = values.buffers()
    if not len(values):
        return []
    bounds = np.frombuffer(offsets, np.int64)[values.offset : values.offset + len(values) + 1].tolist()
    return [data.slice(start, end - start) for start, end in itertools.pairwise(bounds)]


BLOCK = pa.schema([("pickled", pa.large_binary()), ("arrays", pa.large_list(pa.large_binary()))])
