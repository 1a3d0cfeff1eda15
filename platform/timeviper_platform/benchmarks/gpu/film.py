"""Row group `film`: a film from its file to merged tokens on one GPU, with each decoder.

Each decoder thread reads a shard of the film (FFmpeg releases the GIL); one encoder has random weights.
"""

from __future__ import annotations

import logging
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from timeviper_model.layers.tome import merge_tokens
from timeviper_platform.benchmarks.gpu.device import make_row
from timeviper_platform.benchmarks.gpu.vision import (
    MERGE_HEADS,
    TOKENS_PER_FRAME,
    TowerSize,
    make_tower,
    mfu,
)
from timeviper_platform.benchmarks.measure import Row
from timeviper_platform.benchmarks.video.clips import ClipSpec, make_clip, repeat_clip
from timeviper_platform.common.devices import device_name, peak_flops
from timeviper_platform.data.media.probe import probe_media
from timeviper_platform.data.video.reader import Backend, check_backend, open_video
from timeviper_platform.data.video.sampling import count_frames, sample_times

logger = logging.getLogger(__name__)

FPS = Fraction(1)

BATCHES_AHEAD = 4
"""Batches queued for the encoder; 113 MB at 64 frames of 384 x 384."""

SYNTHETIC_CLIP = ClipSpec(width=1280, height=720)

Encode = Callable[[np.ndarray], object]


class FilmPass(NamedTuple):
    seconds: float
    num_frames: int
    encoder_stalls: float
    """Share of the time in which the encoder has no batch."""
    decoder_stalls: float
    """Share of the decoders' time spent waiting for room in the queue."""


def film_rows(
    device: torch.device,
    film: Path | None = None,
    *,
    size: TowerSize | None = None,
    backends: Sequence[Backend] = ("pyav", "nvdec"),
    num_decoders: int | None = None,
    batch_frames: int = 64,
    clip: ClipSpec = SYNTHETIC_CLIP,
    repetitions: int = 20,
    peak: float | None = None,
    repeats: int = 3,
) -> list[Row]:
    """Rows of each backend; an unusable backend is logged instead.

    Args:
        film: None = `clip` repeated `repetitions` times.
        num_decoders: threads; None = one per CPU.
        batch_frames: frames sampled and encoded together.
        peak: FLOP/s; None = the device's. Unknown devices have no MFU.
    """
    size = size or TowerSize()
    encode = _encoder(size, device, batch_frames)
    num_decoders = num_decoders or os.cpu_count() or 1
    peak = peak_flops(device_name(device)) if peak is None else peak
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        path = _synthetic_film(Path(folder), clip, repetitions) if film is None else film
        for backend in backends:
            try:
                check_backend(backend)
            except RuntimeError as error:
                logger.warning("no rows with %s: %s", backend, error)
                continue
            passes = [
                encode_film(path, encode, backend, size.image_size, batch_frames, num_decoders) for _ in range(repeats)
            ]
            rows += _rows(path.name, backend, num_decoders, sorted(passes)[repeats // 2], size, peak)
    return rows


def encode_film(
    film: Path, encode: Encode, backend: Backend, image_size: int, batch_frames: int, num_decoders: int
) -> FilmPass:
    """Decodes and encodes a film at 1 fps.

    Raises:
        DecodeError: if it cannot be read.
    """
    times = sample_times(Fraction(0), FPS, 0, count_frames(Fraction(0), probe_media(str(film)).duration_seconds, FPS))
    batches = [times[start : start + batch_frames] for start in range(0, len(times), batch_frames)]
    share = -(-len(batches) // num_decoders)
    shards = [batches[start : start + share] for start in range(0, len(batches), share)]
    done: queue.SimpleQueue[np.ndarray | None] = queue.SimpleQueue()
    room = threading.Semaphore(BATCHES_AHEAD)

    def decode(shard: Sequence[Sequence[Fraction]]) -> float:
        """Returns the seconds spent waiting for room."""
        waited = 0.0
        try:
            reader = open_video(str(film), image_size, backend=backend)
            for batch in shard:
                frames = reader.sample(batch).frames
                began = time.perf_counter()
                room.acquire()
                waited += time.perf_counter() - began
                done.put(frames)
            reader.close()
        finally:
            done.put(None)
        return waited

    num_frames, num_ended, waited = 0, 0, 0.0
    began = time.perf_counter()
    with ThreadPoolExecutor(len(shards)) as pool:
        decoders = [pool.submit(decode, shard) for shard in shards]
        try:
            while num_ended < len(shards):
                began_waiting = time.perf_counter()
                frames = done.get()
                waited += time.perf_counter() - began_waiting
                if frames is None:
                    num_ended += 1
                    continue
                room.release()
                encode(frames)
                num_frames += len(frames)
        finally:
            room.release(len(batches))  # the encoder failed: decoders must not block
    seconds = time.perf_counter() - began
    without_room = sum(decoder.result() for decoder in decoders)
    return FilmPass(seconds, num_frames, waited / seconds, without_room / (seconds * len(shards)))


def _synthetic_film(folder: Path, clip: ClipSpec, repetitions: int) -> Path:
    short, film = folder / "short.mp4", folder / f"synthetic clip of {clip.seconds * repetitions} s.mp4"
    make_clip(short, clip)
    repeat_clip(short, film, repetitions)
    return film


def _encoder(size: TowerSize, device: torch.device, batch_frames: int) -> Encode:
    """Encodes fixed-size batches to merged tokens in host memory; warmed up."""
    tower = make_tower(size, device)

    @torch.inference_mode()
    def encode(frames: np.ndarray) -> torch.Tensor:
        batch = torch.zeros(batch_frames, size.image_size, size.image_size, 3, dtype=torch.uint8)
        batch[: len(frames)] = torch.from_numpy(frames)
        patches = tower(tower.preprocess(batch.to(device)))
        return merge_tokens(patches, TOKENS_PER_FRAME, num_heads=MERGE_HEADS)[: len(frames)].cpu()

    encode(np.zeros((1, size.image_size, size.image_size, 3), np.uint8))
    return encode


def _rows(
    name: str, backend: Backend, num_decoders: int, found: FilmPass, size: TowerSize, peak: float | None
) -> list[Row]:
    rate = found.num_frames / found.seconds
    label = f"{name}, {found.num_frames} frames at 1 fps, {backend} in {num_decoders} threads"
    rows = [
        make_row("film", f"{label}: decode and encode", rate, "frames/s"),
        make_row("film", f"{label}: share of the time in which the encoder waits", found.encoder_stalls, ""),
        make_row("film", f"{label}: share of the time in which decoders wait", found.decoder_stalls, ""),
    ]
    return rows if peak is None else [*rows, make_row("film", f"{label}: MFU", mfu(rate, size, peak), "")]
