"""The `decode` suite: our sampling at 1 fps against decord's get_batch and against decoding every frame with PyAV.

Knows how the three are run on one thread, scaled to the same size, over the same seconds. Each pair runs in turn.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from timeviper_platform.data.decode import count_samples, iter_frames, open_video, probe_media, sample_times
from timeviper_platform.measure import Row, compare

IMAGE_SIZE = 384
CLIP_SECONDS = 60
CLIP_FPS = 30
CLIP_SIZE = (640, 360)


def decode_suite(film: Path | None = None) -> list[Row]:
    """Rows for a made clip, and for `film` when one is given."""
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mp4"
        make_clip(clip)
        rows = _rows(clip, "made clip, 60 s, 640 x 360", "python jobs/benchmark.py decode")
    if film is not None:
        rows += _rows(film, film.name, "python jobs/benchmark.py decode --film FILM")
    return rows


def make_clip(path: Path, seconds: int = CLIP_SECONDS) -> None:
    """A moving pattern with some noise as H.264 with x264's own defaults (three B frames)."""
    width, height = CLIP_SIZE
    noise = np.random.default_rng(0).integers(0, 24, (height, width, 3), dtype=np.uint8)
    rows, columns = np.mgrid[0:height, 0:width]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=CLIP_FPS)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(seconds * CLIP_FPS):
            wave = (columns + 3 * number) % 200 + (rows + number) % 30
            pixels = np.roll(noise, number, axis=1) + wave[..., None].astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


def sample_ours(path: Path) -> int:
    """Frames that our reader samples."""
    return sum(len(batch.frames) for batch in iter_frames(str(path), IMAGE_SIZE))


def sample_sequentially(path: Path) -> int:
    """Frames sampled by decoding every frame with PyAV."""
    scaler = VideoReformatter()
    end = probe_media(str(path)).end_seconds
    times = sample_times(Fraction(0), Fraction(1), 0, count_samples(Fraction(0), end, Fraction(1)))
    num_frames = 0
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        time_base, shown = Fraction(stream.time_base), None
        for frame in container.decode(stream):
            while shown is not None and num_frames < len(times) and frame.pts * time_base > times[num_frames]:
                _scale(scaler, shown)
                num_frames += 1
            shown = frame
        while shown is not None and num_frames < len(times):
            _scale(scaler, shown)
            num_frames += 1
    return num_frames


def sample_with_decord(path: Path) -> int:
    """Frames that decord's get_batch gives, 64 at a time."""
    end = probe_media(str(path)).end_seconds
    times = sample_times(Fraction(0), Fraction(1), 0, count_samples(Fraction(0), end, Fraction(1)))
    reader = open_video(str(path), IMAGE_SIZE, backend="decord")
    return sum(len(reader.sample(times[start : start + 64]).frames) for start in range(0, len(times), 64))


def _scale(scaler: VideoReformatter, frame: av.VideoFrame) -> np.ndarray:
    scaled = scaler.reformat(frame, IMAGE_SIZE, IMAGE_SIZE, "rgb24", interpolation=Interpolation.BICUBIC, threads=1)
    return np.asarray(scaled.to_ndarray())


def _rows(path: Path, name: str, command: str) -> list[Row]:
    controls: dict[str, Callable[[Path], int]] = {
        "decoding every frame with PyAV": sample_sequentially,
        "decord get_batch": sample_with_decord,
    }
    rows = []
    for control, sample in controls.items():
        result = compare(lambda: sample_ours(path), lambda sample=sample: sample(path), repeats=5)  # type: ignore[misc]
        text = f"sampling at 1 fps, times faster than {control} ({name}; noise {result.noise:.0%})"
        rows.append(Row(name=text, value=result.speedup, unit="x", bar=">= 1.2", command=command))
    return rows
