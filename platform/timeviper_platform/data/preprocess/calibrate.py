"""Measures the cost of a frame."""

from __future__ import annotations

import heapq
import multiprocessing
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from threading import Barrier
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from timeviper_platform.data.encode.frame_encoder import FrameEncoder
from timeviper_platform.data.plan.segments import Segment, segments_of
from timeviper_platform.data.preprocess.segment_rows import SegmentEncoder
from timeviper_platform.data.preprocess.tasks import TaskResult, WriteTask
from timeviper_platform.data.preprocess.worker import FusedWorker, WorkerSpec

MAX_SEGMENTS = 6
MAX_SECONDS = 20.0
"""Seconds after which no further segment is started."""

SPLIT_GAIN = 1.05
"""Minimum gain: passing frames through the object store costs about 5 %."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    segments: int
    """segments without error"""
    frames: int
    decode_seconds: float
    encode_seconds: float
    write_seconds: float = 0.0

    def __add__(self, other: Calibration) -> Calibration:
        names = (field.name for field in fields(self))
        return Calibration(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def ideal_frames_per_second(
        self, decode_slots: int, encode_slots: int, *, is_fused: bool, num_cores: int, has_gpu: bool = False
    ) -> float:
        """1 / max(seconds per frame / slots) over the stages, limited by the cores.

        Example: 9 ms of decoding and 1 ms of encoding with 2 decoders and 1 encoder on 2 cores give 200, not 222.

        Args:
            has_gpu: encoding uses no CPU cores.
        """
        on_cores = self.decode_seconds + self.write_seconds + (0.0 if has_gpu else self.encode_seconds)
        cores = self.frames * num_cores / max(1e-9, on_cores)
        encode = self.encode_seconds + (self.write_seconds if is_fused else 0.0)
        slowest = max(self.decode_seconds / (encode_slots if is_fused else decode_slots), encode / encode_slots)
        return min(cores, self.frames / slowest)

    def best_mode(
        self, decode_slots: int, encode_slots: int, *, num_cores: int, has_gpu: bool
    ) -> Literal["fused", "split"]:
        fused, split = (
            self.ideal_frames_per_second(
                decode_slots, encode_slots, is_fused=is_fused, num_cores=num_cores, has_gpu=has_gpu
            )
            for is_fused in (True, False)
        )
        return "split" if split > SPLIT_GAIN * fused else "fused"


class SegmentSample:
    """A random sample of a stream: the smallest ids, which are hashes."""

    def __init__(self, size: int = MAX_SEGMENTS) -> None:
        self._size = size
        self._rows: pa.Table | None = None

    def add(self, segments: pa.Table) -> None:
        smallest = segments.take(pc.select_k_unstable(segments, self._size, [("segment_id", "ascending")]))
        rows = smallest if self._rows is None else pa.concat_tables([self._rows, smallest])
        self._rows = rows.sort_by("segment_id").slice(0, self._size)

    @property
    def segments(self) -> list[Segment]:
        return [] if self._rows is None else segments_of(self._rows)


def sample_of(segments: Iterable[Segment], size: int = MAX_SEGMENTS) -> list[Segment]:
    return heapq.nsmallest(size, segments, key=lambda segment: segment.segment_id)


def calibrate(segments: Sequence[Segment], spec: WorkerSpec, encoder: FrameEncoder) -> Calibration | None:
    """Measures wall seconds in this process; None if no frame can be decoded.

    Processes the first segment twice: loading libraries does not count.
    """
    decoder, segment_encoder = spec.new_decoder(), SegmentEncoder(encoder, spec.fps)
    num_segments = num_frames = 0
    decode_seconds = encode_seconds = 0.0
    started = time.perf_counter()
    for index, segment in enumerate([*segments[:1], *segments]):
        if index > 1 and time.perf_counter() - started > MAX_SECONDS:
            break
        (row,) = segment_encoder.rows([segment], decoder.decode([segment]))
        if index and row["num_frames"]:
            num_segments += 1
            num_frames += row["num_frames"]
            decode_seconds += row["decode_ms"] / 1e3
            encode_seconds += row["encode_ms"] / 1e3
    if not num_frames:
        return None
    return Calibration(
        segments=num_segments, frames=num_frames, decode_seconds=decode_seconds, encode_seconds=encode_seconds
    )


class BusySlots:
    """One process per core. They share memory bandwidth, as the workers of a run do."""

    def __init__(self, spec: WorkerSpec, num_slots: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._num_slots = num_slots
        self._folder = tempfile.TemporaryDirectory()  # for the files that the slots write
        self._pool = ProcessPoolExecutor(
            num_slots,
            mp_context=context,
            initializer=_start_slot,
            initargs=(replace(spec, feature_store=self._folder.name), context.Barrier(num_slots)),
        )

    def __enter__(self) -> BusySlots:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._folder.cleanup()

    def measure(self, segments: Sequence[Segment], seconds: float) -> Calibration:
        """Measures CPU seconds by stage for at least `seconds`, while all slots work."""
        share = -(-len(segments) // self._num_slots)
        tasks = [WriteTask(f"slot{n}", tuple(segments[n * share : (n + 1) * share])) for n in range(self._num_slots)]
        if not all(task.segments for task in tasks):
            raise ValueError(
                f"{len(segments)} segments are too few for {self._num_slots} slots; use more or longer media"
            )
        slots = self._pool.map(_keep_busy, tasks, [seconds] * len(tasks))
        results = [result for slot in slots for result in slot]
        if not any(result.num_frames for result in results):
            raise RuntimeError(
                f"no frame of {len(segments)} segments, such as {segments[0].uri}, can be decoded:"
                f" {next(filter(None, reversed(results[0].messages)), '')}"
            )
        return cost_of(results)


def cost_of(results: Iterable[TaskResult]) -> Calibration:
    """CPU seconds by stage; for an encoder on a GPU, its busy seconds."""
    done = list(results)
    return Calibration(
        segments=sum(result.segments.ok + result.segments.partial for result in done),
        frames=sum(result.num_frames for result in done),
        decode_seconds=sum(result.decode_cpu_seconds for result in done),
        encode_seconds=sum(result.encode_cpu_seconds for result in done),
        write_seconds=sum(result.write_cpu_seconds for result in done),
    )


_slot: tuple[FusedWorker, Barrier]


def _start_slot(spec: WorkerSpec, barrier: Barrier) -> None:
    global _slot
    _slot = FusedWorker(spec), barrier


def _keep_busy(task: WriteTask, seconds: float) -> list[TaskResult]:
    worker, barrier = _slot
    worker.process(replace(task, segments=task.segments[:1]))  # loads libraries before the measurement
    barrier.wait(timeout=300)
    started = time.perf_counter()
    results = [worker.process(task)]
    while time.perf_counter() - started < seconds:
        results.append(worker.process(task))
    return results
