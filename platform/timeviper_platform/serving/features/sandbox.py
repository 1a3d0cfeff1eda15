"""Decoding what strangers send, from the service's side: a fresh process a medium, with a deadline.

Keeps a started process in reserve, because loading the decoder takes longer than most videos. The process and its
limits are data/isolation.py's.
"""

from __future__ import annotations

import asyncio
import math
import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from timeviper_platform.data.media.container import MediaLimits
from timeviper_platform.data.video_worker.child_process import ChildDiedError, ChildLimits, DecodeChild
from timeviper_platform.serving.messages import MediaBytes, MediaFile, Refusal

MAX_OPEN_FILES = 64
MAX_WRITTEN_BYTES = 4 * 2**20
"""of any file; what is decoded goes through memory"""

PASSED_ON = ("PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "AWS_", "FSSPEC_", "COVERAGE_")
"""variables that a child gets, by how they begin; keys and tokens of the cluster are not among them"""

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
        self._spare: asyncio.Task[DecodeChild] | None = None

    async def decode(self, source: MediaFile | MediaBytes, *, fps: float, max_frames: int) -> DecodedMedium | Refusal:
        """The medium's frames at `fps`, thinned to `max_frames`; or why there are none."""
        data = source.data if isinstance(source, MediaBytes) else b""
        limits = MediaLimits(max_pixels=self._config.max_pixels, max_frames=self._config.max_samples)
        job = {
            "kind": "medium",
            "uri": source.uri if isinstance(source, MediaFile) else None,
            "image_size": self._image_size,
            "fps": str(fps),
            "max_frames": max_frames,
            "limits": asdict(limits),
        }
        deadline_s = self._config.deadline_s
        async with self._slots:
            child = await self._take_child()
            try:
                answer, memory = await asyncio.to_thread(
                    child.ask, job, data, num_frames=max_frames, deadline_seconds=deadline_s
                )
                return self._medium(answer, memory)
            except TimeoutError:
                message = f"decoding took longer than {deadline_s:g} s; send a shorter or smaller video"
                return Refusal(status=408, message=message, code="decode_timeout")
            except (ChildDiedError, KeyError, TypeError, ValueError):  # killed by a limit or the medium, or taken over
                return _refusal("decode_failed")
            finally:
                await asyncio.to_thread(child.kill)

    async def start(self) -> None:
        """Has a child ready before the first medium comes."""
        if self._spare is None:
            self._spare = asyncio.create_task(self._start_child())
        await asyncio.shield(self._spare)

    async def close(self) -> None:
        """Ends the child in reserve."""
        if self._spare is not None:
            await asyncio.to_thread((await self._spare).kill)
            self._spare = None

    async def _take_child(self) -> DecodeChild:
        spare = self._spare or asyncio.create_task(self._start_child())
        self._spare = asyncio.create_task(self._start_child())
        return await spare

    async def _start_child(self) -> DecodeChild:
        limits = ChildLimits(
            max_memory_bytes=self._config.max_memory_bytes,
            cpu_seconds=math.ceil(self._config.deadline_s) + 10,  # starting up counts too
            max_open_files=MAX_OPEN_FILES,
            max_written_bytes=MAX_WRITTEN_BYTES,
        )
        child = DecodeChild(limits, {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)})
        await asyncio.to_thread(child.wait_until_ready)
        return child

    def _medium(self, answer: dict[str, Any], memory: np.ndarray) -> DecodedMedium | Refusal:
        if "error" in answer:
            return _refusal(answer["error"][1])
        shape = (int(answer["num_frames"]), self._image_size, self._image_size, 3)
        frames = memory[: math.prod(shape)].reshape(shape)  # writable, as PyTorch wants it
        return DecodedMedium(frames, np.asarray(answer["pts_seconds"], np.float64), float(answer["end_seconds"]))


def _refusal(error_type: str) -> Refusal:
    error_type = "decode_failed" if error_type == "decoder_crashed" else error_type
    reason = REASONS.get(error_type)
    if reason is None:  # the store's trouble (not found, not readable), not the client's
        return Refusal(status=503, message="the stored file cannot be read", code=error_type, retry_after_s=5.0)
    return Refusal(status=422, message=f"the medium cannot be decoded: {reason}", code=error_type)
