"""Rows of the `decode` suite, on one thread: sampling at 1 fps, cost per frame, keyframes, file kinds, long files."""

from __future__ import annotations

import logging
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from timeviper_platform.benchmarks.measure import Row, compare
from timeviper_platform.benchmarks.video.clips import ClipSpec, make_clip, repeat_clip
from timeviper_platform.benchmarks.video.strategies import (
    WAYS,
    Way,
    sample_keyframes,
    sample_ours,
    sample_sequentially,
    sample_with_decord,
)
from timeviper_platform.data.media.probe import probe_media
from timeviper_platform.data.video.sampling import count_frames, sample_times

logger = logging.getLogger(__name__)

COMMAND = "python jobs/benchmark.py decode --only "
IMAGE_SIZE = 384
LONG_IMAGE_SIZE = 96
"""Small, so that scaling does not dominate the ten-hour file."""
REPEATS = 5
CLOSE, CLOSE_REPEATS = 0.8, 15
"""Strategies within 1 / 0.8 of our time run more turns."""
LONG_REPEATS = 5
HOUR = 3600


def sampling_rows(film: Path | None = None, clip_seconds: int = 60, repetitions: int = 10) -> list[Row]:
    """1 fps compared with decord on a clip of 10 min and on `film`, and with decoding every frame."""
    with tempfile.TemporaryDirectory() as folder:
        short, clip = Path(folder) / "short.mp4", Path(folder) / "clip.mp4"
        make_clip(short, ClipSpec(seconds=clip_seconds))
        repeat_clip(short, clip, repetitions)
        name = _clip_name(clip_seconds * repetitions)
        rows = [
            _sampling_row(short, f"its first {clip_seconds} s", sample_sequentially, "decoding every frame", None),
            _sampling_row(clip, name, sample_with_decord, "decord's get_batch", ">= 1.6"),
        ]
    if film is not None:
        rows.append(_sampling_row(film, film.name, sample_with_decord, "decord's get_batch", ">= 1.6"))
    return rows


def _sampling_row(path: Path, name: str, control: Way, control_name: str, bar: str | None) -> Row:
    times = _every_second(path)
    logger.info("sampling %s at 1 fps against %s", name, control_name)
    result = compare(lambda: _run(sample_ours, path, times), lambda: _run(control, path, times), repeats=REPEATS)
    text = f"sampling at 1 fps, times faster than {control_name} ({name}; noise {result.noise:.0%})"
    return Row(name=text, value=result.speedup, unit="x", bar=bar, command=COMMAND + "sampling [--film FILM]")


def cost_rows(film: Path | None = None, clip_seconds: int = 60, repetitions: int = 10) -> list[Row]:
    """CPU time to decode and scale one frame at 1 fps; median of whole passes."""
    with tempfile.TemporaryDirectory() as folder:
        clip = _made(Path(folder), ClipSpec(seconds=clip_seconds), repetitions)
        rows = [_cost_row(clip, _clip_name(clip_seconds * repetitions))]
    return rows if film is None else [*rows, _cost_row(film, film.name)]


def _cost_row(path: Path, name: str) -> Row:
    times = _every_second(path)
    logger.info("what a frame of %s costs", name)
    milliseconds = []
    for _ in range(REPEATS + 1):
        start = time.process_time()
        _run(sample_ours, path, times)
        milliseconds.append((time.process_time() - start) / len(times) * 1e3)
    _, *measured = milliseconds  # the first pass warms caches
    text = f"CPU time of a frame sampled at 1 fps ({name}; {min(measured):.1f} to {max(measured):.1f})"
    return Row(name=text, value=statistics.median(measured), unit="ms", command=COMMAND + "cost [--film FILM]")


def keyframe_rows(film: Path | None = None, clip_seconds: int = 60, repetitions: int = 10) -> list[Row]:
    """Time of keyframes alone over time of sampling every second."""
    with tempfile.TemporaryDirectory() as folder:
        clip = _made(Path(folder), ClipSpec(seconds=clip_seconds), repetitions)
        rows = [_keyframe_row(clip, _clip_name(clip_seconds * repetitions))]
    return rows if film is None else [*rows, _keyframe_row(film, film.name)]


