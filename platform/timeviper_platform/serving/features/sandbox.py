"""Decodes untrusted media, each in a fresh process with limits and a deadline.

A spare process is ready in advance, because starting one takes longer than decoding most videos.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import tempfile
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from timeviper_platform.common.storage import download, is_local
from timeviper_platform.data.media.container import MediaLimits, Modality
from timeviper_platform.data.video.frames import Resample
from timeviper_platform.data.video.sampling import FrameSelection, select_frames
from timeviper_platform.data.video_worker.child_process import ChildDiedError, ChildLimits, DecodeChild
from timeviper_platform.serving.messages import MediaBytes, MediaFile, MediaFrames, Refusal

logger = logging.getLogger(__name__)
T = TypeVar("T")

BLOCK_FRAMES = 64
"""Frames decoded at once: 28 MB at 384 pixels."""
BLOCKS_AHEAD = 2
"""Blocks decoded before the caller takes them."""
MAX_OPEN_FILES = 64
MAX_WRITTEN_BYTES = 4 * 2**20
"""Per file; decoded frames go through memory."""

PASSED_ON = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "COVERAGE_")
"""Prefixes of the environment variables passed to a child: no credentials, since this process fetches stored files."""

REASONS = {
    "empty_file": "the file is empty",
    "unknown_format": "the file's format is not supported",
    "corrupt_file": "the file is damaged or cut off",
    "no_video_stream": "the file holds no video",
    "no_duration": "the file states no duration; remux it",
    "no_decoder": "the server has no decoder for the file's codec",
    "too_many_pixels": "the picture has more pixels than the server allows",
    "too_narrow": "the picture is far longer than wide, or wider than long",
    "too_many_frames": "the video is longer than the server allows; request a lower fps",
    "frames_missing": "no frame of the video can be decoded",
    "out_of_memory": "decoding the file takes more memory than the server allows",
    "decode_failed": "the decoder failed on the file, or exceeded the server's limits",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SandboxConfig:
    deadline_s: float = 60.0
    """Maximum seconds to decode a medium; a slower one is answered with 408."""
    max_memory_bytes: int = 2 * 2**30
    """Maximum memory per decode process."""
    max_pixels: int = 36_000_000
    """Maximum width x height. 8K UHD passes."""
    max_frames: int = 36_000
    """Maximum frames at the server's fps. Ten hours at 1 fps pass."""
    num_workers: int = 2
    """Media decoded at once per replica, one core each."""


@dataclass(frozen=True, slots=True)
class MediumHead:
    """Facts from a medium's headers, before any frame is decoded."""

    num_frames: int
    """Sampled frames; damaged ones are missing later."""
    end_seconds: float
    """Duration by the video's timestamps; 0 for a picture."""
    modality: Modality
    """By the content: an animation is a video."""


@dataclass(frozen=True, slots=True)
class DecodedBlock:
    frames: np.ndarray
    """(F, S, S, 3) uint8."""
    pts_seconds: np.ndarray
    """(F,) float64."""


class _Child:
    """A decode process and its folder, which is removed with it."""

    def __init__(self, limits: ChildLimits) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="decode-")
        variables = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
        variables["TMPDIR"] = self.folder = self._folder.name
        self.process = DecodeChild(limits, variables, folder=self.folder)

    def end(self) -> None:
        self.process.kill()
        self._folder.cleanup()

    def local(self, file: MediaFile, number: int = 0) -> str:
        """Returns a path of the file; one in an object store is copied to the folder.

        Raises:
            OSError: when it cannot be read.
        """
        if is_local(file.uri):
            return file.uri
        path = Path(self.folder, f"medium-{number}")
        download(file.uri, path)
        return str(path)


