"""Starts and kills the decode child, and exchanges jobs and replies with it.

Does not use pebble, which lacks queued jobs, deadlines per reply and resource limits.
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
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from timeviper_platform.data.video_worker.child_main import JOB, REPLY

START_SECONDS = 120.0

RECEIVED_BYTES = 1 << 16

MAX_REPLY_BYTES = 1 << 26
"""Guard against a compromised child. Real replies have two floats per frame."""


class ChildDiedError(RuntimeError):
    """The child crashed or was killed before its reply."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChildLimits:
    """Resource limits of a child; None = unlimited."""

    max_memory_bytes: int | None
    cpu_seconds: int | None = None
    max_open_files: int | None = None
    max_written_bytes: int | None = None
    """Maximum size of a written file."""
    no_network: bool = False
    """Whether to leave the machine's network, where the kernel allows that; see `DecodeChild.has_network`."""


class DecodeChild:
    """A decoding process, killed when this object is collected."""

    def __init__(
        self, limits: ChildLimits, environment: Mapping[str, str] | None = None, *, folder: str | None = None
    ) -> None:
        """Does not wait for the process. `environment` None = inherited; `folder` None = this process's."""
        self._socket, theirs = socket.socketpair()
        command = [sys.executable, "-m", "timeviper_platform.data.video_worker.child_main", str(theirs.fileno())]
        variables = {**(os.environ if environment is None else environment), "OMP_NUM_THREADS": "1"}
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        with theirs:
            self._process = subprocess.Popen(
                [*command, json.dumps(asdict(limits))],
                env=variables,
                cwd=folder,
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # decoders quote their input
            )
        self.is_ready = False
        self.has_network = True
        """False once a child with `no_network` has left the network."""
        self._received = bytearray()
        self._arrived = select.poll()
        self._arrived.register(self._socket, select.POLLIN)
        self.kill = weakref.finalize(self, _end, self._process, self._socket)

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Raises RuntimeError when the child does not start."""
        if self.is_ready:
            return
        try:
            (self.has_network,) = map(bool, REPLY.unpack(self._receive(REPLY.size, time.monotonic() + START_SECONDS)))
        except (TimeoutError, ChildDiedError) as error:
            self.kill()
            raise RuntimeError(f"the decode child did not start ({error}); run child_main to see why") from error
        self.is_ready = True

    def run(
        self, job: dict[str, Any], data: bytes = b"", *, num_frames: int, deadline_seconds: float
    ) -> tuple[dict[str, Any], np.ndarray]:
        """Runs a job with one reply; returns it and the memory of its frames."""
        memory = self.send(job, data, num_frames=num_frames, deadline_seconds=deadline_seconds)
        return self.reply(deadline_seconds), memory

    def send(
        self, job: dict[str, Any], data: bytes = b"", *, num_frames: int = 0, deadline_seconds: float
    ) -> np.ndarray:
        """Queues a job. Returns the memory (bytes,) uint8 for its frames.

        Args:
            job: see `child_main`.
            data: bytes of a medium without a URI.
            num_frames: maximum frames of all replies.
            deadline_seconds: maximum time per reply.

        Raises:
            ChildDiedError: when the child has ended.
            TimeoutError: when it does not receive the job.
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
            raise ChildDiedError(self._exit_message()) from error
        finally:
            os.close(descriptor)
        return np.frombuffer(memory, np.uint8)

    def reply(self, deadline_seconds: float, idle: Callable[[], None] | None = None) -> dict[str, Any]:
        """Waits for the next reply.

        Args:
            deadline_seconds: maximum wait.
            idle: called before blocking, so that short replies accumulate.

        Raises:
            ChildDiedError: when the child ends first.
            TimeoutError: after the deadline; kill the child then.
        """
        until = time.monotonic() + deadline_seconds
        try:
            (num_bytes,) = REPLY.unpack(self._receive(REPLY.size, until, idle))
            if num_bytes > MAX_REPLY_BYTES:
                raise ChildDiedError(f"it announced a reply of {num_bytes} bytes")
            reply: dict[str, Any] = json.loads(self._receive(num_bytes, until))
        except ConnectionError as error:
            raise ChildDiedError(self._exit_message()) from error
        return reply

    def _receive(self, num_bytes: int, until: float, idle: Callable[[], None] | None = None) -> bytes:
        while len(self._received) < num_bytes:
            if idle is not None and not self._arrived.poll(0):
                idle()
            self._socket.settimeout(max(1e-3, until - time.monotonic()))
            chunk = self._socket.recv(RECEIVED_BYTES)
            if not chunk:
                raise ChildDiedError(self._exit_message())
            self._received += chunk
        taken = bytes(self._received[:num_bytes])
        del self._received[:num_bytes]
        return taken

    def _exit_message(self) -> str:
        return f"the decoding process ended with code {self._process.wait()}"


def _end(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    process.kill()
    process.wait()
    connection.close()


def _shared_memory(num_bytes: int) -> tuple[mmap.mmap, int]:
    """Returns memory, sealed against resizing by the child, and its descriptor."""
    descriptor = os.memfd_create("frames", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, num_bytes)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return mmap.mmap(descriptor, num_bytes), descriptor
