"""Main program of the decode child: `python -m timeviper_platform.data.video_worker.child_main SOCKET LIMITS`.

    job    12 bytes (length of JSON and data) with a file descriptor; JSON; data
    reply  4 bytes (length); JSON. Frames follow each other in the descriptor's memory.

Jobs of kind `segments` get a reply per request, in order; `probes` one per medium, as they finish. `medium` opens a
medium, and `pictures` several as the frames of one; each `block` job after them gets the next frames.
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
from timeviper_platform.data.video.pictures import read_image
from timeviper_platform.data.video.reader import OpenMedium, open_medium
from timeviper_platform.data.video_worker.frame_source import DecodeConfig, DecodeRequest, LocalFrames, decode_stage

JOB = struct.Struct("<IQ")
REPLY = struct.Struct("<I")
GRACE_SECONDS = 5
"""Delay between the deadline and the end of an orphaned child."""

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3

_NO_FRAMES = np.empty(0, np.uint8)
_Reply = tuple[dict[str, Any], np.ndarray]


def limit_resources(limits: dict[str, int | None]) -> None:
    """Applies `ChildLimits` to this process."""
    # DATA, not AS: libraries map far more address space than they use
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
    """Runs jobs; keeps videos open between them."""

    def __init__(self) -> None:
        self._source: LocalFrames | None = None
        self._blocks: Iterator[FrameBatch] = iter(())
        """Frames left of the medium that is open."""
        self._cpu_seconds = time.process_time()
        """Process time at the last segment's reply."""

    def replies(self, job: dict[str, Any], data: bytes) -> Iterator[_Reply]:
        kinds: dict[str, Callable[[dict[str, Any]], Iterator[_Reply]]] = {
            "segments": self._segments,
            "probes": _probes,
            "medium": partial(self._open, opened=_medium, data=data),
            "pictures": partial(self._open, opened=_pictures, data=data),
            "block": self._block,
        }
        retries = storage.num_retries()
        for reply, frames in kinds[job["kind"]](job):
            now = storage.num_retries()
            yield reply | {"retries": now - retries}, frames
            retries = now

    def _segments(self, job: dict[str, Any]) -> Iterator[_Reply]:
        if self._source is None:
            config = DecodeConfig(backend=job["backend"], max_open_videos=job["max_open_videos"], isolation="none")
            step = job["keyframe_step"] and Fraction(*job["keyframe_step"])
            self._source = LocalFrames(job["image_size"], _limits(job), config, step, job["resample"])
        for uri, modality, times, joined_parts in job["requests"]:
            exact_times = [Fraction(numerator, denominator) for numerator, denominator in times]
            request = DecodeRequest(uri, modality, exact_times, joined_parts)
            began, cpu_seconds = time.perf_counter(), self._cpu_seconds
            reply, frames = _reply_or_error(partial(_frames, self._source, request), decode_stage(modality), uri)
            seconds, self._cpu_seconds = time.perf_counter() - began, time.process_time()
            yield reply | {"seconds": seconds, "cpu_seconds": self._cpu_seconds - cpu_seconds}, frames

    def _open(
        self, job: dict[str, Any], opened: Callable[[dict[str, Any], bytes], OpenMedium], data: bytes
    ) -> Iterator[_Reply]:
        def head() -> _Reply:
            medium = opened(job, data)
            self._blocks = medium.batches
            facts = {"modality": medium.modality, "end_seconds": float(medium.duration_seconds)}
            return facts | {"num_frames": medium.num_frames}, _NO_FRAMES

        yield _reply_or_error(head, "decode_video", job.get("uri") or data)

    def _block(self, job: dict[str, Any]) -> Iterator[_Reply]:
        def block() -> _Reply:
            batch = next(self._blocks, None)
            return ({"is_end": True}, _NO_FRAMES) if batch is None else _reply(batch)

        yield _reply_or_error(block, "decode_video", "")


def _frames(source: LocalFrames, request: DecodeRequest) -> _Reply:
    return _reply(source.frames(request))


def _probes(job: dict[str, Any]) -> Iterator[_Reply]:
    limits = _limits(job)
    with ThreadPoolExecutor(PROBE_THREADS) as pool:  # starts them in order, which IsolatedProbes relies on
        indices = {
            pool.submit(_reply_or_error, partial(_probe, uri, limits), "probe", uri): index
            for index, uri in enumerate(job["uris"])
        }
        for future in as_completed(indices):
            reply, no_frames = future.result()
            yield reply | {"index": indices[future]}, no_frames


def _probe(uri: str, limits: MediaLimits) -> _Reply:
    medium = probe_media(uri, limits)
    headers = {name: getattr(medium, name) for name in HEADER_FIELDS}
    return {"headers": {**headers, "duration_seconds": str(medium.duration_seconds)}}, _NO_FRAMES


