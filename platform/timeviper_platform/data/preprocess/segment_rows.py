"""Decodes segments and encodes them as FEATURES rows. An error becomes a row, never an exception."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import TypeVar

import numpy as np
import torch
import xxhash

from timeviper_platform.data.encode.frame_encoder import FrameEncoder
from timeviper_platform.data.media.container import DecodeError, ErrorType, MediaLimits, source_name
from timeviper_platform.data.plan.segments import Segment
from timeviper_platform.data.store.writer import Row, features_bytes
from timeviper_platform.data.video.frames import FrameBatch, Resample
from timeviper_platform.data.video.reader import check_backend
from timeviper_platform.data.video_worker.frame_source import (
    DecodeConfig,
    DecodeRequest,
    DecodeResult,
    FrameSource,
    LocalFrames,
    decode_stage,
)
from timeviper_platform.data.video_worker.isolated import IsolatedFrames

Item = TypeVar("Item")


class TimedIterator(Iterator[Item]):
    """Measures the time in which an iterator computes its items."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._items = iter(items)
        self.seconds = self.cpu_seconds = 0.0
        """wall seconds, and CPU seconds of the calling thread"""

    def __next__(self) -> Item:
        started, cpu_started = time.perf_counter(), time.thread_time()
        try:
            return next(self._items)
        finally:
            self.seconds += time.perf_counter() - started
            self.cpu_seconds += time.thread_time() - cpu_started


class SegmentDecoder:
    """Keeps videos open between segments. Raises RuntimeError if the backend is not available."""

    def __init__(
        self,
        image_size: int,
        fps: Fraction,
        limits: MediaLimits,
        config: DecodeConfig,
        *,
        keyframes_only: bool = False,
        resample: Resample = "bicubic",
    ) -> None:
        check_backend(config.backend)
        self._fps = fps
        source = IsolatedFrames if config.isolation == "process" else LocalFrames
        step = 1 / fps if keyframes_only else None
        self._source: FrameSource = source(image_size, limits, config, step, resample)
        self.cpu_seconds = 0.0
        """CPU seconds of decoding, here and in a child process"""

    def decode(self, segments: Sequence[Segment]) -> Iterator[DecodeResult]:
        """Yields the frames or error of each segment. A child process decodes ahead."""
        requests = (DecodeRequest(s.uri, s.modality, s.times(self._fps), s.joined_parts) for s in segments)
        results = TimedIterator(self._source.decode(requests))
        for segment in segments:
            before = results.cpu_seconds
            result = next(results)
            self.cpu_seconds += results.cpu_seconds - before + result.cpu_seconds
            yield DecodeResult(_checked(segment, result.frames), result.seconds)


def _checked(segment: Segment, frames: FrameBatch | DecodeError) -> FrameBatch | DecodeError:
    if isinstance(frames, DecodeError) or len(frames.frames) or not (frames.num_missing or segment.segment_index == 0):
        return frames
    message = f"{source_name(segment.uri)}: none of the {segment.num_frames} sampled frames could be decoded"
    return DecodeError("decode_video", ErrorType.FRAMES_MISSING, message)


@dataclass(slots=True)
class _PendingSegment:
    segment: Segment
    result: DecodeResult
    tokens: list[torch.Tensor] = field(default_factory=list)
    num_encoded: int = 0
    encode_seconds: float = 0.0

    @property
    def frames(self) -> np.ndarray | None:
        """(F, S, S, 3) uint8; None for an error"""
        return None if isinstance(self.result.frames, DecodeError) else self.result.frames.frames

    @property
    def num_frames(self) -> int:
        return 0 if self.frames is None else len(self.frames)


