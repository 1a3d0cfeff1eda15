"""The parent's side of decoding and probing in a killable child: a process, its limits, its answers, and its end.

Frames come back through memory that both sides map, so they are copied once and cost no pipe. Knows processes and
sockets; what happens inside is decode_child.py. Preprocessing keeps a child and has it decode segment after segment
(IsolatedFrames) or probe many media at a time (IsolatedProbes); serving gives each medium a fresh one.
"""

from __future__ import annotations

import fcntl
import json
import logging
import mmap
import os
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from timeviper_platform import storage
from timeviper_platform.data.decode import FrameBatch
from timeviper_platform.data.decode_child import ANSWER, JOB
from timeviper_platform.data.media import DecodeError, ErrorType, MediaLimits, MediaProbe, Modality, source_name
from timeviper_platform.data.probe import PROBE_THREADS, Probed
from timeviper_platform.data.segment_frames import DecodeConfig, decode_stage

logger = logging.getLogger(__name__)

START_SECONDS = 120.0
"""until a child must have loaded its libraries; a second or two on a quiet machine"""

MAX_ANSWER_BYTES = 1 << 26
"""two floats and their commas a frame; a child that was taken over may say anything"""


class ChildDiedError(RuntimeError):
    """The child ended before it answered: its file crashed it, or something killed it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChildLimits:
    """What a child may take in its whole life; None = no limit."""

    max_memory_bytes: int | None
    cpu_seconds: int | None = None
    max_open_files: int | None = None
    max_written_bytes: int | None = None
    """of any one file"""


class DecodeChild:
    """One process that decodes; killed when it is collected."""

    def __init__(self, limits: ChildLimits, environment: Mapping[str, str] | None = None) -> None:
        """Starts it and does not wait.

        Args:
            limits: of the process.
            environment: its variables; None = this process's.
        """
        self._socket, theirs = socket.socketpair()
        command = [sys.executable, "-m", "timeviper_platform.data.decode_child", str(theirs.fileno())]
        variables = {**(os.environ if environment is None else environment), "OMP_NUM_THREADS": "1"}
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        with theirs:
            self._process = subprocess.Popen(
                [*command, json.dumps(asdict(limits))],
                env=variables,
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # decoders quote what they read
            )
        self._is_ready = False
        self.kill = weakref.finalize(self, _end, self._process, self._socket)
        """Ends it, whatever it does."""

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Returns when its libraries are loaded.

        Raises:
            RuntimeError: when it ends before, or takes too long.
        """
        if self._is_ready:
            return
        try:
            self._receive(ANSWER.size, time.monotonic() + START_SECONDS)
        except (TimeoutError, ChildDiedError) as error:
            self.kill()
            raise RuntimeError(f"a decode child did not start ({error}); see decode_child.py") from error
        self._is_ready = True

    def ask(
        self, job: dict[str, Any], data: bytes = b"", *, num_frames: int, deadline_seconds: float
    ) -> tuple[dict[str, Any], np.ndarray]:
        """The child's answer, and the memory (bytes, uint8) in which its frames lie.

        Raises:
            ChildDiedError: when it ends instead.
            TimeoutError: when there is no answer in time; kill it then.
        """
        self.wait_until_ready()
        until = time.monotonic() + deadline_seconds
        memory, descriptor = _shared_memory(max(1, num_frames) * job["image_size"] ** 2 * 3)
        try:
            self._send(job, data, [descriptor], deadline_seconds)
            answer = self._answer(until)
        finally:
            os.close(descriptor)
        return answer, np.frombuffer(memory, np.uint8)

    def ask_of_each(
        self, job: dict[str, Any], num_answers: int, *, deadline_seconds: float
    ) -> Iterator[dict[str, Any]]:
        """The child's answers about the many media of a job, as they come. Kill it unless all of them are taken.

        Raises:
            ChildDiedError: when it ends before the last one.
            TimeoutError: when the next one does not come in time; kill it then.
        """
        self.wait_until_ready()
        self._send(job, b"", [], deadline_seconds)
        for _ in range(num_answers):
            yield self._answer(time.monotonic() + deadline_seconds)

    def _send(self, job: dict[str, Any], data: bytes, descriptors: list[int], deadline_seconds: float) -> None:
        payload = json.dumps({**job, "deadline_seconds": deadline_seconds}).encode()
        self._socket.settimeout(deadline_seconds)
        try:
            socket.send_fds(self._socket, [JOB.pack(len(payload), len(data))], descriptors)
            self._socket.sendall(payload)
            self._socket.sendall(data)
        except ConnectionError as error:
            raise ChildDiedError(self._last_words()) from error

    def _answer(self, until: float) -> dict[str, Any]:
        try:
            (num_bytes,) = ANSWER.unpack(self._receive(ANSWER.size, until))
            if num_bytes > MAX_ANSWER_BYTES:
                raise ChildDiedError(f"its answer would have {num_bytes} bytes")
            answer: dict[str, Any] = json.loads(self._receive(num_bytes, until))
        except ConnectionError as error:
            raise ChildDiedError(self._last_words()) from error
        return answer

    def _receive(self, num_bytes: int, until: float) -> bytes:
        parts = bytearray()
        while len(parts) < num_bytes:
            self._socket.settimeout(max(1e-3, until - time.monotonic()))
            part = self._socket.recv(num_bytes - len(parts))
            if not part:
                raise ChildDiedError(self._last_words())
            parts += part
        return bytes(parts)

    def _last_words(self) -> str:
        return f"the decoding process ended with code {self._process.wait()}"