def _keyframe_row(path: Path, name: str) -> Row:
    times = _every_second(path)
    logger.info("keyframes of %s alone", name)
    num_keyframes = _num_frames(sample_keyframes, path, times)
    result = compare(
        lambda: _num_frames(sample_keyframes, path, times), lambda: _run(sample_ours, path, times), repeats=REPEATS
    )
    kept = f"{num_keyframes} frames in place of {len(times)}"
    text = f"keyframes alone, time over that of sampling at 1 fps ({name}; {kept}; noise {result.noise:.0%})"
    return Row(name=text, value=1 / result.speedup, unit="x", command=COMMAND + "keyframes [--film FILM]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Strategy:
    """A kind of file and the frames wanted of it."""

    name: str
    clip: ClipSpec
    repetitions: int = 1
    num_frames: int | None = None
    """Number of evenly spread frames; None = every second."""
    last_seconds: int | None = None
    """Only the last seconds."""
    ways: tuple[str, ...] = tuple(WAYS)
    """Strategies to compare with."""


STRATEGIES = (
    Strategy(name="dense, 1 fps", clip=ClipSpec()),
    Strategy(name="32 frames from 1 h", clip=ClipSpec(), repetitions=60, num_frames=32, ways=("seeks", "decord")),
    Strategy(
        name="last 10 s of 10 h",
        clip=ClipSpec(width=128, height=72, fps=24),
        repetitions=600,
        last_seconds=10,
        ways=("seeks", "decord"),
    ),
    Strategy(name="a GOP of one, 1 fps", clip=ClipSpec(gop=1)),
    Strategy(name="a GOP of 600, 1 fps", clip=ClipSpec(gop=600)),
    Strategy(name="variable frame rate, 1 fps", clip=ClipSpec(is_variable=True)),
)


def strategy_rows(film: Path | None = None, strategies: Sequence[Strategy] = STRATEGIES) -> list[Row]:
    """Our time over that of the best other strategy, for each kind of file."""
    rows = []
    for strategy in strategies:
        logger.info("strategy: %s", strategy.name)
        with tempfile.TemporaryDirectory() as folder:
            path = _made(Path(folder), strategy.clip, strategy.repetitions)
            times = _wanted(path, strategy)
            ratios = _in_turn({name: WAYS[name] for name in strategy.ways}, path, times)
        best = max(ratios, key=lambda name: ratios[name])
        others = ", ".join(f"{name} {1 / ratio:.2f}" for name, ratio in sorted(ratios.items(), key=lambda r: -r[1]))
        text = f"{strategy.name}: our time against the best other way ({best}; against ours {others})"
        rows.append(Row(name=text, value=ratios[best], unit="x", bar="<= 1.1", command=COMMAND + "strategies"))
    return rows


def _in_turn(ways: dict[str, Way], path: Path, times: Sequence[Fraction]) -> dict[str, float]:
    """Our seconds over those of each strategy: medians over turns after an unmeasured one."""
    for way in (sample_ours, *ways.values()):
        _run(way, path, times)
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(CLOSE_REPEATS):
        ours = _seconds(sample_ours, path, times)
        for name, way in ways.items():
            if repeat < REPEATS or statistics.median(ratios[name]) > CLOSE:
                ratios[name].append(ours / _seconds(way, path, times))
    return {name: statistics.median(found) for name, found in ratios.items()}


def _seconds(way: Way, path: Path, times: Sequence[Fraction]) -> float:
    start = time.perf_counter()
    _run(way, path, times)
    return time.perf_counter() - start


def long_rows(film: Path | None = None, hours: int = 10) -> list[Row]:
    """Time per second and memory of a long file, compared with one minute of it."""
    clip = ClipSpec(width=128, height=72, fps=24)
    with tempfile.TemporaryDirectory() as folder:
        minute = _made(Path(folder), clip, 1)
        long = Path(folder) / "long.mp4"
        repeat_clip(minute, long, hours * 60)
        logger.info("%d h by stream copy: %.0f MB", hours, long.stat().st_size / 1e6)
        short_seconds, long_seconds = [], []
        times, long_times = _every_second(minute), _every_second(long)
        for _ in range(LONG_REPEATS):
            short_seconds.append(_seconds_each(minute, times, repeats=20))
            long_seconds.append(_seconds_each(long, long_times, repeats=1))
            logger.info("a second of the long file: %.3g s of work", long_seconds[-1])
        memory = [_peak_bytes(path, times) for path, times in ((minute, times), (long, long_times[: HOUR // 4]))]
    ratio = statistics.median(long_seconds) / statistics.median(short_seconds)
    name = f"a file of {hours} h against one of 1 min, "
    command = COMMAND + "long"
    return [
        Row(name=name + "time for each second of video", value=ratio, unit="x", bar="<= 1.1", command=command),
        Row(name=name + "peak memory", value=memory[1] / memory[0], unit="x", bar="<= 1.2", command=command),
        Row(name="peak memory of a process that samples it", value=memory[1] / 1e6, unit="MB", command=command),
    ]


def _seconds_each(path: Path, times: Sequence[Fraction], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        _run(sample_ours, path, times, LONG_IMAGE_SIZE)
    return (time.perf_counter() - start) / repeats / len(times)


def _peak_bytes(path: Path, times: Sequence[Fraction]) -> int:
    """Peak memory of a new process that samples at the encoder size."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_sample_and_report, (path, times))


def _sample_and_report(path: Path, times: Sequence[Fraction]) -> int:
    _run(sample_ours, path, times)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _made(folder: Path, clip: ClipSpec, repetitions: int) -> Path:
    make_clip(folder / "clip.mp4", clip)
    if repetitions == 1:
        return folder / "clip.mp4"
    repeat_clip(folder / "clip.mp4", folder / "repeated.mp4", repetitions)
    return folder / "repeated.mp4"


def _clip_name(seconds: int) -> str:
    return f"made clip of {seconds // 60} min, 30 fps, 640 x 360"


def _wanted(path: Path, strategy: Strategy) -> list[Fraction]:
    times = _every_second(path)
    if strategy.last_seconds is not None:
        return times[-strategy.last_seconds :]
    if strategy.num_frames is not None:
        return [times[len(times) * k // strategy.num_frames] for k in range(strategy.num_frames)]
    return times


def _every_second(path: Path) -> list[Fraction]:
    end = probe_media(str(path)).duration_seconds
    return sample_times(Fraction(0), Fraction(1), 0, count_frames(Fraction(0), end, Fraction(1)))


def _run(way: Way, path: Path, times: Sequence[Fraction], image_size: int = IMAGE_SIZE) -> None:
    """Runs a strategy. Raises RuntimeError if frames are missing."""
    num_frames = _num_frames(way, path, times, image_size)
    if num_frames != len(times):
        raise RuntimeError(f"{way.__name__} gave {num_frames} of {len(times)} frames of {path}")


def _num_frames(way: Way, path: Path, times: Sequence[Fraction], image_size: int | None = None) -> int:
    return sum(len(frames) for frames in way(path, times, image_size or IMAGE_SIZE))


DECODE_GROUPS = {
    "sampling": sampling_rows,
    "cost": cost_rows,
    "keyframes": keyframe_rows,
    "strategies": strategy_rows,
    "long": long_rows,
}
