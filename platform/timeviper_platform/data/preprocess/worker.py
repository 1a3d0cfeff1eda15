"""The steps of a unit of work, as plain classes: segments to frames, frames to FEATURES rows, rows to a committed file.

Knows how errors become rows and how frames of several segments share batches. Does not know Ray: pipeline.py wraps
these classes where it builds the graph.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from threading import Lock
from typing import TypeVar

import numpy as np
import torch
import xxhash

from timeviper_platform.common import storage
from timeviper_platform.data.encode.frame_encoder import FrameEncoder, VisionTowerConfig
from timeviper_platform.data.media.container import DecodeError, ErrorType, MediaLimits, source_name
from timeviper_platform.data.plan.segments import Segment, WriteTask
from timeviper_platform.data.store.writer import ROW_GROUP_BYTES, Row, features_bytes, write_file
from timeviper_platform.data.video.frames import FrameBatch
from timeviper_platform.data.video.reader import check_backend
from timeviper_platform.data.video_worker.frame_source import DecodeConfig, DecodeRequest, FrameSource, LocalFrames
from timeviper_platform.data.video_worker.isolated import IsolatedFrames


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSpec:
    """All that a worker is told."""

    store: str
    recipe_hash: str
    encoder: VisionTowerConfig
    image_size: int
    fps: Fraction
    decode: DecodeConfig
    limits: MediaLimits
    num_threads: int
    keyframes_only: bool = False
    row_group_bytes: int = ROW_GROUP_BYTES


@dataclass(frozen=True, slots=True)
class DecodedSegment:
    """A segment with its frames, or with the reason why there are none."""

    segment: Segment
    frames: FrameBatch | None
    error: DecodeError | None
    decode_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskResult:
    """What became of a unit; travels to the driver."""

    unit: str
    num_frames: int
    num_ok: int
    num_partial: int
    num_error: int
    error_types: list[str]
    """one a segment with status partial or error"""
    media: list[str]
    """every medium of the unit, in order"""
    reasons: list[str]
    """why each of them failed: stage/type of its first segment in error; '' for those without one"""
    last_error: str
    """message of the last segment in error"""
    feature_bytes: int
    decode_seconds: float
    encode_seconds: float
    write_seconds: float
    started: float
    """seconds since the epoch"""
    ended: float
    retries: int
    """requests to storage that failed for a passing reason"""
    decoder: str
    """host and process of each step; one and the same where the steps are fused"""
    encoder: str
    worker: str
    """that wrote"""
    decode_cpu_seconds: float = 0.0
    """of CPU, by all processes that decode: what they waited for a core or for storage is not in it"""
    encode_cpu_seconds: float = 0.0
    """the same of the encoder; where that is on a GPU, the seconds it was busy"""
    write_cpu_seconds: float = 0.0


Item = TypeVar("Item")


class _Timed(Iterator[Item]):
    """The items, and how long their making took."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._items = iter(items)
        self.seconds = self.cpu_seconds = 0.0
        """of the clock, and of this thread's CPU"""

    def __next__(self) -> Item:
        started, cpu_started = time.perf_counter(), time.thread_time()
        try:
            return next(self._items)
        finally:
            self.seconds += time.perf_counter() - started
            self.cpu_seconds += time.thread_time() - cpu_started


def _cpu_of_other_threads() -> float:
    return time.process_time() - time.thread_time()


