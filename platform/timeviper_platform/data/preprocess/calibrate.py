"""What a frame costs on this machine: what an estimate of a run's time, and the ideal of a benchmark, are made from.

Knows which segments to try and what a frame costs in each step, with the run's own steps: in one process (`calibrate`,
seconds of an idle machine), or in as many as a run has, all busy together (`BusySlots`, seconds of CPU, so that the
memory they share is in it and what else the machine does is not). Does not know Ray.
"""

from __future__ import annotations

import heapq
import multiprocessing
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from threading import Barrier
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from timeviper_platform.data.encode.frame_encoder import FrameEncoder
from timeviper_platform.data.plan.segments import Segment, WriteTask, segments_of
from timeviper_platform.data.preprocess.worker import (
    SegmentDecoder,
    SegmentEncoder,
    TaskProcessor,
    TaskResult,
    WorkerSpec,
)

MAX_SEGMENTS = 6
MAX_SECONDS = 20.0
"""After this no further segment is begun."""

SPLIT_GAIN = 1.05
"""Frames that cross the object store cost about that much."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Seconds a frame of one process, measured."""

    segments: int
    """that were decoded and encoded; those in error are not counted"""
    frames: int
    decode_seconds: float
    encode_seconds: float
    write_seconds: float = 0.0
    """0 where nothing was written"""

    def ideal_frames_per_second(
        self, decode_slots: int, encode_slots: int, *, is_fused: bool, num_cores: int, has_gpu: bool = False
    ) -> float:
        """1 / max(seconds a frame / slots) over the stages, but no more than `num_cores` could do of their sum.

        Args:
            decode_slots: processes that decode, where the steps are split.
            encode_slots: processes that encode; fused, each writes too, and its child decodes ahead of it.
            is_fused: the steps are one worker's.
            num_cores: that all of them share.
            has_gpu: encoding takes nothing of the cores.

        Example: 9 ms of decoding and 1 ms of encoding, split over two decoders and an encoder on two cores: 200, not
        the 222 of the decoders alone, since the three share the cores.
        """
        on_cores = self.decode_seconds + self.write_seconds + (0.0 if has_gpu else self.encode_seconds)
        cores = self.frames * num_cores / max(1e-9, on_cores)
        encode = self.encode_seconds + (self.write_seconds if is_fused else 0.0)
        slowest = max(self.decode_seconds / (encode_slots if is_fused else decode_slots), encode / encode_slots)
        return min(cores, self.frames / slowest)

    def best_mode(
        self, decode_slots: int, encode_slots: int, *, num_cores: int, has_gpu: bool
    ) -> Literal["fused", "split"]:
        """Split where that promises more than SPLIT_GAIN of what fused does; else frames need not travel."""
        fused, split = (
            self.ideal_frames_per_second(
                decode_slots, encode_slots, is_fused=is_fused, num_cores=num_cores, has_gpu=has_gpu
            )
            for is_fused in (True, False)
        )
        return "split" if split > SPLIT_GAIN * fused else "fused"


class SegmentSample:
    """A few segments out of all that go by: those with the smallest ids, which are hashes, so any is as likely."""

    def __init__(self, size: int = MAX_SEGMENTS) -> None:
        self._size = size
        self._rows: pa.Table | None = None

    def add(self, segments: pa.Table) -> None:
        """Takes PLAN rows of segments."""
        few = segments.take(pc.select_k_unstable(segments, self._size, [("segment_id", "ascending")]))
        rows = few if self._rows is None else pa.concat_tables([self._rows, few])
        self._rows = rows.sort_by("segment_id").slice(0, self._size)

    @property
    def segments(self) -> list[Segment]:
        """At most `size`."""
        return [] if self._rows is None else segments_of(self._rows)


def sample_of(segments: Iterable[Segment], size: int = MAX_SEGMENTS) -> list[Segment]:
    """The same choice out of segments."""
    return heapq.nsmallest(size, segments, key=lambda segment: segment.segment_id)


def calibrate(segments: Sequence[Segment], spec: WorkerSpec, encoder: FrameEncoder) -> Calibration | None:
    """Decodes and encodes the segments one after the other; None when not one frame decodes.

    The first is done twice and counted once: what only a first time costs (libraries, memory) is no frame's cost.
    """
    decoder, rows = SegmentDecoder(spec), SegmentEncoder(encoder, spec.fps)
    num_segments = num_frames = 0
    decode_seconds = encode_seconds = 0.0
    began = time.perf_counter()
    for number, segment in enumerate([*segments[:1], *segments]):
        if number > 1 and time.perf_counter() - began > MAX_SECONDS:
            break
        (row,) = rows.rows(decoder.decode([segment]))
        if number and row["num_frames"]:
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
    """As many processes as a run has cores, kept for several measurements; each does whole units as a worker does.

    Raises:
        RuntimeError: from `measure`, when not one frame decodes.
    """

    def __init__(self, spec: WorkerSpec, num_slots: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._num_slots = num_slots
        self._folder = tempfile.TemporaryDirectory()  # the files that the slots write are nobody's
        self._pool = ProcessPoolExecutor(
            num_slots,
            mp_context=context,
            initializer=_start_slot,
            initargs=(replace(spec, store=self._folder.name), context.Barrier(num_slots)),
        )

    def __enter__(self) -> BusySlots:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._folder.cleanup()

    def measure(self, segments: Sequence[Segment], seconds: float) -> Calibration:
        """What a frame costs while all slots work: CPU seconds by stage.

        Args:
            segments: each slot takes consecutive ones, so that a film is walked and not jumped through.
            seconds: after this no slot begins its segments once more.
        """
        share = -(-len(segments) // self._num_slots)
        units = [WriteTask(f"slot{n}", tuple(segments[n * share : (n + 1) * share])) for n in range(self._num_slots)]
        if not all(unit.segments for unit in units):
            raise ValueError(
                f"{len(segments)} segments are too few for {self._num_slots} slots; give more or longer media"
            )
        slots = list(self._pool.map(_keep_busy, units, [seconds] * len(units)))
        work = [outcome for outcomes in slots for outcome in outcomes]
        if not any(outcome.num_frames for outcome in work):
            message = work[0].last_error
            raise RuntimeError(f"not one frame of {segments[0].uri} and its like decodes: {message}")
        return cost_of(work)


def cost_of(outcomes: Iterable[TaskResult]) -> Calibration:
    """What units cost, in seconds of CPU; those of an encoder on a GPU are seconds."""
    done = list(outcomes)
    return Calibration(
        segments=sum(outcome.num_ok + outcome.num_partial for outcome in done),
        frames=sum(outcome.num_frames for outcome in done),
        decode_seconds=sum(outcome.decode_cpu_seconds for outcome in done),
        encode_seconds=sum(outcome.encode_cpu_seconds for outcome in done),
        write_seconds=sum(outcome.write_cpu_seconds for outcome in done),
    )


_slot: tuple[TaskProcessor, Barrier]
"""of this process, when it is a slot"""


def _start_slot(spec: WorkerSpec, barrier: Barrier) -> None:
    global _slot
    _slot = TaskProcessor(spec), barrier


def _keep_busy(unit: WriteTask, seconds: float) -> list[TaskResult]:
    """Does the unit again and again, from when every slot is ready."""
    processor, barrier = _slot
    processor.process(replace(unit, segments=unit.segments[:1]))  # what only a first time costs is no frame's cost
    barrier.wait(timeout=300)
    began = time.perf_counter()
    outcomes = [processor.process(unit)]
    while time.perf_counter() - began < seconds:
        outcomes.append(processor.process(unit))
    return outcomes
