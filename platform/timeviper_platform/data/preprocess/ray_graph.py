"""The steps as a Ray Data graph: a table of units in, their outcomes out as they finish.

With ray_session.py and metrics.py what imports Ray in data/. Knows actors, their shares of CPUs and GPUs, and how units
travel in Arrow tables: one row a unit, so that a block is never less than a whole file's work. Does not know what a
unit means.

    fused   units -> [decode, encode, write, commit]              decoder and encoder share cores
    split   units -> [decode] -> [encode, write, commit]          the encoder has a GPU
"""

from __future__ import annotations

import gc
import logging
import os
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from threading import Lock
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from timeviper_platform.common import storage
from timeviper_platform.common.listing import pages
from timeviper_platform.common.ray_cluster import has_cluster, ray_session
from timeviper_platform.common.schemas import PLAN
from timeviper_platform.data.encode.frame_encoder import FrameEncoder
from timeviper_platform.data.media.container import DecodeError, ErrorType
from timeviper_platform.data.media.medium import Medium
from timeviper_platform.data.plan.segments import PlanSpec, Segment, WriteTask, iter_units, plan_page
from timeviper_platform.data.preprocess.calibrate import Calibration, calibrate, sample_of
from timeviper_platform.data.preprocess.progress import RunMetrics
from timeviper_platform.data.preprocess.worker import (
    DecodedSegment,
    RetryCount,
    SegmentDecoder,
    SegmentEncoder,
    TaskProcessor,
    TaskResult,
    TaskStart,
    WorkerSpec,
    process_name,
    write_unit,
)
from timeviper_platform.data.store.writer import ROW_GROUP_BYTES
from timeviper_platform.data.video.frames import FrameBatch

logger = logging.getLogger(__name__)

PLAN_CPUS = 0.25
"""Probing waits for disks and object stores."""

UNITS_AT_ONCE = 2
"""Of a step's actor: one is decoded, encoded or both while the one before it is handed over or written."""

UNITS_PER_GRAPH = 4096
"""All units of a graph stand in the driver's memory; at 2048 frames each, new workers for the next cost nothing."""

