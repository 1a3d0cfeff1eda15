"""Row group `driver`: the driver's cost of a unit of work, with workers that only sleep."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow as pa

from timeviper_platform.benchmarks.measure import Row
from timeviper_platform.common.ray_cluster import connect
from timeviper_platform.data.plan.segments import SEGMENT_FRAMES, Segment
from timeviper_platform.data.preprocess.config import ExecutionConfig
from timeviper_platform.data.preprocess.cost_model import ScaleConfig, compute_scale
from timeviper_platform.data.preprocess.progress import Progress, RunMetrics
from timeviper_platform.data.preprocess.ray_graph import from_block, rounds, run_round, tasks_per_row, to_block
from timeviper_platform.data.preprocess.tasks import TaskResult, WriteTask, process_name
from timeviper_platform.data.store.audit import Outcomes

COMMAND = "python jobs/benchmark.py preprocess --only driver"
NUM_GPUS = 64
CALLS_PER_GPU = 2
"""A worker encodes one unit and writes the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DriverSizes:
    num_units: int = 100_000
    segments_per_unit: int = 8
    """512 frames, as in ray_configs/preprocess.yaml."""
    num_processes: int = 4
    """Worker processes that hold the calls of all 64 GPUs."""
    sleep_seconds: float = 0.05


class SleepStep:
    """Answers each task as a worker would, after a sleep."""

    def __init__(self, sleep_seconds: float) -> None:
        self._seconds = sleep_seconds

    def __call__(self, block: pa.Table) -> pa.Table:
        results = [self._process(task) for task in from_block(block)]
        return to_block(results, len(results))

    def _process(self, task: WriteTask) -> TaskResult:
        started = time.time()
        time.sleep(self._seconds)
        return TaskResult(
            task=task.name,
            num_frames=task.num_frames,
            segments=Outcomes(planned=len(task.segments), ok=len(task.segments)),
            error_types=[],
            media=[segment.media_id for segment in task.segments],
            reasons=[""] * len(task.segments),
            messages=[""] * len(task.segments),
            feature_bytes=0,
            decode_seconds=0.0,
            encode_seconds=self._seconds,
            write_seconds=0.0,
            started=started,
            ended=time.time(),
            retries=0,
            decoder=process_name(),
            encoder=process_name(),
            worker=process_name(),
        )


def driver_rows(film: Path | None = None, sizes: DriverSizes | None = None) -> list[Row]:
    """CPU time per unit, growth of memory and started actors of one driver, and the time that 64 GPUs leave it."""
    import ray

    sizes = sizes or DriverSizes()
    calls = NUM_GPUS * CALLS_PER_GPU // sizes.num_processes
    compute = ray.data.ActorPoolStrategy(
        size=sizes.num_processes,
        max_tasks_in_flight_per_actor=calls,
        max_concurrent_calls_per_actor=calls,
        enable_true_multi_threading=True,
    )
    step = {"fn": SleepStep, "fn_constructor_args": (sizes.sleep_seconds,), "compute": compute, "num_cpus": 0.01}
    per_row = tasks_per_row(ExecutionConfig(mode="fused", gpus_per_worker=1, frames_per_file=512))
    metrics, num_segments = RunMetrics("sleep"), sizes.num_units * sizes.segments_per_unit
    with connect(), Progress(num_segments, num_segments * SEGMENT_FRAMES, 30.0) as progress:
        cpu_before, memory = time.process_time(), [_megabytes()]
        for blocks in rounds(sleep_tasks(sizes), sizes.num_units, NUM_GPUS, per_row):
            for number, result in enumerate(run_round(blocks, [step])):
                if not number:
                    memory.append(_megabytes())
                metrics.add(result)
                progress.add(result)
        cpu_seconds = time.process_time() - cpu_before
        memory.append(_megabytes())
    num_started = len(progress.totals.processes["write"])
    milliseconds = 1e3 * cpu_seconds / sizes.num_units
    scale = compute_scale(ScaleConfig(num_gpus=NUM_GPUS))
    per_second = NUM_GPUS * scale.encode_frames_per_second / (sizes.segments_per_unit * SEGMENT_FRAMES)
    text = f"{sizes.num_units:,} units of {sizes.segments_per_unit * SEGMENT_FRAMES} frames, workers that only sleep"
    return [
        Row(name=f"driver, CPU time per unit ({text})", value=milliseconds, unit="ms", bar="<= 2", command=COMMAND),
        Row(
            name=f"driver, units a second for {NUM_GPUS} GPUs of {scale.encode_frames_per_second:.0f} frames/s each",
            value=per_second,
            unit="1/s",
            command=COMMAND,
        ),
        Row(
            name=f"driver, share of one core that feeds {NUM_GPUS} GPUs",
            value=per_second * milliseconds / 1e3,
            unit="",
            command=COMMAND,
        ),
        Row(
            name=f"driver, memory to cut and send {sizes.num_units:,} units, without shared pages",
            value=memory[1] - memory[0],
            unit="MB",
            command=COMMAND,
        ),
        Row(
            name=f"driver, growth of its memory from the first of {sizes.num_units:,} results to the last",
            value=memory[-1] - memory[1],
            unit="MB",
            bar="<= 50",
            command=COMMAND,
        ),
        Row(
            name=f"driver, starts of {sizes.num_processes} worker processes",
            value=num_started / sizes.num_processes,
            unit="",
            bar="<= 1",
            command=COMMAND,
        ),
    ]


def sleep_tasks(sizes: DriverSizes) -> Iterator[WriteTask]:
    for unit in range(sizes.num_units):
        segments = tuple(_segment(unit, index) for index in range(sizes.segments_per_unit))
        yield WriteTask(f"{unit:032x}", segments)


def _segment(unit: int, index: int) -> Segment:
    return Segment(
        segment_id=f"{unit:024x}{index:08x}",
        media_id=f"{unit:032x}",
        source_version="0" * 32,
        segment_index=index,
        num_segments=8,
        uri=f"s3://bucket/videos/{unit // 1000:06d}/{unit:09d}.mp4",
        size=50_000_000,
        etag="0" * 32,
        sha256=None,
        modality="video",
        duration_seconds=512.0,
        source_fps=24.0,
        width=1280,
        height=720,
        codec="h264",
        joined_parts=None,
        grid_start_seconds=0.0,
        first_frame=index * SEGMENT_FRAMES,
        num_frames=SEGMENT_FRAMES,
    )


def _megabytes() -> float:
    """Memory of this process alone: the object store's pages are shared."""
    return psutil.Process().memory_full_info().uss / 2**20
