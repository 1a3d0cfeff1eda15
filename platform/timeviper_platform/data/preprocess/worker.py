"""Workers without Ray."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from fractions import Fraction
from threading import Lock
from typing import Any

import torch

from timeviper_platform.common import storage
from timeviper_platform.common.cluster_checks import StorageProof
from timeviper_platform.data.encode.frame_encoder import FrameEncoder, VisionTowerConfig
from timeviper_platform.data.media.container import MediaLimits
from timeviper_platform.data.preprocess.segment_rows import SegmentDecoder, SegmentEncoder, TimedIterator
from timeviper_platform.data.preprocess.tasks import TaskResult, TaskStart, WriteTask, process_name
from timeviper_platform.data.store.audit import Outcomes
from timeviper_platform.data.store.writer import ROW_GROUP_BYTES, Row, StoreWriter
from timeviper_platform.data.video.frames import Resample
from timeviper_platform.data.video_worker.frame_source import DecodeConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSpec:
    feature_store: str
    recipe_hash: str
    encoder: VisionTowerConfig
    encoder_recipe: Mapping[str, Any]
    """Recipe of the encoder that the driver described."""
    image_size: int
    fps: Fraction
    decode: DecodeConfig
    limits: MediaLimits
    num_threads: int
    keyframes_only: bool = False
    row_group_bytes: int = ROW_GROUP_BYTES
    resample: Resample = "bicubic"
    proof: StorageProof = field(default_factory=StorageProof)
    """checked by each worker before its first task"""

    def new_decoder(self) -> SegmentDecoder:
        return SegmentDecoder(
            self.image_size,
            self.fps,
            self.limits,
            self.decode,
            keyframes_only=self.keyframes_only,
            resample=self.resample,
        )

    def new_encoder(self) -> FrameEncoder:
        """Raises RuntimeError if the weights found here are not those of the recipe."""
        encoder = FrameEncoder(self.encoder)
        encoder.check_recipe(self.encoder_recipe)
        return encoder


class RetryCounter:
    """Assigns storage retries of this process to its concurrent tasks."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._counted = storage.num_retries()

    def take(self) -> int:
        """Retries since the last call."""
        with self._lock:
            before, self._counted = self._counted, storage.num_retries()
            return self._counted - before


class FusedWorker:
    """Decodes and encodes one task while another is committed."""

    def __init__(self, spec: WorkerSpec) -> None:
        torch.set_num_threads(spec.num_threads)
        self._spec = spec
        self._decoder = spec.new_decoder()
        self._encoder = SegmentEncoder(spec.new_encoder(), spec.fps)
        self._encoding = Lock()
        self._retries = RetryCounter()

    def process(self, task: WriteTask) -> TaskResult:
        """Holds one row group per thread and the frames of a few segments."""
        with ExitStack() as turn:
            turn.enter_context(self._encoding)
            start = TaskStart.now()
            decode_cpu_seconds, encode_cpu_seconds = -self._decoder.cpu_seconds, -self._encoder.cpu_seconds

            def rows() -> Iterator[Row]:
                nonlocal decode_cpu_seconds, encode_cpu_seconds
                yield from self._encoder.rows(task.segments, self._decoder.decode(task.segments))
                decode_cpu_seconds += self._decoder.cpu_seconds
                encode_cpu_seconds += self._encoder.cpu_seconds
                turn.close()  # only writing is left

            result = write_task(self._spec, task.name, rows(), start, self._retries)
        return replace(result, decode_cpu_seconds=decode_cpu_seconds, encode_cpu_seconds=encode_cpu_seconds)


class DecodeWorker:
    """Decodes one task while another is handed over."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._decoder = spec.new_decoder()
        self._decoding = Lock()
        self._retries = RetryCounter()

    def process(self, task: WriteTask) -> WriteTask:
        with self._decoding:
            start, before = TaskStart.now(), self._decoder.cpu_seconds
            decoded = tuple(self._decoder.decode(task.segments))
            cpu_seconds = self._decoder.cpu_seconds - before
            start = replace(start, retries=self._retries.take(), decode_cpu_seconds=cpu_seconds)
            return replace(task, decoded=decoded, start=start)


class EncodeWorker:
    """Encodes one decoded task while another is written."""

    def __init__(self, spec: WorkerSpec) -> None:
        torch.set_num_threads(spec.num_threads)
        self._spec = spec
        self._encoder = SegmentEncoder(spec.new_encoder(), spec.fps)
        self._encoding, self._writing = Lock(), Lock()
        self._retries = RetryCounter()

    def process(self, task: WriteTask) -> TaskResult:
        assert task.start is not None
        with self._encoding:
            before = self._encoder.cpu_seconds
            rows = list(self._encoder.rows(task.segments, task.decoded))
            encode_cpu_seconds = self._encoder.cpu_seconds - before
        with self._writing:
            result = write_task(self._spec, task.name, rows, task.start, self._retries)
        return replace(result, decode_cpu_seconds=task.start.decode_cpu_seconds, encode_cpu_seconds=encode_cpu_seconds)


def write_task(spec: WorkerSpec, name: str, rows: Iterable[Row], start: TaskStart, retries: RetryCounter) -> TaskResult:
    """Writes and commits a task's file. The time of a generator of `rows` does not count as writing."""
    source = TimedIterator(rows)
    started, cpu_started = time.perf_counter(), time.thread_time()
    store = StoreWriter(spec.feature_store, spec.recipe_hash, row_group_bytes=spec.row_group_bytes)
    written = store.write_file(name, source)
    write_seconds = time.perf_counter() - started - source.seconds
    write_cpu_seconds = time.thread_time() - cpu_started - source.cpu_seconds
    errors: dict[str, tuple[str, str]] = {}
    for row in written:
        is_error = row["status"] == "error"
        error = (f"{row['error_stage']}/{row['error_type']}", row["error_message"]) if is_error else ("", "")
        first = errors.setdefault(row["media_id"], error)
        if not first[0]:
            errors[row["media_id"]] = error
    return TaskResult(
        task=name,
        num_frames=sum(row["num_frames"] for row in written),
        segments=Outcomes.of(row["status"] for row in written),
        error_types=[row["error_type"] for row in written if row["status"] != "ok"],
        media=list(errors),
        reasons=[reason for reason, _ in errors.values()],
        messages=[message for _, message in errors.values()],
        feature_bytes=sum(row["num_frames"] * row["num_tokens_per_frame"] * row["dim"] * 2 for row in written),
        decode_seconds=sum(row["decode_ms"] for row in written) / 1e3,
        encode_seconds=sum(row["encode_ms"] for row in written) / 1e3,
        write_seconds=write_seconds,
        write_cpu_seconds=write_cpu_seconds,
        started=start.started,
        ended=time.time(),
        retries=start.retries + retries.take(),
        decoder=start.decoder,
        encoder=process_name(),
        worker=process_name(),
    )


def run_here(tasks: Iterable[WriteTask], spec: WorkerSpec) -> Iterator[TaskResult]:
    worker = FusedWorker(spec)
    for task in tasks:
        yield worker.process(task)
