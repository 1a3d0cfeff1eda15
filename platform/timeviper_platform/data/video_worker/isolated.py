"""Probes and decodes in a child process, and finds the medium at fault when it fails."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from timeviper_platform.common import storage
from timeviper_platform.data.media.container import DecodeError, ErrorType, MediaLimits, source_name
from timeviper_platform.data.media.medium import Medium
from timeviper_platform.data.media.probe import PROBE_THREADS
from timeviper_platform.data.video.frames import FrameBatch, Resample
from timeviper_platform.data.video_worker.child_process import ChildDiedError, ChildLimits, DecodeChild
from timeviper_platform.data.video_worker.frame_source import DecodeConfig, DecodeRequest, DecodeResult, decode_stage

logger = logging.getLogger(__name__)

MAX_FRAMES_PER_JOB = 64
"""One long segment, or many images."""

JOBS_AHEAD = 2

IDLE_SECONDS = 0.01
"""Decoding time of a few images."""


def _idle() -> None:
    time.sleep(IDLE_SECONDS)


@dataclass(slots=True)
class _Job:
    requests: deque[DecodeRequest]
    """Requests without a reply."""
    memory: np.ndarray | None = None
    """(bytes,) uint8: frames of all requests; None if the job could not be sent."""
    num_bytes: int = 0
    """Bytes filled by earlier replies."""


@dataclass(slots=True)
class IsolatedFrames:
    """FrameSource in a child process that decodes ahead.

    The child decodes in order: when it ends, the first request without a reply is at fault.
    """

    image_size: int
    limits: MediaLimits
    config: DecodeConfig
    keyframe_step: Fraction | None = None
    """See `open_video`."""
    resample: Resample = "bicubic"
    idle: Callable[[], None] = _idle
    """See `DecodeChild.reply`."""
    child: DecodeChild | None = field(init=False)
    _timed_out: dict[str, DecodeError] = field(default_factory=dict, init=False)
    """Errors of media past the deadline. Their further segments fail at once."""

    def __post_init__(self) -> None:
        self.child = self._start()

    def decode(self, requests: Iterable[DecodeRequest]) -> Iterator[DecodeResult]:
        """See `FrameSource.decode`; consumes requests ahead of their results."""
        groups, jobs = _groups(requests), deque[_Job]()
        try:
            while True:
                while len(jobs) < JOBS_AHEAD and (group := next(groups, None)):
                    jobs.append(_Job(deque(group)))
                    self._send(jobs[-1])
                if not jobs:
                    return
                while jobs[0].requests:
                    yield self._next(jobs)
                jobs.popleft()
        finally:
            if any(job.requests for job in jobs):  # drop the remaining work
                self._end_child()

    def _next(self, jobs: deque[_Job]) -> DecodeResult:
        """Returns the first request's result. Retries once when the child dies."""
        request = jobs[0].requests[0]
        stage, name = decode_stage(request.modality), source_name(request.uri)
        try:
            if request.uri in self._timed_out:
                return self._failed(jobs, self._timed_out[request.uri])
            try:
                return self._received(jobs)
            except ChildDiedError as error:
                logger.warning("%s: %s; retrying once", name, error)
                self._resend(jobs)
                return self._received(jobs)
        except TimeoutError:
            message = f"{name}: not decoded within {self.config.deadline_seconds = }; raise it and set retry_errors"
            self._timed_out[request.uri] = DecodeError(stage, ErrorType.DECODER_TIMEOUT, message)
            return self._failed(jobs, self._timed_out[request.uri], is_sent=True)
        except ChildDiedError as error:
            return self._failed(
                jobs, DecodeError(stage, ErrorType.DECODER_CRASHED, f"{name}: {error}, twice"), is_sent=True
            )

    def _received(self, jobs: deque[_Job]) -> DecodeResult:
        job = jobs[0]
        if self.child is None or job.memory is None:
            raise ChildDiedError("the decoding process ended before the request")
        reply = self.child.reply(self.config.deadline_seconds, self.idle)
        job.requests.popleft()
        storage.add_retries(reply["retries"])
        costs = reply["seconds"], reply["cpu_seconds"]
        if "error" in reply:
            return DecodeResult(_error_of(reply), *costs)
        shape = (reply["num_frames"], self.image_size, self.image_size, 3)
        start, job.num_bytes = job.num_bytes, job.num_bytes + math.prod(shape)
        pts, times = np.array(reply["pts_seconds"], float), np.array(reply["times_seconds"], float)
        pixels = job.memory[start : job.num_bytes].reshape(shape)
        batch = FrameBatch(pixels, pts, times, reply["num_missing"], reply["num_damaged"])
        return DecodeResult(batch, *costs)

    def _failed(self, jobs: deque[_Job], error: DecodeError, *, is_sent: bool = False) -> DecodeResult:
        """Fails the first request; `is_sent` resends the others to a new child."""
        jobs[0].requests.popleft()
        if is_sent:
            self._resend(jobs)
        return DecodeResult(error, 0.0)

    def _resend(self, jobs: Iterable[_Job]) -> None:
        self._end_child()
        for job in jobs:
            self._send(job)

    def _send(self, job: _Job) -> None:
        if self.child is None:
            self.child = self._start()
        requests = [request for request in job.requests if request.uri not in self._timed_out]
        content = {
            "kind": "segments",
            "requests": [
                (request.uri, request.modality, [t.as_integer_ratio() for t in request.times], request.joined_parts)
                for request in requests
            ],
            "keyframe_step": self.keyframe_step and self.keyframe_step.as_integer_ratio(),
            "image_size": self.image_size,
            "resample": self.resample,
            "limits": asdict(self.limits),
            "backend": self.config.backend,
            "max_open_videos": self.config.max_open_videos,
        }
        num_frames, deadline = sum(len(request.times) for request in requests), self.config.deadline_seconds
        job.memory, job.num_bytes = None, 0
        with contextlib.suppress(ChildDiedError, TimeoutError):  # `_received` will see it again
            job.memory = self.child.send(content, num_frames=num_frames, deadline_seconds=deadline)

    def _start(self) -> DecodeChild:
        # NVIDIA's driver takes an unknown amount of the process's memory
        limit = None if self.config.backend == "nvdec" else self.config.max_memory_bytes
        return DecodeChild(ChildLimits(max_memory_bytes=limit))

    def _end_child(self) -> None:
        if self.child is not None:
            self.child.kill()
            self.child = None