class DecodeSandbox:
    def __init__(self, config: SandboxConfig, image_size: int, resample: Resample = "bicubic") -> None:
        self._config = config
        self._image_size, self._resample = image_size, resample
        self._slots = asyncio.Semaphore(config.num_workers)
        self._spare: asyncio.Task[_Child] | None = None
        self._has_warned = False

    async def blocks(
        self,
        source: MediaFile | MediaBytes | MediaFrames,
        *,
        fps: float,
        max_frames: int,
        frame_selection: FrameSelection = "uniform",
    ) -> AsyncGenerator[MediumHead | DecodedBlock | Refusal]:
        """Yields a medium's head, then its frames at `fps`, thinned to `max_frames`, as they are decoded.

        A Refusal is last. Pictures have no times: only `max_frames` thins them. Decoding runs `BLOCKS_AHEAD` blocks
        ahead of the caller, which must close the generator.
        """
        if isinstance(source, MediaFrames):
            indices = range(len(source.frames))
            chosen = select_frames(indices, max_frames=max_frames, frame_selection=frame_selection)
            pictures = [source.frames[index] for index in chosen]
            media: Sequence[MediaFile | MediaBytes] = pictures
            job: dict[str, Any] = {"kind": "pictures"}
            max_frames = len(pictures)
        else:
            job = {"kind": "medium", "fps": str(fps), "max_frames": max_frames, "frame_selection": frame_selection}
            media = [source]
        async with self._slots:
            child = await self._take_child()
            try:
                places = await asyncio.to_thread(_places, media, child)
                where = {"pictures": places} if job["kind"] == "pictures" else {"uri": places[0][0]}
                data = b"".join(medium.data for medium in media if isinstance(medium, MediaBytes))
                async with aclosing(self._replies(child.process, job | where, data, max_frames)) as items:
                    async for item in items:
                        yield item
            except TimeoutError:
                message = f"decoding took longer than {self._config.deadline_s:g} s; send a shorter or smaller video"
                yield Refusal(status=408, message=message, code="decode_timeout")
            except OSError:
                yield _refusal("read_failed")
            except (ChildDiedError, KeyError, TypeError, ValueError):  # ended by a limit or the medium, or compromised
                yield _refusal("decode_failed")
            finally:
                await asyncio.to_thread(child.end)

    async def _replies(
        self, process: DecodeChild, job: dict[str, Any], data: bytes, max_frames: int
    ) -> AsyncGenerator[MediumHead | DecodedBlock | Refusal]:
        limits = MediaLimits(max_pixels=self._config.max_pixels, max_frames=self._config.max_frames)
        num_frames = min(BLOCK_FRAMES, max_frames)
        sizes = {"image_size": self._image_size, "resample": self._resample, "block_frames": num_frames}
        deadline = _Deadline(self._config.deadline_s)
        await deadline.call(process.send, {**job, **sizes, "limits": asdict(limits)}, data)
        answer = await deadline.call(process.reply)
        if "error" in answer:
            yield _refusal(answer["error"][1])
            return
        modality: Modality = "image" if answer["modality"] == "image" else "video"
        head = MediumHead(int(answer["num_frames"]), float(answer["end_seconds"]), modality)
        yield head
        left, memories = head.num_frames, deque[np.ndarray]()
        while True:
            while len(memories) <= BLOCKS_AHEAD:
                block = {"kind": "block", "image_size": self._image_size}
                memories.append(await deadline.call(partial(process.send, num_frames=num_frames), block))
            answer = await deadline.call(process.reply)
            if "error" in answer:
                yield _refusal(answer["error"][1])
                return
            if "is_end" in answer:
                return
            shape = (int(answer["num_frames"]), self._image_size, self._image_size, 3)
            if not 0 <= shape[0] <= min(left, num_frames) or len(answer["pts_seconds"]) != shape[0]:
                raise ValueError(f"a block of {shape[0]} frames, of {left} left")
            left -= shape[0]
            frames = memories.popleft()[: math.prod(shape)].reshape(shape)  # writable, as PyTorch requires
            yield DecodedBlock(frames, np.asarray(answer["pts_seconds"], np.float64))

    async def start(self) -> None:
        if self._spare is None:
            self._spare = asyncio.create_task(self._start_child())
        await asyncio.shield(self._spare)

    async def close(self) -> None:
        if self._spare is not None:
            await asyncio.to_thread((await self._spare).end)
            self._spare = None

    async def _take_child(self) -> _Child:
        spare = self._spare or asyncio.create_task(self._start_child())
        self._spare = asyncio.create_task(self._start_child())
        return await spare

    async def _start_child(self) -> _Child:
        limits = ChildLimits(
            max_memory_bytes=self._config.max_memory_bytes,
            cpu_seconds=math.ceil(self._config.deadline_s) + 10,  # start-up included
            max_open_files=MAX_OPEN_FILES,
            max_written_bytes=MAX_WRITTEN_BYTES,
            no_network=True,
        )
        child = _Child(limits)
        await asyncio.to_thread(child.process.wait_until_ready)
        if child.process.has_network and not self._has_warned:
            self._has_warned = True
            logger.warning("decode processes share this machine's network: the kernel allows no network namespaces")
        return child


class _Deadline:
    """Seconds that may be spent waiting for a child; the time its caller takes between two waits does not count."""

    def __init__(self, seconds: float) -> None:
        self._left_s = seconds

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Raises TimeoutError."""
        began = time.monotonic()
        answer = await asyncio.to_thread(function, *arguments, deadline_seconds=max(1e-3, self._left_s))
        self._left_s -= time.monotonic() - began
        return answer


def _places(media: Sequence[MediaFile | MediaBytes], child: _Child) -> list[tuple[str | None, int]]:
    """Returns each medium's path, or the number of the job's next bytes."""
    return [
        (child.local(medium, number), 0) if isinstance(medium, MediaFile) else (None, len(medium.data))
        for number, medium in enumerate(media)
    ]


def _refusal(error_type: str) -> Refusal:
    error_type = "decode_failed" if error_type == "decoder_crashed" else error_type
    reason = REASONS.get(error_type)
    if reason is None:  # the media store's failure (not found, not readable), not the client's
        return Refusal(status=503, message="the stored file cannot be read", code=error_type, retry_after_s=5.0)
    return Refusal(status=422, message=f"the medium cannot be decoded: {reason}", code=error_type)