def _reply_or_error(work: Callable[[], _Reply], stage: Stage, source: str | bytes) -> _Reply:
    try:
        return work()
    except DecodeError as error:
        return _error(error.stage, error.error_type, error.message)
    except MemoryError:
        return _error(stage, ErrorType.OUT_OF_MEMORY, f"{source_name(source)}: decoding exceeds the memory limit")
    except Exception as error:  # noqa: BLE001 - libraries raise any type for a broken file
        return _error(stage, ErrorType.DECODER_CRASHED, f"{source_name(source)}: {type(error).__name__}: {error}")


def _medium(job: dict[str, Any], data: bytes) -> OpenMedium:
    source: str | bytes = job["uri"] if job["uri"] is not None else data
    choice = {name: job[name] for name in ("max_frames", "frame_selection", "resample")}
    size, fps = job["image_size"], Fraction(job["fps"])
    return open_medium(source, size, fps=fps, limits=_limits(job), frames_per_batch=job["block_frames"], **choice)


def _pictures(job: dict[str, Any], data: bytes) -> OpenMedium:
    """Opens pictures, each at a URI or the next bytes of `data`."""
    limits, sources, start = _limits(job), list[str | bytes](), 0
    for uri, num_bytes in job["pictures"]:
        sources.append(uri if uri is not None else data[start : start + num_bytes])
        start += num_bytes

    def batches() -> Iterator[FrameBatch]:
        for first in range(0, len(sources), job["block_frames"]):
            some = sources[first : first + job["block_frames"]]
            read = partial(read_image, image_size=job["image_size"], limits=limits, resample=job["resample"])
            frames = [read(one).frames for one in some]
            numbers = np.arange(first, first + len(some), dtype=float)
            yield FrameBatch(np.concatenate(frames), numbers, numbers)

    return OpenMedium("image", Fraction(0), len(sources), batches())


def _limits(job: dict[str, Any]) -> MediaLimits:
    return MediaLimits(**{**job["limits"], "allowed_domains": tuple(job["limits"]["allowed_domains"])})


def _reply(batch: FrameBatch) -> _Reply:
    reply = {
        "num_frames": len(batch.frames),
        "pts_seconds": batch.pts_seconds.tolist(),
        "times_seconds": batch.times_seconds.tolist(),
        "num_missing": batch.num_missing,
        "num_damaged": batch.num_damaged,
    }
    return reply, batch.frames


def _error(stage: Stage, error_type: ErrorType, message: str) -> _Reply:
    return {"error": [stage, error_type.value, message]}, _NO_FRAMES


def leave_network() -> bool:
    """Moves this process to a new network namespace without interfaces; returns False where the kernel forbids that."""
    unshare = getattr(ctypes.CDLL(None), "unshare", None)
    # without privileges, a user namespace is needed, which administrators may switch off
    return unshare is not None and (unshare(CLONE_NEWNET) == 0 or unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0)


def main(connection: socket.socket, *, has_network: bool = True) -> None:
    runner = JobRunner()
    connection.sendall(REPLY.pack(has_network))  # ready
    while True:
        header, descriptors, _, _ = socket.recv_fds(connection, JOB.size, 1)
        if not header:
            return
        num_job_bytes, num_data_bytes = JOB.unpack(header)
        job = json.loads(_receive(connection, num_job_bytes))
        data = _receive(connection, num_data_bytes)
        signal.setitimer(signal.ITIMER_REAL, job["deadline_seconds"] + GRACE_SECONDS)  # SIGALRM kills
        with mmap.mmap(descriptors[0], 0) as memory:
            os.close(descriptors[0])
            num_bytes = 0
            for reply, frames in runner.replies(job, data):
                memory[num_bytes : num_bytes + frames.nbytes] = frames.reshape(-1).data
                num_bytes += frames.nbytes
                text = json.dumps(reply).encode()
                connection.sendall(REPLY.pack(len(text)) + text)
                signal.setitimer(signal.ITIMER_REAL, job["deadline_seconds"] + GRACE_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _receive(connection: socket.socket, num_bytes: int) -> bytes:
    received = bytearray()
    while len(received) < num_bytes:
        chunk = connection.recv(min(1 << 20, num_bytes - len(received)))
        if not chunk:
            raise ConnectionError("the parent closed the socket")
        received += chunk
    return bytes(received)


def keep_freed_memory() -> None:
    """Makes malloc reuse freed frames: on virtual machines, new pages cost as much as decoding a small JPEG."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc only
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 128 << 20)


if __name__ == "__main__":
    keep_freed_memory()
    given_limits = json.loads(sys.argv[2])
    limit_resources(given_limits)
    main(
        socket.socket(fileno=int(sys.argv[1])),
        has_network=not (given_limits["no_network"] and leave_network()),
    )