def _end(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    process.kill()
    process.wait()
    connection.close()


def _shared_memory(num_bytes: int) -> tuple[mmap.mmap, int]:
    """Memory without a name, and its descriptor; freed when nobody maps it any more. A child cannot shrink it."""
    descriptor = os.memfd_create("frames", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, num_bytes)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return mmap.mmap(descriptor, num_bytes), descriptor


@dataclass(slots=True)
class IsolatedFrames:
    """A FrameSource whose decoding cannot take this process with it."""

    image_size: int
    limits: MediaLimits
    config: DecodeConfig
    _child: DecodeChild = field(init=False)
    _given_up: dict[str, DecodeError] = field(default_factory=dict, init=False)
    """media that passed the deadline once: each further segment would cost as much"""

    def __post_init__(self) -> None:
        self._child = self._start()

    def frames(self, uri: str, modality: Modality, times: Sequence[Fraction]) -> FrameBatch:
        """See `FrameSource.frames`."""
        if uri in self._given_up:
            raise self._given_up[uri]
        stage, name = decode_stage(modality), source_name(uri)
        try:
            answer, memory = self._ask(uri, modality, times)
        except TimeoutError as error:
            self._renew()
            message = f"{name}: not decoded within {self.config.deadline_seconds = }"
            self._given_up[uri] = DecodeError(stage, ErrorType.DECODER_TIMEOUT, message)
            raise self._given_up[uri] from error
        except ChildDiedError as error:
            self._renew()
            raise DecodeError(stage, ErrorType.DECODER_CRASHED, f"{name}: {error}, twice") from error
        storage.add_retries(answer["retries"])
        if "error" in answer:
            raise _error_of(answer)
        shape = (answer["num_frames"], self.image_size, self.image_size, 3)
        pixels = memory[: int(np.prod(shape))].reshape(shape)
        pts, shown_for = np.array(answer["pts_seconds"], float), np.array(answer["times_seconds"], float)
        return FrameBatch(pixels, pts, shown_for, answer["num_missing"])

    def _ask(self, uri: str, modality: Modality, times: Sequence[Fraction]) -> tuple[dict[str, Any], np.ndarray]:
        """One more try in a fresh child when the first one dies: something else may have killed it."""
        job = {
            "kind": "segment",
            "uri": uri,
            "modality": modality,
            "times": [(t.numerator, t.denominator) for t in times],
            "image_size": self.image_size,
            "limits": asdict(self.limits),
            "backend": self.config.backend,
            "max_open_videos": self.config.max_open_videos,
        }
        deadline = self.config.deadline_seconds
        try:
            return self._child.ask(job, num_frames=len(times), deadline_seconds=deadline)
        except ChildDiedError as error:
            logger.warning("%s: %s; trying once more", source_name(uri), error)
            self._renew()
            return self._child.ask(job, num_frames=len(times), deadline_seconds=deadline)

    def _start(self) -> DecodeChild:
        # NVIDIA's driver takes memory of the process that nobody states, so that no limit for it is right
        limit = None if self.config.backend == "nvdec" else self.config.max_memory_bytes
        return DecodeChild(ChildLimits(max_memory_bytes=limit))

    def _renew(self) -> None:
        self._child.kill()
        self._child = self._start()


@dataclass(slots=True)
class IsolatedProbes:
    """A ProbeSource whose probing cannot take this process with it; its child starts with the first medium.

    The child probes many media at a time. When it ends, hangs or lacks memory, nobody knows whose fault that is: those
    that it had begun are probed one by one, and the others go on together.
    """

    limits: MediaLimits
    config: DecodeConfig
    _child: DecodeChild | None = field(default=None, init=False)

    def probe(self, uris: Sequence[str]) -> list[Probed]:
        """See `ProbeSource.probe`."""
        found: dict[str, Probed] = {}
        waiting = list(dict.fromkeys(uris))  # stretches of one film share its headers
        while waiting:
            if len(waiting) > 1:
                found |= self._together(waiting)
                waiting = [uri for uri in waiting if uri not in found]
            suspects, waiting = waiting[:PROBE_THREADS], waiting[PROBE_THREADS:]  # a child begins them in order
            found |= {uri: self._alone(uri) for uri in suspects}
        return [found[uri] for uri in uris]

    def _together(self, uris: Sequence[str]) -> dict[str, Probed]:
        """What the child says until it ends; nothing of those for which all together left no memory."""
        found: dict[str, Probed] = {}
        try:
            for uri, answer in self._ask(uris):
                found[uri] = answer
        except (TimeoutError, ChildDiedError) as error:
            ended = f"nothing within {self.config.deadline_seconds = }" if isinstance(error, TimeoutError) else error
            logger.warning("%s, %d of %d media probed; going on one by one", ended, len(found), len(uris))
            self._end_child()
        fed = {uri: answer for uri, answer in found.items() if not _is_starved(answer)}
        if len(fed) < len(found):
            self._end_child()
        return fed

    def _alone(self, uri: str) -> Probed:
        """What the child says of one medium; when it dies, a fresh one is asked: something else may have killed it."""
        name = source_name(uri)
        try:
            return self._try_alone(uri)
        except ChildDiedError as error:
            logger.warning("%s: %s; trying once more", name, error)
        try:
            return self._try_alone(uri)
        except ChildDiedError as error:
            return DecodeError("probe", ErrorType.DECODER_CRASHED, f"{name}: {error}, twice")

    def _try_alone(self, uri: str) -> Probed:
        try:
            ((_, answer),) = self._ask([uri])
        except TimeoutError:
            self._end_child()
            message = f"{source_name(uri)}: not probed within {self.config.deadline_seconds = }"
            return DecodeError("probe", ErrorType.DECODER_TIMEOUT, message)
        except ChildDiedError:
            self._end_child()
            raise
        return answer

    def _ask(self, uris: Sequence[str]) -> Iterator[tuple[str, Probed]]:
        """Media, and what the child says of them, as it comes."""
        if self._child is None:
            self._child = DecodeChild(ChildLimits(max_memory_bytes=self.config.max_memory_bytes))
        job = {"kind": "probes", "uris": list(uris), "limits": asdict(self.limits)}
        for answer in self._child.ask_of_each(job, len(uris), deadline_seconds=self.config.deadline_seconds):
            storage.add_retries(answer["retries"])
            yield uris[answer["number"]], _error_of(answer) if "error" in answer else _probe_of(answer["probe"])

    def _end_child(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child = None


def _error_of(answer: dict[str, Any]) -> DecodeError:
    stage, kind, message = answer["error"]
    return DecodeError(stage, ErrorType(kind), message)


def _probe_of(found: dict[str, Any]) -> MediaProbe:
    return MediaProbe(**{**found, "end_seconds": Fraction(found["end_seconds"])})


def _is_starved(answer: Probed) -> bool:
    return isinstance(answer, DecodeError) and answer.error_type == ErrorType.OUT_OF_MEMORY