MAX_BLOCK_BYTES = 512 << 20
"""Frames of one unit in Ray's object store, where the steps are split."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutionConfig:
    """How the work is spread."""

    mode: Literal["fused", "split", "auto"] = "fused"
    """split gives decoding its own workers, as a GPU's encoder wants when decoding takes longer; auto measures a few
    segments in a worker first, and takes what promises more"""
    num_workers: int | None = None
    """most processes that encode; None = one a CPU, or one a GPU where gpus_per_worker asks for any"""
    min_workers: int | None = None
    """fewest of them: below num_workers, more are started while units wait; None = initial_workers, else num_workers"""
    initial_workers: int | None = None
    """of them at the start; None = min_workers"""
    num_decode_workers: int | None = None
    """split alone; None = one a CPU"""
    cpus_per_worker: float = 0.75
    """below 1, so that Ray's own small tasks find room; on two cores whole numbers starve them"""
    gpus_per_worker: float = 0.0
    num_threads: int = 1
    """torch threads of a worker"""
    frames_per_file: int = 2048
    """about how many frames a data file holds; 8192 make 302 MB at 16 x 1152"""
    row_group_bytes: int = ROW_GROUP_BYTES
    """of features: what a data file's row group holds at least, and a reader reads at least; changes no features"""
    progress_seconds: float = 5.0
    """between lines of progress in the log; a terminal has a bar instead"""
    max_consecutive_failures: int | None = 100
    """media in a row that fail for one and the same reason before the job stops; None = it never does"""

    def __post_init__(self) -> None:
        if self.max_consecutive_failures is not None and self.max_consecutive_failures < 1:
            raise ValueError(f"{self.max_consecutive_failures = } must be at least 1, or null")
        for name in ("frames_per_file", "row_group_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"execution.{name} = {getattr(self, name)} must be at least 1")
        bounds = (1, self.min_workers, self.initial_workers, self.num_workers)
        given = [bound for bound in bounds if bound is not None]
        if given != sorted(given):
            raise ValueError(
                f"1 <= {self.min_workers = } <= {self.initial_workers = } <= {self.num_workers = } must hold for those"
                " that are not null"
            )
        if self.num_decode_workers is not None and self.num_decode_workers < 1:
            raise ValueError(f"{self.num_decode_workers = } must be at least 1, or null")


def plan_on_ray(pages: Iterable[list[Medium]], spec: PlanSpec) -> Iterator[pa.Table]:
    """`plan_here` with a task for each page: a few at a time, results in order."""
    import ray

    with ray_session():
        task = ray.remote(num_cpus=PLAN_CPUS)(_plan_page)
        waiting: deque[Any] = deque()
        most = max(2, round(_num_cpus() / PLAN_CPUS))
        for page in pages:
            waiting.append(task.remote(page, spec))
            if len(waiting) == most:
                yield from _planned(ray.get(waiting.popleft()))
        while waiting:
            yield from _planned(ray.get(waiting.popleft()))


def _plan_page(page: list[Medium], spec: PlanSpec) -> tuple[list[pa.Table], int]:
    """The page's tables, and the requests to storage that were made again for them in this process."""
    before = storage.num_retries()
    return list(plan_page(page, spec)), storage.num_retries() - before


def _planned(result: tuple[list[pa.Table], int]) -> list[pa.Table]:
    tables, retries = result
    storage.add_retries(retries)
    return tables


def run_on_ray(missing: Collection[Segment], spec: WorkerSpec, config: ExecutionConfig) -> Iterator[TaskResult]:
    """Does the missing segments on Ray; yields the outcomes of their units as they finish, in any order.

    Raises:
        ValueError: when the steps are or may be split and a file's frames are too many to cross the object store
            together.
    """
    block_bytes = config.frames_per_file * spec.image_size**2 * 3
    if config.mode != "fused" and block_bytes > MAX_BLOCK_BYTES:
        most = MAX_BLOCK_BYTES // (spec.image_size**2 * 3)
        raise ValueError(
            f"{config.frames_per_file = } makes blocks of {block_bytes} bytes; in modes split and auto at most {most}"
        )
    with ray_session():
        config = settle_mode(config, missing, spec)
        num_workers = _num_workers(config)
        logger.info("%d segments to do; %d workers are starting", len(missing), num_workers)
        num_shares = num_workers if config.mode == "fused" else max(num_workers, _num_decoders(config))
        for units in pages(iter_units(missing, config.frames_per_file, num_shares), UNITS_PER_GRAPH):
            yield from _run_units(units, spec, config)


def settle_mode(config: ExecutionConfig, missing: Iterable[Segment], spec: WorkerSpec) -> ExecutionConfig:
    """The configuration with fused or split in place of auto, by what a few of the segments cost in a worker."""
    import ray

    if config.mode != "auto":
        return config
    options = {"num_cpus": config.cpus_per_worker, "num_gpus": config.gpus_per_worker or None}
    found: Calibration | None = ray.get(ray.remote(**options)(_calibrate).remote(sample_of(missing), spec))
    if found is None:
        return replace(config, mode="fused")
    decode_slots, encode_slots = _num_decoders(config), _num_workers(config)
    mode = found.best_mode(decode_slots, encode_slots, num_cores=_num_cpus(), has_gpu=spec.encoder.device != "cpu")
    logger.info(
        "mode %s: a frame takes %.1f ms to decode, %.1f ms to encode; for %d decoders and %d encoders",
        *(mode, 1e3 * found.decode_seconds / found.frames, 1e3 * found.encode_seconds / found.frames),
        *(decode_slots, encode_slots),
    )
    return replace(config, mode=mode)


def _calibrate(segments: list[Segment], spec: WorkerSpec) -> Calibration | None:
    torch.set_num_threads(spec.num_threads)
    return calibrate(segments, spec, FrameEncoder(spec.encoder))


def _run_units(units: Sequence[WriteTask], spec: WorkerSpec, config: ExecutionConfig) -> Iterator[TaskResult]:
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    # One block a unit, put there by the driver. Reading the plan would take tasks of one whole CPU each (listing files,
    # reading, repartitioning) that never find room beside the actors of a small machine: seen to wait for ever.
    dataset = ray.data.from_arrow([units_table([unit]) for unit in units])
    for step in _steps(spec, config, len(units)):
        dataset = dataset.map_batches(batch_size=1, batch_format="pyarrow", zero_copy_batch=True, **step)
    metrics = RunMetrics()
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for row in batch.to_pylist():
            outcome = TaskResult(**row)
            metrics.add(outcome)
            yield outcome


def worker_slots(config: ExecutionConfig) -> tuple[int, int]:
    """How many processes a run has to decode and to encode: on the cluster when connected to one, else here."""
    if has_cluster():
        with ray_session():
            return _num_decoders(config), _num_workers(config)
    num_cpus = os.cpu_count() or 1
    num_encoders = torch.cuda.device_count() if config.gpus_per_worker else num_cpus
    return config.num_decode_workers or num_cpus, config.num_workers or max(1, num_encoders)


def num_cores() -> int:
    """CPUs of the cluster when connected to one, else of this machine."""
    if has_cluster():
        with ray_session():
            return _num_cpus()
    return os.cpu_count() or 1


def _num_workers(config: ExecutionConfig) -> int:
    """Processes that will encode, on the connected cluster."""
    import ray

    resource = "GPU" if config.gpus_per_worker else "CPU"
    return config.num_workers or max(1, int(ray.cluster_resources().get(resource, 1)))


def units_table(units: Sequence[WriteTask]) -> pa.Table:
    """Units as they travel to the workers, one row each."""
    rows = [{"unit": unit.name, "segments": [_plan_row(segment) for segment in unit.segments]} for unit in units]
    return pa.Table.from_pylist(rows, schema=UNITS)


def _steps(spec: WorkerSpec, config: ExecutionConfig, num_units: int) -> list[dict[str, Any]]:
    num_workers = min(_num_workers(config), num_units)
    worker = {"num_cpus": config.cpus_per_worker, "num_gpus": config.gpus_per_worker or None}
    fewest = min(config.min_workers or config.initial_workers or num_workers, num_workers)
    first = min(config.initial_workers or fewest, num_workers)
    pool = {"min_size": fewest, "max_size": num_workers, "initial_size": first}
    threads = {"max_concurrent_calls_per_actor": UNITS_AT_ONCE, "enable_true_multi_threading": True}
    if config.mode == "fused":
        return [_actors(FusedStep, spec, pool | threads, in_flight=UNITS_AT_ONCE, **worker)]
    num_decoders = min(_num_decoders(config), num_units)
    decoders = {"size": num_decoders, **threads}
    return [
        # the second unit waits for the first one's end: a third would only be kept from other decoders
        _actors(DecodeStep, spec, decoders, in_flight=UNITS_AT_ONCE, num_cpus=config.cpus_per_worker),
        _actors(EncodeStep, spec, pool | threads, in_flight=UNITS_AT_ONCE + 1, **worker),
    ]


def _actors(step: type, spec: WorkerSpec, pool: dict[str, Any], *, in_flight: int, **resources: Any) -> dict[str, Any]:
    import ray

    compute = ray.data.ActorPoolStrategy(**pool, max_tasks_in_flight_per_actor=in_flight)
    return {"fn": step, "fn_constructor_args": (spec,), "compute": compute, **resources}


def _num_decoders(config: ExecutionConfig) -> int:
    return config.num_decode_workers or _num_cpus()


def _num_cpus() -> int:
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))