class SegmentEncoder:
    """Encodes decoded segments as FEATURES rows; short segments share batches."""

    def __init__(self, encoder: FrameEncoder, fps: Fraction) -> None:
        self._encoder = encoder
        self._fps = fps
        self.cpu_seconds = 0.0
        """CPU seconds; for an encoder on a GPU, its busy seconds"""

    def rows(self, segments: Sequence[Segment], decoded: Iterable[DecodeResult]) -> Iterator[Row]:
        """Yields one row per segment, in order."""
        source = TimedIterator(decoded)
        rows = TimedIterator(self._rows(segments, source))
        yield from rows
        if self._encoder.config.device == "cpu":
            self.cpu_seconds += rows.cpu_seconds - source.cpu_seconds

    def _rows(self, segments: Sequence[Segment], decoded: Iterator[DecodeResult]) -> Iterator[Row]:
        pending: deque[_PendingSegment] = deque()
        batch_frames = self._encoder.config.encode_batch_frames
        num_frames = 0  # decoded but not encoded
        for segment in segments:
            pending.append(_PendingSegment(segment, next(decoded)))
            num_frames += pending[-1].num_frames
            if num_frames >= batch_frames:
                num_frames -= self._encode(pending, num_frames - num_frames % batch_frames)
            while pending and pending[0].num_encoded == pending[0].num_frames:
                yield self._row(pending.popleft())
        self._encode(pending, num_frames)
        while pending:
            yield self._row(pending.popleft())

    def _encode(self, pending: Iterable[_PendingSegment], num_frames: int) -> int:
        chosen: list[tuple[_PendingSegment, np.ndarray]] = []
        left = num_frames
        for entry in pending:
            if left and entry.frames is not None:
                frames = entry.frames[entry.num_encoded : entry.num_encoded + left]
                chosen.append((entry, frames))
                left -= len(frames)
        if not chosen:
            return 0
        started, others_started = time.perf_counter(), _cpu_of_other_threads()
        tokens = self._encoder.encode(np.concatenate([frames for _, frames in chosen]))
        seconds = time.perf_counter() - started
        is_on_cpu = self._encoder.config.device == "cpu"
        self.cpu_seconds += _cpu_of_other_threads() - others_started if is_on_cpu else seconds
        parts = torch.split(tokens, [len(frames) for _, frames in chosen])
        for (entry, frames), part in zip(chosen, parts, strict=True):
            entry.tokens.append(part)
            entry.num_encoded += len(frames)
            entry.encode_seconds += seconds * len(frames) / num_frames
        return num_frames

    def _row(self, entry: _PendingSegment) -> Row:
        segment, frames = entry.segment, entry.result.frames
        row: Row = {
            **{name: getattr(segment, name) for name in _PLAN_FIELDS},
            "uri": source_name(segment.uri),
            "start_seconds": float(segment.time(0, self._fps)),
            "end_seconds": float(segment.time(segment.num_frames, self._fps)),
            "num_frames": entry.num_frames,
            "num_tokens_per_frame": self._encoder.num_tokens_per_frame,
            "dim": self._encoder.dim,
            "dtype": "bfloat16",
            "decode_ms": entry.result.seconds * 1e3,
            "encode_ms": entry.encode_seconds * 1e3,
        }
        if isinstance(frames, DecodeError):
            return row | {
                "status": "error",
                "error_stage": frames.stage,
                "error_type": frames.error_type.value,
                "error_message": frames.message,
                "frames_missing": segment.num_frames,
                "frame_times_seconds": [],
                "frame_pts_seconds": [],
                "features": None,
            }
        data = features_bytes(torch.cat(entry.tokens)) if entry.tokens else b""
        return row | {
            "status": "ok",
            **_fault(segment, frames),
            "frames_missing": frames.num_missing,
            "frame_times_seconds": frames.times_seconds.tolist(),
            "frame_pts_seconds": frames.pts_seconds.tolist(),
            "features_xxh64": xxhash.xxh64_intdigest(data),
            "features": data,
        }


def _fault(segment: Segment, frames: FrameBatch) -> Row:
    """Returns status and error of a partial segment, else nothing."""
    faults = (
        (ErrorType.FRAMES_MISSING, frames.num_missing, "could not be decoded"),
        (ErrorType.FRAMES_DAMAGED, frames.num_damaged, "are damaged, for instance cut off, and stored as they decode"),
    )
    for error_type, count, text in faults:
        if count:
            return {
                "status": "partial",
                "error_stage": decode_stage(segment.modality),
                "error_type": error_type.value,
                "error_message": f"{count} of {segment.num_frames} sampled frames {text}",
            }
    return {}


def _cpu_of_other_threads() -> float:
    return time.process_time() - time.thread_time()


_PLAN_FIELDS = tuple(
    field.name
    for field in fields(Segment)
    if field.name not in ("grid_start_seconds", "step_seconds", "first_frame", "num_frames", "joined_parts")
)
"""`asdict` would copy every value: slow for images."""
