"""Decodes untrusted media, each in a fresh process with limits and a deadline.

A spare process is ready in advance, because starting one takes longer than decoding most videos.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from timeviper_platform.common.storage import download, is_local
from timeviper_platform.data.media.container import MediaLimits, Modality
from timeviper_platform.data.video.frames import Resample
from timeviper_platform.data.video.sampling import FrameSelection, select_frames
from timeviper_platform.data.video_worker.child_process import ChildDiedError, ChildLimits, DecodeChild
from timeviper_platform.serving.messages import MediaBytes, MediaFile, MediaFrames, Refusal

logger = logging.getLogger(__name__)

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
class DecodedMedium:
    frames: np.ndarray
    """(F, S, S, 3) uint8."""
    pts_seconds: np.ndarray
    """(F,) float64."""
    end_seconds: float
    """Duration by the video's timestamps; 0 for a picture."""
    modality: Modality
    """By the content: an animation is a video."""


class _Child:
    """A decode process with a folder of its own, which ends with it."""

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
    """Decode processes, each for one medium."""

    def __init__(self, config: SandboxConfig, image_size: int, resample: Resample = "bicubic") -> None:
        self._config = config
        self._image_size, self._resample = image_size, resample
        self._slots = asyncio.Semaphore(config.num_workers)
        self._spare: asyncio.Task[_Child] | None = None
        self._has_warned = False

    async def decode(
        self,
        source: MediaFile | MediaBytes | MediaFrames,
        *,
        fps: float,
        max_frames: int,
        frame_selection: FrameSelection = "uniform",
    ) -> DecodedMedium | Refusal:
        """Returns frames at `fps`, thinned to `max_frames`. Pictures have no times, only `max_frames` thins them."""
        if isinstance(source, MediaFrames):
            indices = range(len(source.frames))
            chosen = select_frames(indices, max_frames=max_frames, frame_selection=frame_selection)
            pictures = [source.frames[index] for index in chosen]
            return await self._run({"kind": "pictures"}, pictures, len(pictures))
        job = {"kind": "medium", "fps": str(fps), "max_frames": max_frames, "frame_selection": frame_selection}
        return await self._run(job, [source], max_frames)

    async def _run(
        self, job: dict[str, Any], media: Sequence[MediaFile | MediaBytes], num_frames: int
    ) -> DecodedMedium | Refusal:
        limits = MediaLimits(max_pixels=self._config.max_pixels, max_frames=self._config.max_frames)
        sizes = {"image_size": self._image_size, "resample": self._resample, "limits": asdict(limits)}
        data = b"".join(medium.data for medium in media if isinstance(medium, MediaBytes))
        deadline_s = self._config.deadline_s
        async with self._slots:
            child = await self._take_child()
            try:
                places = await asyncio.to_thread(_places, media, child)
                where = {"pictures": places} if job["kind"] == "pictures" else {"uri": places[0][0]}
                answer, memory = await asyncio.to_thread(
                    child.process.run, job | sizes | where, data, num_frames=num_frames, deadline_seconds=deadline_s
                )
                return self._medium(answer, memory)
            except TimeoutError:
                message = f"decoding took longer than {deadline_s:g} s; send a shorter or smaller video"
                return Refusal(status=408, message=message, code="decode_timeout")
            except OSError:
                return _refusal("read_failed")
            except (ChildDiedError, KeyError, TypeError, ValueError):  # ended by a limit or the medium, or compromised
                return _refusal("decode_failed")
            finally:
                await asyncio.to_thread(child.end)

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

    def _medium(self, answer: dict[str, Any], memory: np.ndarray) -> DecodedMedium | Refusal:
        if "error" in answer:
            return _refusal(answer["error"][1])
        shape = (int(answer["num_frames"]), self._image_size, self._image_size, 3)
        frames = memory[: math.prod(shape)].reshape(shape)  # writable, as PyTorch requires
        pts_seconds = np.asarray(answer["pts_seconds"], np.float64)
        modality: Modality = "image" if answer["modality"] == "image" else "video"
        return DecodedMedium(frames, pts_seconds, float(answer["end_seconds"]), modality)


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