def _groups(requests: Iterable[DecodeRequest]) -> Iterator[list[DecodeRequest]]:
    group: list[DecodeRequest] = []
    num_frames = 0
    for request in requests:
        if group and num_frames + len(request.times) > MAX_FRAMES_PER_JOB:
            yield group
            group, num_frames = [], 0
        group.append(request)
        num_frames += len(request.times)
    if group:
        yield group


@dataclass(slots=True)
class IsolatedProbes:
    """ProbeSource in a child process.

    The child probes many media at once. When it fails, those it had started are probed one by one, the others together.
    """

    limits: MediaLimits
    config: DecodeConfig
    child: DecodeChild | None = field(default=None, init=False)

    def probe(self, media: Sequence[Medium]) -> list[Medium]:
        found: dict[str, Medium] = {}
        waiting = list(dict.fromkeys(medium.uri for medium in media))  # clips of one film share its headers
        while waiting:
            if len(waiting) > 1:
                found |= self._probe_many(waiting)
                waiting = [uri for uri in waiting if uri not in found]
            suspects, waiting = waiting[:PROBE_THREADS], waiting[PROBE_THREADS:]  # the child starts them in order
            found |= {uri: self._probe_one(uri) for uri in suspects}
        return [medium.with_headers(found[medium.uri]) for medium in media]

    def _probe_many(self, uris: Sequence[str]) -> dict[str, Medium]:
        """Returns media probed before the child failed, except those out of memory."""
        found: dict[str, Medium] = {}
        try:
            for medium in self._probed(uris):
                found[medium.uri] = medium
        except (TimeoutError, ChildDiedError) as error:
            ended = (
                f"no reply within {self.config.probe_deadline_seconds = }" if isinstance(error, TimeoutError) else error
            )
            logger.warning("%s after probing %d of %d media; continuing one by one", ended, len(found), len(uris))
            self._end_child()
        finished = {uri: medium for uri, medium in found.items() if not _is_out_of_memory(medium)}
        if len(finished) < len(found):
            self._end_child()
        return finished

    def _probe_one(self, uri: str) -> Medium:
        name = source_name(uri)
        try:
            return self._probe_once(uri)
        except ChildDiedError as error:
            logger.warning("%s: %s; retrying once", name, error)
        try:
            return self._probe_once(uri)
        except ChildDiedError as error:
            return Medium(uri, error=DecodeError("probe", ErrorType.DECODER_CRASHED, f"{name}: {error}, twice"))

    def _probe_once(self, uri: str) -> Medium:
        try:
            (medium,) = self._probed([uri])
        except TimeoutError:
            self._end_child()
            message = f"{source_name(uri)}: not probed within {self.config.probe_deadline_seconds = }"
            return Medium(uri, error=DecodeError("probe", ErrorType.DECODER_TIMEOUT, message))
        except ChildDiedError:
            self._end_child()
            raise
        return medium

    def _probed(self, uris: Sequence[str]) -> Iterator[Medium]:
        if self.child is None:
            self.child = DecodeChild(ChildLimits(max_memory_bytes=self.config.max_memory_bytes))
        job = {"kind": "probes", "uris": list(uris), "limits": asdict(self.limits)}
        deadline = self.config.probe_deadline_seconds
        self.child.send(job, deadline_seconds=deadline)
        for _ in uris:
            reply = self.child.reply(deadline)
            storage.add_retries(reply["retries"])
            uri, headers = uris[reply["index"]], reply.get("headers")
            if headers is None:
                yield Medium(uri, error=_error_of(reply))
            else:
                yield Medium(uri, **{**headers, "duration_seconds": Fraction(headers["duration_seconds"])})

    def _end_child(self) -> None:
        if self.child is not None:
            self.child.kill()
            self.child = None


def _error_of(reply: dict[str, Any]) -> DecodeError:
    stage, kind, message = reply["error"]
    return DecodeError(stage, ErrorType(kind), message)


def _is_out_of_memory(medium: Medium) -> bool:
    return medium.error is not None and medium.error.error_type == ErrorType.OUT_OF_MEMORY