class SegmentDecoder:
    """Segments to frames; keeps videos open between segments.

    Raises:
        RuntimeError: when the configured backend cannot be used here.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        check_backend(spec.decode.backend)
        self._spec = spec
        source = IsolatedFrames if spec.decode.isolation == "process" else LocalFrames
        step = 1 / spec.fps if spec.keyframes_only else None
        self._source: FrameSource = source(spec.image_size, spec.limits, spec.decode, step)

        self.cpu_seconds = 0.0
        """of CPU that decoding took so far, here and in a child"""

    def decode(self, segments: Sequence[Segment]) -> Iterator[DecodedSegment]:
        """The frames of each segment, in order; what is wrong with one is in its result, not raised.

        A child decodes ahead of what is taken.
        """
        requests = (DecodeRequest(s.uri, s.modality, s.times(self._spec.fps)) for s in segments)
        results = _Timed(self._source.decode(requests))
        for segment in segments:
            before = results.cpu_seconds
            decoded = next(results)
            self.cpu_seconds += results.cpu_seconds - before + decoded.cpu_seconds
            found = _checked(segment, decoded.frames)
            frames, error = (None, found) if isinstance(found, DecodeError) else (found, None)
            yield DecodedSegment(segment, frames, error, decoded.seconds)


def _checked(segment: Segment, found: FrameBatch | DecodeError) -> FrameBatch | DecodeError:
    """What was found, or that it is nothing: frames of a segment that has none, though it should."""
    if isinstance(found, DecodeError) or len(found.frames) or not (found.num_missing or segment.segment_index == 0):
        return found
    message = f"{source_name(segment.uri)}: none of {segment.num_frames} sampled frames decodes"
    return DecodeError("decode_video", ErrorType.FRAMES_MISSING, message)


@dataclass(slots=True)
class _Waiting:
    """A decoded segment whose tokens are partly made."""

    decoded: DecodedSegment
    num_frames: int
    tokens: list[torch.Tensor] = field(default_factory=list)
    num_encoded: int = 0
    encode_seconds: float = 0.0


class SegmentEncoder:
    """Decoded segments to FEATURES rows, in order. Short segments share batches; a frame's values do not depend on
    its neighbours in the batch."""

    def __init__(self, encoder: FrameEncoder, fps: Fraction) -> None:
        self._encoder = encoder
        self._fps = fps
        self.cpu_seconds = 0.0
        """of CPU that making rows took so far; where the encoder is on a GPU, the seconds it was busy"""

    def rows(self, decoded: Iterable[DecodedSegment]) -> Iterator[Row]:
        """A row a segment."""
        source = _Timed(decoded)
        made = _Timed(self._rows(source))
        yield from made
        if self._encoder.config.device == "cpu":
            self.cpu_seconds += made.cpu_seconds - source.cpu_seconds

    def _rows(self, decoded: Iterable[DecodedSegment]) -> Iterator[Row]:
        waiting: deque[_Waiting] = deque()
        size = self._encoder.config.encode_batch_frames
        num_frames = 0  # decoded but not encoded
        for item in decoded:
            count = 0 if item.frames is None else len(item.frames.frames)
            waiting.append(_Waiting(item, count))
            num_frames += count
            if num_frames >= size:
                num_frames -= self._encode(waiting, num_frames - num_frames % size)
            while waiting and waiting[0].num_encoded == waiting[0].num_frames:
                yield self._row(waiting.popleft())
        self._encode(waiting, num_frames)
        while waiting:
            yield self._row(waiting.popleft())

    def _encode(self, waiting: Iterable[_Waiting], num_frames: int) -> int:
        """Encodes the first `num_frames` frames that wait; returns their number."""
        takes: list[tuple[_Waiting, np.ndarray]] = []
        left = num_frames
        for entry in waiting:
            if left and entry.decoded.frames is not None:
                frames = entry.decoded.frames.frames[entry.num_encoded : entry.num_encoded + left]
                takes.append((entry, frames))
                left -= len(frames)
        if not takes:
            return 0
        started, others_started = time.perf_counter(), _cpu_of_other_threads()
        tokens = self._encoder.encode(np.concatenate([frames for _, frames in takes]))
        seconds = time.perf_counter() - started
        is_on_cpu = self._encoder.config.device == "cpu"
        self.cpu_seconds += _cpu_of_other_threads() - others_started if is_on_cpu else seconds
        pieces = torch.split(tokens, [len(frames) for _, frames in takes])
        for (entry, frames), piece in zip(takes, pieces, strict=True):
            entry.tokens.append(piece)
            entry.num_encoded += len(frames)
            entry.encode_seconds += seconds * len(frames) / num_frames
        return num_frames

    def _row(self, entry: _Waiting) -> Row:
        segment, frames, error = entry.decoded.segment, entry.decoded.frames, entry.decoded.error
        row: Row = {
            **{name: getattr(segment, name) for name in _SHARED_FIELDS},
            "uri": source_name(segment.uri),
            "start_seconds": float(segment.time(0, self._fps)),
            "end_seconds": float(segment.time(segment.num_frames, self._fps)),
            "num_frames": entry.num_frames,
            "num_tokens_per_frame": self._encoder.num_tokens_per_frame,
            "dim": self._encoder.dim,
            "dtype": "bfloat16",
            "decode_ms": entry.decoded.decode_seconds * 1e3,
            "encode_ms": entry.encode_seconds * 1e3,
        }
        if frames is None:
            assert error is not None
            return row | {
                "status": "error",
                "error_stage": error.stage,
                "error_type": error.error_type.value,
                "error_message": error.message,
                "frames_missing": segment.num_frames,
                "frame_times_seconds": [],
                "frame_pts_seconds": [],
                "features": None,
            }
        data = features_bytes(torch.cat(entry.tokens)) if entry.tokens else b""
        partial = {
            "error_stage": "decode_video",
            "error_type": ErrorType.FRAMES_MISSING.value,
            "error_message": f"{frames.num_missing} of {segment.num_frames} sampled frames do not decode",
        }
        return row | {
            "status": "partial" if frames.num_missing else "ok",
            **(partial if frames.num_missing else {}),
            "frames_missing": frames.num_missing,
            "frame_times_seconds": frames.times_seconds.tolist(),
            "frame_pts_seconds": frames.pts_seconds.tolist(),
            "features_xxh64": xxhash.xxh64_intdigest(data),
            "features": data,
        }


_SHARED_FIELDS = tuple(
    field.name for field in fields(Segment) if field.name not in ("grid_start_seconds", "first_frame", "num_frames")
)
"""of PLAN and FEATURES rows; `asdict` would copy every value, which an image's row feels"""