# -- what travels between the steps ------------------------------------------------------------------------------

_SEGMENTS = pa.list_(pa.struct(list(PLAN)))
UNITS = pa.schema([pa.field("unit", pa.string()), pa.field("segments", _SEGMENTS)])

_DECODED = pa.list_(
    pa.struct(
        [
            pa.field("frames", pa.large_binary()),  # uint8 (F, S, S, 3), or null for an error
            pa.field("pts_seconds", pa.list_(pa.float64())),
            pa.field("times_seconds", pa.list_(pa.float64())),
            pa.field("num_missing", pa.int32()),
            pa.field("error", pa.list_(pa.string())),  # stage, type, message
            pa.field("decode_seconds", pa.float64()),
        ]
    )
)
_BEGIN = pa.struct(
    [pa.field("started", pa.float64()), pa.field("decoder", pa.string()), pa.field("retries", pa.int64())]
)
_CPU_SECONDS = pa.float64()
"""that a step took; see TaskResult"""
DECODED_UNITS = pa.schema(
    [*UNITS, pa.field("decoded", _DECODED), pa.field("begin", _BEGIN), pa.field("decode_cpu_seconds", _CPU_SECONDS)]
)


class FusedStep:
    """Units to outcomes, all in one actor; of two units at a time, one is decoded and encoded and one is committed."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._processor = TaskProcessor(spec)
        _freeze_memory()

    def __call__(self, table: pa.Table) -> pa.Table:
        """One outcome a unit."""
        return _outcomes([self._processor.process(unit) for unit in _units(table)])


class DecodeStep:
    """Units to units with frames; of two units at a time, one is decoded and one is handed over."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._decoder = SegmentDecoder(spec)
        self._decoding = Lock()
        self._retries = RetryCount()
        _freeze_memory()

    def __call__(self, table: pa.Table) -> pa.Table:
        """The table with the column `decoded`."""
        rows = [self._decode(unit) for unit in _units(table)]
        kinds = (_DECODED, _BEGIN, _CPU_SECONDS)
        made = [pa.array([row[place] for row in rows], kind) for place, kind in enumerate(kinds)]
        return pa.table([table["unit"], table["segments"], *made], schema=DECODED_UNITS)

    def _decode(self, unit: WriteTask) -> tuple[list[dict[str, Any]], dict[str, Any], float]:
        """The unit's values of the three columns that are new."""
        with self._decoding:
            begin, before = TaskStart.now(), self._decoder.cpu_seconds
            segments = [_to_arrow(segment) for segment in self._decoder.decode(unit.segments)]
            return segments, asdict(replace(begin, retries=self._retries.new())), self._decoder.cpu_seconds - before


