"""Decodes and probes in its own process: `python -m timeviper_platform.data.video_worker.child_main SOCKET LIMITS`.

Limits itself, says that it is ready, then answers one job after another until the other side (isolation.py) closes the
socket or kills it. Knows data/decode.py, probe.py and segment_frames.py; nothing of Ray, models, services.

    job      12 bytes (length of the job, of the data) with a file descriptor, the job as JSON, data
    answer   4 bytes (its length), JSON; frames lie in the memory behind the descriptor, those of each answer behind
             those of the one before

A job of kind `segments` has an answer for each of its requests, in order; one of `probes` for each of its media, as
they come; one of `medium` a single one. Jobs may be sent before others are answered.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np

from timeviper_platform.common import storage
from timeviper_platform.data.media.container import DecodeError, ErrorType, MediaLimits, Stage, source_name
from timeviper_platform.data.media.medium import HEADER_FIELDS
from timeviper_platform.data.media.probe import PROBE_THREADS, probe_media
from timeviper_platform.data.video.frames import FrameBatch
from timeviper_platform.data.video.reader import read_frames
from timeviper_platform.data.video_worker.frame_source import DecodeConfig, DecodeRequest, LocalFrames, decode_stage

JOB = struct.Struct("<IQ")
ANSWER = struct.Struct("<I")
GRACE_SECONDS = 5
"""The parent kills first; a child whose parent has gone ends itself so much later."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""of malloc.h"""

_NO_FRAMES = np.empty(0, np.uint8)
_Answer = tuple[dict[str, Any], np.ndarray]
"""what is said, and frames"""


def limit_resources(limits: dict[str, int | None]) -> None:
    """From here on the process cannot take more than this, whatever it is made to decode."""
    # DATA and not AS: what counts is memory written, and libraries map far more address space than they use
    kinds = {
        "max_memory_bytes": resource.RLIMIT_DATA,
        "cpu_seconds": resource.RLIMIT_CPU,
        "max_open_files": resource.RLIMIT_NOFILE,
        "max_written_bytes": resource.RLIMIT_FSIZE,
    }
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name, kind in kinds.items():
        limit = limits[name]
        if limit is not None:
            hard = resource.getrlimit(kind)[1]
            soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(kind, (soft, soft + 1 if kind == resource.RLIMIT_CPU else soft))


class JobRunner:
    """Jobs to answers; videos of segments stay open between jobs."""

    def __init__(self) -> None:
        self._source: LocalFrames | None = None
        self._cpu_seconds = time.process_time()
        """of this process, up to the last answer of a segment"""

    def answers(self, job: dict[str, Any], data: bytes) -> Iterator[_Answer]:
        """What is said of frames, and the frames; or why there are none."""
        kinds: dict[str, Callable[[dict[str, Any]], Iterator[_Answer]]] = {
            "segments": self._segments,
            "probes": _probes,
            "medium": partial(_media, data=data),
        }
        retries = storage.num_retries()
        for answer, frames in kinds[job["kind"]](job):
            now = storage.num_retries()
            yield answer | {"retries": now - retries}, frames
            retries = now

    def _segments(self, job: dict[str, Any]) -> Iterator[_Answer]:
        if self._source is None:
            config = DecodeConfig(backend=job["backend"], max_open_videos=job["max_open_videos"], isolation="none")
            step = job["keyframe_step"] and Fraction(*job["keyframe_step"])
            self._source = LocalFrames(job["image_size"], _limits(job), config, step)
        for uri, modality, times in job["requests"]:
            request = DecodeRequest(
                uri, modality, [Fraction(numerator, denominator) for numerator, denominator in times]
            )
            began, cpu_seconds = time.perf_counter(), self._cpu_seconds
            answer, frames = _or_error(partial(_frames, self._source, request), decode_stage(modality), uri)
            seconds, self._cpu_seconds = time.perf_counter() - began, time.process_time()
            yield answer | {"seconds": seconds, "cpu_seconds": self._cpu_seconds - cpu_seconds}, frames


def _frames(source: LocalFrames, request: DecodeRequest) -> _Answer:
    return _answer(source.frames(request))


def _media(job: dict[str, Any], data: bytes) -> Iterator[_Answer]:
    yield _or_error(lambda: _medium(job, data), "decode_video", job["uri"] or data)


