"""Tasks and their results, which Ray passes between processes."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from timeviper_platform.data.plan.segments import SEGMENT_FRAMES, Segment
from timeviper_platform.data.store.audit import Outcomes
from timeviper_platform.data.video_worker.frame_source import DecodeResult

TASKS_PER_WORKER = 8
"""Minimum tasks per worker for small inputs."""

MAX_TASK_SEGMENTS = 4096


@dataclass(frozen=True, slots=True)
class TaskStart:
    started: float
    """seconds since the epoch"""
    decoder: str
    """host and process"""
    retries: int = 0
    decode_cpu_seconds: float = 0.0

    @classmethod
    def now(cls) -> TaskStart:
        return cls(time.time(), process_name())


@dataclass(frozen=True, slots=True)
class WriteTask:
    """Segments that become one data file."""

    name: str
    """hash of the segment ids"""
    segments: tuple[Segment, ...]
    decoded: tuple[DecodeResult, ...] = ()
    """frames of each segment, from decoder to encoder in mode split"""
    start: TaskStart | None = None
    """set together with `decoded`"""

    @property
    def num_frames(self) -> int:
        return sum(segment.num_frames for segment in self.segments)


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskResult:
    task: str
    num_frames: int
    segments: Outcomes
    error_types: list[str]
    """of partial and rejected segments"""
    media: list[str]
    reasons: list[str]
    """stage/type of the first error of each medium; empty if there is none"""
    messages: list[str]
    """error message of each medium; empty if there is none"""
    feature_bytes: int
    decode_seconds: float
    encode_seconds: float
    write_seconds: float
    started: float
    """seconds since the epoch"""
    ended: float
    retries: int
    """repeated storage requests"""
    decoder: str
    """host and process; equal to `encoder` in mode fused"""
    encoder: str
    worker: str
    """writer of the file"""
    decode_cpu_seconds: float = 0.0
    """CPU seconds of all decoding processes, without waits"""
    encode_cpu_seconds: float = 0.0
    """CPU seconds of the encoder; on a GPU, its busy seconds"""
    write_cpu_seconds: float = 0.0


def cut_tasks(segments: Collection[Segment], frames_per_file: int, num_workers: int) -> Iterator[WriteTask]:
    """Cuts segments into tasks of at most `frames_per_file` frames, in order.

    Small inputs are cut finer, so that every worker has work until near the end. Reads the segments twice.
    """
    total = sum(segment.num_frames for segment in segments)
    share = -(-total // (TASKS_PER_WORKER * num_workers))
    frames_per_task = min(frames_per_file, max(SEGMENT_FRAMES, share))
    group: list[Segment] = []
    num_frames = 0
    for segment in segments:
        if group and (num_frames + segment.num_frames > frames_per_task or len(group) == MAX_TASK_SEGMENTS):
            yield _task(group)
            group, num_frames = [], 0
        group.append(segment)
        num_frames += segment.num_frames
    if group:
        yield _task(group)


def _task(segments: Sequence[Segment]) -> WriteTask:
    name = hashlib.sha256("".join(segment.segment_id for segment in segments).encode()).hexdigest()[:32]
    return WriteTask(name, tuple(segments))


def process_name() -> str:
    return f"{socket.gethostname()}/{os.getpid()}"