class EncodeStep:
    """Units with frames to committed files; of two units at a time, one is encoded and one is written."""

    def __init__(self, spec: WorkerSpec) -> None:
        torch.set_num_threads(spec.num_threads)
        self._spec = spec
        self._encoder = SegmentEncoder(FrameEncoder(spec.encoder), spec.fps)
        self._encoding, self._writing = Lock(), Lock()
        self._retries = RetryCount()
        _freeze_memory()

    def __call__(self, table: pa.Table) -> pa.Table:
        """One outcome a unit."""
        units = zip(_units(table), *(table[name] for name in ("decoded", "begin", "decode_cpu_seconds")), strict=True)
        return _outcomes([self._outcome(*unit) for unit in units])

    def _outcome(self, unit: WriteTask, decoded: Any, begin: Any, decode_cpu_seconds: Any) -> TaskResult:
        with self._encoding:
            before = self._encoder.cpu_seconds
            rows = list(self._encoder.rows(_from_arrow(unit.segments, decoded.values, self._spec.image_size)))
            encode_cpu_seconds = self._encoder.cpu_seconds - before
        with self._writing:
            begun = TaskStart(**begin.as_py())
            here = process_name()
            outcome = write_unit(self._spec, unit.name, rows, begun, encoder=here, retry_count=self._retries)
        return replace(outcome, decode_cpu_seconds=decode_cpu_seconds.as_py(), encode_cpu_seconds=encode_cpu_seconds)


def _freeze_memory() -> None:
    """What a worker has loaded stays as long as it lives: 400 000 objects, of which Python's collector would look at
    each, a quarter of a second, again and again."""
    gc.collect()
    gc.freeze()


def _units(table: pa.Table) -> list[WriteTask]:
    rows = table.select(["unit", "segments"]).to_pylist()
    return [WriteTask(row["unit"], tuple(Segment.from_row(segment) for segment in row["segments"])) for row in rows]


def _plan_row(segment: Segment) -> dict[str, Any]:
    return {**asdict(segment), "status": "planned"}


def _outcomes(outcomes: list[TaskResult]) -> pa.Table:
    return pa.Table.from_pylist([asdict(outcome) for outcome in outcomes])


def _to_arrow(decoded: DecodedSegment) -> dict[str, Any]:
    if decoded.frames is None:
        error = decoded.error
        assert error is not None
        reason = [error.stage, error.error_type.value, error.message]
        return {"error": reason, "decode_seconds": decoded.decode_seconds}
    return {
        "frames": decoded.frames.frames.tobytes(),
        "pts_seconds": decoded.frames.pts_seconds,
        "times_seconds": decoded.frames.times_seconds,
        "num_missing": decoded.frames.num_missing,
        "decode_seconds": decoded.decode_seconds,
    }


def _from_arrow(segments: Sequence[Segment], decoded: pa.StructArray, image_size: int) -> Iterator[DecodedSegment]:
    """Segments with their frames, which stay where Arrow has them."""
    pixels = decoded.field("frames")
    others = pa.StructArray.from_arrays(
        [decoded.field(name) for name in _NOT_FRAMES], fields=[decoded.type.field(name) for name in _NOT_FRAMES]
    )
    for segment, frames, rest in zip(segments, pixels, others.to_pylist(), strict=True):
        if not frames.is_valid:
            stage, kind, message = rest["error"]
            error = DecodeError(stage, ErrorType(kind), message)
            yield DecodedSegment(segment, None, error, rest["decode_seconds"])
            continue
        batch = FrameBatch(
            np.frombuffer(frames.as_buffer(), np.uint8).reshape(-1, image_size, image_size, 3),
            np.array(rest["pts_seconds"], float),
            np.array(rest["times_seconds"], float),
            rest["num_missing"],
        )
        yield DecodedSegment(segment, batch, None, rest["decode_seconds"])


_NOT_FRAMES = [field.name for field in _DECODED.value_type if field.name != "frames"]