def _probes(job: dict[str, Any]) -> Iterator[_Answer]:
    limits = _limits(job)
    with ThreadPoolExecutor(PROBE_THREADS) as pool:  # begins them in order, as isolated_sources.py knows
        numbers = {
            pool.submit(_or_error, partial(_probe, uri, limits), "probe", uri): number
            for number, uri in enumerate(job["uris"])
        }
        for future in as_completed(numbers):
            answer, nothing = future.result()
            yield answer | {"number": numbers[future]}, nothing


def _probe(uri: str, limits: MediaLimits) -> _Answer:
    medium = probe_media(uri, limits)
    headers = {name: getattr(medium, name) for name in HEADER_FIELDS}
    return {"headers": {**headers, "duration_seconds": str(medium.duration_seconds)}}, _NO_FRAMES


def _or_error(work: Callable[[], _Answer], stage: Stage, source: str | bytes) -> _Answer:
    """The work's answer, or one that says what became of it."""
    try:
        return work()
    except DecodeError as error:
        return _error(error.stage, error.error_type, error.message)
    except MemoryError:
        return _error(stage, ErrorType.OUT_OF_MEMORY, f"{source_name(source)}: it takes more memory than it may")
    except Exception as error:  # noqa: BLE001 - whatever a file makes a library raise is that file's own row
        return _error(stage, ErrorType.DECODER_CRASHED, f"{source_name(source)}: {type(error).__name__}: {error}")


def _medium(job: dict[str, Any], data: bytes) -> _Answer:
    source: str | bytes = job["uri"] if job["uri"] is not None else data
    limits = _limits(job)
    end_seconds = float(probe_media(source, limits).duration_seconds)
    fps, max_frames = Fraction(job["fps"]), job["max_frames"]
    batch = read_frames(source, job["image_size"], fps=fps, max_frames=max_frames, limits=limits)
    answer, frames = _answer(batch)
    return answer | {"end_seconds": end_seconds}, frames


def _limits(job: dict[str, Any]) -> MediaLimits:
    return MediaLimits(**{**job["limits"], "allowed_domains": tuple(job["limits"]["allowed_domains"])})


def _answer(batch: FrameBatch) -> _Answer:
    answer = {
        "num_frames": len(batch.frames),
        "pts_seconds": batch.pts_seconds.tolist(),
        "times_seconds": batch.times_seconds.tolist(),
        "num_missing": batch.num_missing,
    }
    return answer, batch.frames


def _error(stage: Stage, error_type: ErrorType, message: str) -> _Answer:
    return {"error": [stage, error_type.value, message]}, _NO_FRAMES


def main(connection: socket.socket) -> None:
    """Jobs until the other side closes."""
    runner = JobRunner()
    connection.sendall(ANSWER.pack(0))  # ready
    while True:
        header, descriptors, _, _ = socket.recv_fds(connection, JOB.size, 1)
        if not header:
            return
        num_job_bytes, num_data_bytes = JOB.unpack(header)
        job = json.loads(_receive(connection, num_job_bytes))
        data = _receive(connection, num_data_bytes)
        signal.setitimer(signal.ITIMER_REAL, job["deadline_seconds"] + GRACE_SECONDS)  # SIGALRM ends the process
        with mmap.mmap(descriptors[0], 0) as memory:
            os.close(descriptors[0])
            num_bytes = 0
            for answer, frames in runner.answers(job, data):
                memory[num_bytes : num_bytes + frames.nbytes] = frames.reshape(-1).data
                num_bytes += frames.nbytes
                text = json.dumps(answer).encode()
                connection.sendall(ANSWER.pack(len(text)) + text)
                signal.setitimer(signal.ITIMER_REAL, job["deadline_seconds"] + GRACE_SECONDS)  # for the next answer
        signal.setitimer(signal.ITIMER_REAL, 0)


def _receive(connection: socket.socket, num_bytes: int) -> bytes:
    parts = bytearray()
    while len(parts) < num_bytes:
        part = connection.recv(min(1 << 20, num_bytes - len(parts)))
        if not part:
            raise ConnectionError("the other side has gone")
        parts += part
    return bytes(parts)


def keep_freed_memory() -> None:
    """Pictures are allocated and freed again and again; what goes back to the system between comes as new pages, which
    a virtual machine pays as much for as for decoding a small JPEG."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc's
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 128 << 20)


if __name__ == "__main__":
    keep_freed_memory()
    limit_resources(json.loads(sys.argv[2]))
    main(socket.socket(fileno=int(sys.argv[1])))
