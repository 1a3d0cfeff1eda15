"""Segments and headers of media by way of a killable child (isolation.py): what preprocessing decodes and probes with.

Knows what to do when the child ends, hangs or lacks memory: which medium is to blame, who is asked again, and what
becomes an error row. Not how a child is started or spoken to.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from timeviper_platform.common import storage
from timeviper_platform.data.media.container import DecodeError, ErrorType, MediaLimits, source_name
from timeviper_platform.data.media.medium import Medium
from timeviper_platform.data.media.probe import PROBE_THREADS
from timeviper_platform.data.video.frames import FrameBatch
from timeviper_platform.data.video_worker.child_process import ChildDiedError, ChildLimits, DecodeChild
from timeviper_platform.data.video_worker.frame_source import DecodeConfig, DecodeRequest, DecodeResult, decode_stage

logger = logging.getLogger(__name__)


MAX_FRAMES_A_JOB = 64
"""of segments that the child is given together: one long one, or many pictures"""

JOBS_AHEAD = 2
"""jobs that the child has at a time: it decodes one while this process works on what came of another"""

NAP_SECONDS = 0.01
"""a few pictures' time; a child that is ahead has far more to do"""


@dataclass(slots=True)
class _Job:
    """Requests that the child was given together, those without an answer yet."""

    requests: deque[DecodeRequest]
    memory: np.ndarray | None = None
    """(bytes,) uint8: the frames of all of them, one after the other; None where the child has ended"""
    num_bytes: int = 0
    """of memory that hold frames of requests that were answered"""