class RetryCount:
    """Of this process's retries each once, whichever of the units at work asks first."""

    def __init__(self) -> None:
        self._asking = Lock()
        self._counted = storage.num_retries()

    def new(self) -> int:
        """Those since it was last asked."""
        with self._asking:
            before, self._counted = self._counted, storage.num_retries()
            return self._counted - before


class TaskProcessor:
    """A whole unit in one process: decode, encode, write, commit. For decoders and encoders that share cores.

    Two threads may each have a unit: one is decoded and encoded while the end of the one before is written and
    committed, which waits for the storage.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        torch.set_num_threads(spec.num_threads)
        self._spec = spec
        self._decoder = SegmentDecoder(spec)
        self._encoder = SegmentEncoder(FrameEncoder(spec.encoder), spec.fps)
        self._making_rows = Lock()
        self._retries = RetryCount()

    def process(self, unit: WriteTask) -> TaskResult:
        """Writes and commits the unit's file; memory holds a row group for each thread, and a few segments' frames."""
        with ExitStack() as turn:
            turn.enter_context(self._making_rows)
            begin = TaskStart.now()
            decode_cpu_seconds, encode_cpu_seconds = -self._decoder.cpu_seconds, -self._encoder.cpu_seconds

            def rows() -> Iterator[Row]:
                nonlocal decode_cpu_seconds, encode_cpu_seconds
                yield from self._encoder.rows(self._decoder.decode(unit.segments))
                decode_cpu_seconds += self._decoder.cpu_seconds
                encode_cpu_seconds += self._encoder.cpu_seconds
                turn.close()  # what is left is writing

            outcome = write_unit(self._spec, unit.name, rows(), begin, encoder=begin.decoder, retry_count=self._retries)
        return replace(outcome, decode_cpu_seconds=decode_cpu_seconds, encode_cpu_seconds=encode_cpu_seconds)


@dataclass(frozen=True, slots=True)
class TaskStart:
    """What is noted where work on a unit begins; travels with it."""

    started: float
    """seconds since the epoch"""
    decoder: str
    """host and process"""
    retries: int = 0
    """of decoding, where that is a step of its own"""

    @classmethod
    def now(cls) -> TaskStart:
        """The note of this moment."""
        return cls(time.time(), process_name())


def process_name() -> str:
    """Host and process, as outcomes name workers."""
    return f"{socket.gethostname()}/{os.getpid()}"


def write_unit(
    spec: WorkerSpec, name: str, rows: Iterable[Row], begin: TaskStart, *, encoder: str, retry_count: RetryCount
) -> TaskResult:
    """Writes and commits rows as the data file of unit `name`.

    Args:
        spec: what the worker is told.
        name: the unit's.
        rows: a generator works while it is written; its time is not the writing's.
        begin: noted in this process, or where the unit was decoded.
        encoder: the process that encoded.
        retry_count: this process's.
    """
    source = _Timed(rows)
    started, cpu_started = time.perf_counter(), time.thread_time()
    index_rows = write_file(
        spec.store, name, source, recipe_digest=spec.recipe_hash, row_group_bytes=spec.row_group_bytes
    )
    write_seconds = time.perf_counter() - started - source.seconds
    cpu_seconds = time.thread_time() - cpu_started - source.cpu_seconds
    retries = begin.retries + retry_count.new()
    outcome = outcome_of(name, index_rows, begin, write_seconds=write_seconds, retries=retries, encoder=encoder)
    return replace(outcome, write_cpu_seconds=cpu_seconds)


def outcome_of(
    name: str, rows: list[Row], begin: TaskStart, *, write_seconds: float, retries: int, encoder: str
) -> TaskResult:
    """The sum of a unit's rows."""
    statuses = [row["status"] for row in rows]
    reasons: dict[str, str] = {}
    for row in rows:
        reason = f"{row['error_stage']}/{row['error_type']}" if row["status"] == "error" else ""
        reasons[row["media_id"]] = reasons.get(row["media_id"]) or reason
    return TaskResult(
        unit=name,
        num_frames=sum(row["num_frames"] for row in rows),
        num_ok=statuses.count("ok"),
        num_partial=statuses.count("partial"),
        num_error=statuses.count("error"),
        error_types=[row["error_type"] for row in rows if row["status"] != "ok"],
        media=list(reasons),
        reasons=list(reasons.values()),
        last_error=next((row["error_message"] for row in reversed(rows) if row["status"] == "error"), ""),
        feature_bytes=sum(row["num_frames"] * row["num_tokens_per_frame"] * row["dim"] * 2 for row in rows),
        decode_seconds=sum(row["decode_ms"] for row in rows) / 1e3,
        encode_seconds=sum(row["encode_ms"] for row in rows) / 1e3,
        write_seconds=write_seconds,
        started=begin.started,
        ended=time.time(),
        retries=retries,
        decoder=begin.decoder,
        encoder=encoder,
        worker=process_name(),
    )


def run_here(units: Iterable[WriteTask], spec: WorkerSpec) -> Iterator[TaskResult]:
    """Does units one after the other in this process, without Ray."""
    processor = TaskProcessor(spec)
    for unit in units:
        yield processor.process(unit)
