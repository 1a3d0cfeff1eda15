"""The parent's side of decoding and probing in a killable child: a process, its limits, its answers, and its end.

Frames come back through memory that both sides map, so they are copied once and cost no pipe. Knows processes and
sockets; what happens inside is decode_child.py. Preprocessing keeps a child and gives it segments and media ahead of
time (isolated_sources.py); serving gives each medium a fresh one.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import select
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from timeviper_platform.data.video_worker.child_main import ANSWER, JOB

START_SECONDS = 120.0
"""until a child must have loaded its libraries; a second or two on a quiet machine"""

RECEIVED_BYTES = 1 << 16
"""taken from the socket at once, so that many short answers cost one call"""

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
        command = [sys.executable, "-m", "timeviper_platform.data.video_worker.child_main", str(theirs.fileno())]
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
        self._received = bytearray()
        self._arrived = select.poll()
        self._arrived.register(self._socket, select.POLLIN)
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
        """The child's one answer to a job, and the memory (bytes, uint8) in which its frames lie.

        Raises:
            ChildDiedError: when it ends instead.
            TimeoutError: when there is no answer in time; kill it then.
        """
        memory = self.send(job, data, num_frames=num_frames, deadline_seconds=deadline_seconds)
        return self.answer(deadline_seconds), memory

    def send(
        self, job: dict[str, Any], data: bytes = b"", *, num_frames: int = 0, deadline_seconds: float
    ) -> np.ndarray:
        """Gives it a job, done after those that it was given before; the memory (bytes, uint8) for the job's frames.

        Args:
            job: see decode_child.py.
            data: of the job.
            num_frames: most that it may answer with.
            deadline_seconds: from each of the job's answers to the next.

        Raises:
            ChildDiedError: when it has ended.
            TimeoutError: when it does not take the job.
        """
        self.wait_until_ready()
        memory, descriptor = _shared_memory(max(1, num_frames * job.get("image_size", 0) ** 2 * 3))
        payload = json.dumps({**job, "deadline_seconds": deadline_seconds}).encode()
        self._socket.settimeout(deadline_seconds)
        try:
            socket.send_fds(self._socket, [JOB.pack(len(payload), len(data))], [descriptor])
            self._socket.sendall(payload)
            self._socket.sendall(data)
        except ConnectionError as error:
            raise ChildDiedError(self._last_words()) from error
        finally:
            os.close(descriptor)
        return np.frombuffer(memory, np.uint8)

    def answer(self, deadline_seconds: float, nap_seconds: float = 0.0) -> dict[str, Any]:
        """Its next answer.

        Args:
            deadline_seconds: that it may take.
            nap_seconds: where no answer lies there yet, so long nobody looks, so that a child with many short answers
                does not wake this process for each.

        Raises:
            ChildDiedError: when it ends instead.
            TimeoutError: when there is none in time; kill it then.
        """
        until = time.monotonic() + deadline_seconds
        try:
            (num_bytes,) = ANSWER.unpack(self._receive(ANSWER.size, until, nap_seconds))
            if num_bytes > MAX_ANSWER_BYTES:
                raise ChildDiedError(f"its answer would have {num_bytes} bytes")
            answer: dict[str, Any] = json.loads(self._receive(num_bytes, until))
        except ConnectionError as error:
            raise ChildDiedError(self._last_words()) from error
        return answer

    def _receive(self, num_bytes: int, until: float, nap_seconds: float = 0.0) -> bytes:
        while len(self._received) < num_bytes:
            if nap_seconds and not self._arrived.poll(0):
                time.sleep(nap_seconds)
            self._socket.settimeout(max(1e-3, until - time.monotonic()))
            part = self._socket.recv(RECEIVED_BYTES)
            if not part:
                raise ChildDiedError(self._last_words())
            self._received += part
        taken = bytes(self._received[:num_bytes])
        del self._received[:num_bytes]
        return taken

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
