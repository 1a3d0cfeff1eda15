"""Samples with torchcodec on the CPU or NVDEC (optional extras).

Full-size frames are fetched one at a time and scaled on the CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from timeviper_platform.common import storage
from timeviper_platform.data.media.container import DecodeError, ErrorType, MediaLimits, is_local_file, source_name
from timeviper_platform.data.video.frames import MAX_TAIL_SECONDS, BackendUnfitError, FrameBatch, Resample
from timeviper_platform.data.video.pictures import scaled
from timeviper_platform.data.video.stream_info import read_stream_info

logger = logging.getLogger(__name__)

TorchcodecBackend = Literal["torchcodec", "nvdec"]


def load_torchcodec(backend: TorchcodecBackend = "torchcodec") -> Any:
    """Imports VideoDecoder. Raises RuntimeError when torchcodec or the device is missing."""
    try:
        from torchcodec.decoders import VideoDecoder
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"backend {backend} is not installed; pip install 'timeviper-platform[{backend}]', or use pyav"
        ) from error
    except (RuntimeError, OSError, ImportError) as error:
        raise RuntimeError(
            f"backend {backend} does not load torchcodec; install FFmpeg's shared libraries (4 to 8; PyAV's own cannot"
            " be used), or use pyav"
        ) from error
    if backend == "nvdec" and not torch.cuda.is_available():
        raise RuntimeError(
            f"backend nvdec needs a CUDA device, but torch {torch.__version__} finds none; run it on a GPU with"
            " PyTorch for CUDA and the extra nvdec installed, or use pyav"
        )
    return VideoDecoder


class TorchcodecReader:
    """VideoReader over torchcodec.

    Raises:
        BackendUnfitError: for files that it would misread.
        RuntimeError: when a video opens on the CPU but not on the GPU.
    """

    def __init__(
        self,
        source: str | bytes,
        image_size: int,
        *,
        limits: MediaLimits | None = None,
        backend: TorchcodecBackend = "torchcodec",
        resample: Resample = "bicubic",
    ) -> None:
        self._resample = resample
        self._decoder_type = load_torchcodec(backend)
        if not isinstance(source, bytes) and not is_local_file(source):
            raise BackendUnfitError(f"{backend} reads only whole local files and bytes")
        self._name, self._size = source_name(source), image_size
        info = read_stream_info(source, limits or MediaLimits())
        self._origin = float(info.clock.start_seconds)
        self._end = info.clock.seconds(info.end_tick)
        self._is_cut_short = info.is_cut_short
        content = source if isinstance(source, bytes) else storage.split_uri(source)[1]
        self._decoder = self._open(content, "cuda" if backend == "nvdec" else "cpu", info.index)
        rotation = round(self._decoder.metadata.rotation or 0) % 360
        if rotation != info.orientation.counterclockwise_degrees:
            raise BackendUnfitError(f"torchcodec rotates it by {rotation} degrees, against its display matrix")

    def sample(self, times: Sequence[Fraction]) -> FrameBatch:
        first = self._decoder.metadata.begin_stream_seconds
        frames, pts_seconds, sampled, num_missing = [], [], [], 0
        for t in times:
            try:
                # the plural form finds the next frame's start; the singular trusts durations
                frame = self._decoder.get_frames_played_at([max(float(t) + self._origin, first)])
            except torch.OutOfMemoryError as error:
                raise DecodeError("decode_video", ErrorType.OUT_OF_MEMORY, f"{self._name}: {error}") from error
            except (RuntimeError, IndexError) as error:
                logger.info("%s: no frame at %s s: %s", self._name, t, error)
                num_missing += t < self._end or (self._is_cut_short and t >= self._end + MAX_TAIL_SECONDS)
                continue
            frames.append(scaled(Image.fromarray(frame.data[0].cpu().numpy()), self._size, self._resample))
            pts_seconds.append(float(frame.pts_seconds[0]) - self._origin)
            sampled.append(float(t))
        pixels = np.stack(frames) if frames else np.empty((0, self._size, self._size, 3), np.uint8)
        return FrameBatch(pixels, np.array(pts_seconds), np.array(sampled), num_missing)

    def close(self) -> None:
        del self._decoder

    def _open(self, content: str | bytes, device: Literal["cpu", "cuda"], stream_index: int) -> Any:
        options = {
            "stream_index": stream_index,
            "dimension_order": "NHWC",
            "num_ffmpeg_threads": 1,
            "seek_mode": "exact",
        }
        try:
            return self._decoder_type(content, device=device, **options)
        except torch.OutOfMemoryError as error:
            raise DecodeError("decode_video", ErrorType.OUT_OF_MEMORY, f"{self._name}: {error}") from error
        except (RuntimeError, ValueError) as error:
            if device == "cpu":
                raise DecodeError("decode_video", ErrorType.CORRUPT_FILE, f"{self._name}: {error}") from error
            self._open(content, "cpu", stream_index)  # raises when the file itself is broken
            raise RuntimeError(
                f"backend nvdec: torchcodec opens {self._name} only on the CPU ({error}); install a build for CUDA,"
                " pip install 'timeviper-platform[nvdec]', and FFmpeg with NVDEC, or use pyav"
            ) from error
