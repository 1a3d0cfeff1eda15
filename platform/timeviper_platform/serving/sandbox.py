"""Decoding what strangers send, from the service's side: a fresh process a medium, with a deadline.

Keeps started workers in reserve, because loading the decoder takes longer than most videos. Knows processes and pipes;
what happens inside one is decode_worker.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from timeviper_platform.serving.contract import MediaBytes, MediaFile, Refusal
from timeviper_platform.serving.decode_worker import READY

PASSED_ON = ("PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "AWS_", "FSSPEC_", "COVERAGE_")
"""variables that a worker gets, by how they begin; keys and tokens of the cluster are not among them"""

REASONS = {
    "empty_file": "the file is empty",
    "unknown_format": "the file is in no format that the server reads",
    "corrupt_file": "the file is damaged or cut off",
    "no_video_stream": "the file holds no video",
    "no_duration": "the file does not say how long it is; remux it",
    "no_decoder": "the server has no decoder for the file's codec",
    "too_many_pixels": "the picture is larger than the server takes",
    "too_many_frames": "the video is longer than the server takes; ask with a lower fps",
    "frames_missing": "not one frame of the video can be decoded",
    "out_of_memory": "decoding the file takes more memory than the server allows",
    "decode_failed": "the decoder broke on the file, or passed the server's limits",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SandboxConfig:
    """What one medium may cost."""

    deadline_s: float = 60.0
    """wall-clock for one medium; past it 408"""
    max_memory_bytes: int = 2 * 2**30
    max_pixels: int = 36_000_000
    """width x height, read from the header before anything is decoded; 8K UHD passes"""
    max_samples: int = 36_000
    """frames at the server's fps; ten hours at 1 fps"""
    num_workers: int = 2
    """media decoded at the same time by one replica, each on one core"""


@dataclass(frozen=True, slots=True)
class DecodedMedium:
    """Frames of an upload."""

    frames: np.ndarray
    """(F, S, S, 3) uint8"""
    pts_seconds: np.ndarray
    """(F,) float64"""
    end_seconds: float
    """the video's length on its own clock; 0 for a picture"""


class DecodeSandbox:
    """A small reserve of processes that decode one medium each and end."""

    def __init__(self, config: SandboxConfig, image_size: int) -> None:
        self._config = config
        self._image_size = image_size
        self._slots = asyncio.Semaphore(config.num_workers)
        self._spare: asyncio.Task[asyncio.subprocess.Process] | None = None

    async def decode(self, source: MediaFile | MediaBytes, *, fps: float, max_frames: int) -> DecodedMedium | Refusal:
        """The medium's frames at `fps`, thinned to `max_frames`; or why there are none."""
        data = source.data if isinstance(source, MediaBytes) else b""
        job = {
            "uri": source.uri if isinstance(source, MediaFile) else None,
            "num_bytes": len(data),
            "image_size": self._image_size,
            "fps": str(fps),
            "max_frames": max_frames,
            "max_pixels": self._config.max_pixels,
            "max_samples": self._config.max_samples,
        }
        async with self._slots:
            worker = await self._take_worker()
            try:
                async with asyncio.timeout(self._config.deadline_s):
                    return await self._run(worker, job, data)
            except TimeoutError:
                message = f"decoding took longer than {self._config.deadline_s:g} s; send a shorter or smaller video"
                return Refusal(status=408, message=message, code="decode_timeout")
            finally:
                await _end(worker)

    async def start(self) -> None:
        """Has a worker ready before the first medium comes."""
        if self._spare is None:
            self._spare = asyncio.create_task(self._start_worker())
        await asyncio.shield(self._spare)

    async def close(self) -> None:
        """Ends the worker in reserve."""
        if self._spare is not None:
            await _end(await self._spare)
            self._spare = None

    async def _take_worker(self) -> asyncio.subprocess.Process:
        spare = self._spare or asyncio.create_task(self._start_worker())
        self._spare = asyncio.create_task(self._start_worker())
        return await spare

    async def _start_worker(self) -> asyncio.subprocess.Process:
        cpu_seconds = math.ceil(self._config.deadline_s) + 10  # starting up counts too
        environment = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
        worker = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "timeviper_platform.serving.decode_worker"),
            *(str(self._config.max_memory_bytes), str(cpu_seconds)),
            env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,  # decoders quote what they read
            limit=2**24,  # of the header's line: a float a frame
        )
        assert worker.stdout is not None
        if await worker.stdout.readline() != READY:
            await _end(worker)
            raise RuntimeError(f"a decode worker did not start (exit code {worker.returncode}); see decode_worker.py")
        return worker

    async def _run(
        self, worker: asyncio.subprocess.Process, job: dict[str, Any], data: bytes
    ) -> DecodedMedium | Refusal:
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            worker.stdin.write(json.dumps(job).encode() + b"\n" + data)
            await worker.stdin.drain()
            header = json.loads(await worker.stdout.readline() or b"null")
            if header is None or "error_type" in header:
                return _refusal("decode_failed" if header is None else header["error_type"])
            shape = tuple(header["shape"])
            frames = await worker.stdout.readexactly(math.prod(shape))
        except (ConnectionError, asyncio.IncompleteReadError):  # killed by one of its limits, or by the medium
            return _refusal("decode_failed")
        return DecodedMedium(
            np.frombuffer(bytearray(frames), dtype=np.uint8).reshape(shape),  # writable, as PyTorch wants it
            np.asarray(header["pts_seconds"], dtype=np.float64),
            header["end_seconds"],
        )


def _refusal(error_type: str) -> Refusal:
    reason = REASONS.get(error_type)
    if reason is None:  # the store's trouble (not found, not readable), not the client's
        return Refusal(status=503, message="the stored file cannot be read", code=error_type, retry_after_s=5.0)
    return Refusal(status=422, message=f"the medium cannot be decoded: {reason}", code=error_type)


async def _end(worker: asyncio.subprocess.Process) -> None:
    if worker.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            worker.kill()
    await worker.wait()