@dataclass(slots=True)
class IsolatedFrames:
    """A FrameSource whose decoding cannot take this process with it, and goes on while this process does other things.

    The child decodes in order. When it ends, the first request without an answer is the one it was at.
    """

    image_size: int
    limits: MediaLimits
    config: DecodeConfig
    keyframe_step: Fraction | None = None
    """see `open_video`"""
    _child: DecodeChild | None = field(init=False)
    _given_up: dict[str, DecodeError] = field(default_factory=dict, init=False)
    """media that passed the deadline once: each further segment would cost as much"""

    def __post_init__(self) -> None:
        self._child = self._start()

    def decode(self, requests: Iterable[DecodeRequest]) -> Iterator[DecodeResult]:
        """See `FrameSource.decode`; requests are taken ahead of their results."""
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
            if any(job.requests for job in jobs):  # nobody waits for what the child still does
                self._end_child()

    def _next(self, jobs: deque[_Job]) -> DecodeResult:
        """What becomes of the first request; it is tried again when the child dies: something else may have killed
        it."""
        request = jobs[0].requests[0]
        stage, name = decode_stage(request.modality), source_name(request.uri)
        try:
            if request.uri in self._given_up:
                return self._failed(jobs, self._given_up[request.uri])
            try:
                return self._answered(jobs)
            except ChildDiedError as error:
                logger.warning("%s: %s; trying once more", name, error)
                self._send_again(jobs)
                return self._answered(jobs)
        except TimeoutError:
            message = f"{name}: not decoded within {self.config.deadline_seconds = }; see retry_errors"
            self._given_up[request.uri] = DecodeError(stage, ErrorType.DECODER_TIMEOUT, message)
            return self._failed(jobs, self._given_up[request.uri], is_sent=True)
        except ChildDiedError as error:
            return self._failed(
                jobs, DecodeError(stage, ErrorType.DECODER_CRASHED, f"{name}: {error}, twice"), is_sent=True
            )

    def _answered(self, jobs: deque[_Job]) -> DecodeResult:
        """The first request's result as the child says it."""
        job = jobs[0]
        if self._child is None or job.memory is None:
            raise ChildDiedError("the decoding process ended before it was asked")
        answer = self._child.answer(self.config.deadline_seconds, NAP_SECONDS)
        job.requests.popleft()
        storage.add_retries(answer["retries"])
        costs = answer["seconds"], answer["cpu_seconds"]
        if "error" in answer:
            return DecodeResult(_error_of(answer), *costs)
        shape = (answer["num_frames"], self.image_size, self.image_size, 3)
        start, job.num_bytes = job.num_bytes, job.num_bytes + math.prod(shape)
        pts, shown_for = np.array(answer["pts_seconds"], float), np.array(answer["times_seconds"], float)
        pixels = job.memory[start : job.num_bytes].reshape(shape)
        return DecodeResult(FrameBatch(pixels, pts, shown_for, answer["num_missing"]), *costs)

    def _failed(self, jobs: deque[_Job], error: DecodeError, *, is_sent: bool = False) -> DecodeResult:
        """The first request's result where the child has none; what it was given with it is sent again."""
        jobs[0].requests.popleft()
        if is_sent:
            self._send_again(jobs)
        return DecodeResult(error, 0.0, 0.0)

    def _send_again(self, jobs: Iterable[_Job]) -> None:
        """Gives a fresh child all that has no answer yet."""
        self._end_child()
        for job in jobs:
            self._send(job)

    def _send(self, job: _Job) -> None:
        """Gives the child a job, without what is given up."""
        if self._child is None:
            self._child = self._start()
        wanted = [request for request in job.requests if request.uri not in self._given_up]
        content = {
            "kind": "segments",
            "requests": [
                (request.uri, request.modality, [t.as_integer_ratio() for t in request.times]) for request in wanted
            ],
            "keyframe_step": self.keyframe_step and self.keyframe_step.as_integer_ratio(),
            "image_size": self.image_size,
            "limits": asdict(self.limits),
            "backend": self.config.backend,
            "max_open_videos": self.config.max_open_videos,
        }
        num_frames, deadline = sum(len(request.times) for request in wanted), self.config.deadline_seconds
        job.memory, job.num_bytes = None, 0
        with contextlib.suppress(ChildDiedError, TimeoutError):  # the first answer that is missed says so again
            job.memory = self._child.send(content, num_frames=num_frames, deadline_seconds=deadline)

    def _start(self) -> DecodeChild:
        # NVIDIA's driver takes memory of the process that nobody states, so that no limit for it is right
        limit = None if self.config.backend == "nvdec" else self.config.max_memory_bytes
        return DecodeChild(ChildLimits(max_memory_bytes=limit))

    def _end_child(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child = None


def _groups(requests: Iterable[DecodeRequest]) -> Iterator[list[DecodeRequest]]:
    """Requests in order, as many together as have at most MAX_FRAMES_A_JOB frames."""
    group: list[DecodeRequest] = []
    num_frames = 0
    for request in requests:
        if group and num_frames + len(request.times) > MAX_FRAMES_A_JOB:
            yield group
            group, num_frames = [], 0
        group.append(request)
        num_frames += len(request.times)
    if group:
        yield group


@dataclass(slots=True)
class IsolatedProbes:
    """A ProbeSource whose probing cannot take this process with it; its child starts with the first medium.

    The child probes many media at a time. When it ends, hangs or lacks memory, nobody knows whose fault that is: those
    that it had begun are probed one by one, and the others go on together.
    """

    limits: MediaLimits
    config: DecodeConfig
    _child: DecodeChild | None = field(default=None, init=False)

    def probe(self, media: Sequence[Medium]) -> list[Medium]:
        """See `ProbeSource.probe`."""
        found: dict[str, Medium] = {}
        waiting = list(dict.fromkeys(medium.uri for medium in media))  # clips of one film share its headers
        while waiting:
            if len(waiting) > 1:
                found |= self._together(waiting)
                waiting = [uri for uri in waiting if uri not in found]
            suspects, waiting = waiting[:PROBE_THREADS], waiting[PROBE_THREADS:]  # a child begins them in order
            found |= {uri: self._alone(uri) for uri in suspects}
        return [medium.with_headers(found[medium.uri]) for medium in media]

    def _together(self, uris: Sequence[str]) -> dict[str, Medium]:
        """What the child says until it ends; nothing of those for which all together left no memory."""
        found: dict[str, Medium] = {}
        try:
            for uri, answer in self._ask(uris):
                found[uri] = answer
        except (TimeoutError, ChildDiedError) as error:
            ended = (
                f"nothing within {self.config.probe_deadline_seconds = }" if isinstance(error, TimeoutError) else error
            )
            logger.warning("%s, %d of %d media probed; going on one by one", ended, len(found), len(uris))
            self._end_child()
        fed = {uri: answer for uri, answer in found.items() if not _is_starved(answer)}
        if len(fed) < len(found):
            self._end_child()
        return fed

    def _alone(self, uri: str) -> Medium:
        """What the child says of one medium; when it dies, a fresh one is asked: something else may have killed it."""
        name = source_name(uri)
        try:
            return self._try_alone(uri)
        except ChildDiedError as error:
            logger.warning("%s: %s; trying once more", name, error)
        try:
            return self._try_alone(uri)
        except ChildDiedError as error:
            return Medium(uri, error=DecodeError("probe", ErrorType.DECODER_CRASHED, f"{name}: {error}, twice"))

    def _try_alone(self, uri: str) -> Medium:
        try:
            ((_, answer),) = self._ask([uri])
        except TimeoutError:
            self._end_child()
            message = f"{source_name(uri)}: not probed within {self.config.probe_deadline_seconds = }"
            return Medium(uri, error=DecodeError("probe", ErrorType.DECODER_TIMEOUT, message))
        except ChildDiedError:
            self._end_child()
            raise
        return answer

    def _ask(self, uris: Sequence[str]) -> Iterator[tuple[str, Medium]]:
        """Media, and what the child says of them, as it comes."""
        if self._child is None:
            self._child = DecodeChild(ChildLimits(max_memory_bytes=self.config.max_memory_bytes))
        job = {"kind": "probes", "uris": list(uris), "limits": asdict(self.limits)}
        deadline = self.config.probe_deadline_seconds
        self._child.send(job, deadline_seconds=deadline)
        for _ in uris:
            answer = self._child.answer(deadline)
            storage.add_retries(answer["retries"])
            uri = uris[answer["number"]]
            yield uri, Medium(uri, error=_error_of(answer)) if "error" in answer else _probed(uri, answer["headers"])

    def _end_child(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child = None


def _error_of(answer: dict[str, Any]) -> DecodeError:
    stage, kind, message = answer["error"]
    return DecodeError(stage, ErrorType(kind), message)


def _probed(uri: str, headers: dict[str, Any]) -> Medium:
    return Medium(uri, **{**headers, "duration_seconds": Fraction(headers["duration_seconds"])})


def _is_starved(medium: Medium) -> bool:
    return medium.error is not None and medium.error.error_type == ErrorType.OUT_OF_MEMORY
