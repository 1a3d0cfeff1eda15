"""Rows of the `decode` suite, on one thread: sampling at 1 fps, cost per frame, keyframes, file kinds, long files."""

from __future__ import annotations

import logging
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from timeviper_platform.benchmarks.measure import Row, compare
from timeviper_platform.benchmarks.video.clips import ClipSpec, make_clip, repeat_clip
from timeviper_platform.benchmarks.video.strategies import (
    STRATEGIES,
    Strategy,
    sample_keyframes,
    sample_ours,
    sample_sequentially,
    sample_with_decord,
)
from timeviper_platform.data.media.probe import probe_media
from timeviper_platform.data.video.sampling import count_frames, sample_times

logger = logging.getLogger(__name__)

COMMAND = "python jobs/benchmark.py decode --only "
CLOSE = 0.8
"""Strategies within 1 / 0.8 of our time run more turns."""
HOUR = 3600


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeSizes:
    clip: ClipSpec = field(default_factory=ClipSpec)
    repetitions: int = 10
    """Length of the synthetic video, in clips."""
    image_size: int = 384
    repeats: int = 5
    close_repeats: int = 15
    long_clip: ClipSpec = field(default_factory=lambda: ClipSpec(width=128, height=72, fps=24))
    long_repetitions: int = 10 * 60
    """Length of the long file, in clips of `long_clip`."""
    long_image_size: int = 96
    """Small, so that scaling does not dominate the long file."""
    long_repeats: int = 5


def sampling_rows(film: Path | None = None, sizes: DecodeSizes = DecodeSizes()) -> list[Row]:
    """1 fps compared with decord on a clip of 10 min and on `film`, and with decoding every frame."""
    with tempfile.TemporaryDirectory() as folder:
        short, clip = Path(folder) / "short.mp4", Path(folder) / "clip.mp4"
        make_clip(short, sizes.clip)
        repeat_clip(short, clip, sizes.repetitions)
        name = _clip_name(sizes)
        rows = [
            _sampling_row(
                short, f"its first {sizes.clip.seconds} s", sample_sequentially, "decoding every frame", None, sizes
            ),
            _sampling_row(clip, name, sample_with_decord, "decord's get_batch", ">= 1.6", sizes),
        ]
    if film is not None:
        rows.append(_sampling_row(film, film.name, sample_with_decord, "decord's get_batch", ">= 1.6", sizes))
    return rows


def _sampling_row(
    path: Path, name: str, control: Strategy, control_name: str, bar: str | None, sizes: DecodeSizes
) -> Row:
    times = _every_second(path)
    logger.info("sampling %s at 1 fps against %s", name, control_name)
    result = compare(
        lambda: _run(sample_ours, path, times, sizes.image_size),
        lambda: _run(control, path, times, sizes.image_size),
        repeats=sizes.repeats,
    )
    text = f"sampling at 1 fps, times faster than {control_name} ({name}; noise {result.noise:.0%})"
    return Row(name=text, value=result.speedup, unit="x", bar=bar, command=COMMAND + "sampling [--film FILM]")


def cost_rows(film: Path | None = None, sizes: DecodeSizes = DecodeSizes()) -> list[Row]:
    """CPU time to decode and scale one frame at 1 fps; median of whole passes."""
    with tempfile.TemporaryDirectory() as folder:
        clip = _synthetic_file(Path(folder), sizes.clip, sizes.repetitions)
        rows = [_cost_row(clip, _clip_name(sizes), sizes)]
    return rows if film is None else [*rows, _cost_row(film, film.name, sizes)]


def _cost_row(path: Path, name: str, sizes: DecodeSizes) -> Row:
    times = _every_second(path)
    logger.info("CPU time of a frame of %s", name)
    milliseconds = []
    for _ in range(sizes.repeats + 1):
        start = time.process_time()
        _run(sample_ours, path, times, sizes.image_size)
        milliseconds.append((time.process_time() - start) / len(times) * 1e3)
    _, *measured = milliseconds  # the first pass warms caches
    text = f"CPU time of a frame sampled at 1 fps ({name}; {min(measured):.1f} to {max(measured):.1f})"
    return Row(name=text, value=statistics.median(measured), unit="ms", command=COMMAND + "cost [--film FILM]")


def keyframe_rows(film: Path | None = None, sizes: DecodeSizes = DecodeSizes()) -> list[Row]:
    """Time of keyframes alone over time of sampling every second."""
    with tempfile.TemporaryDirectory() as folder:
        clip = _synthetic_file(Path(folder), sizes.clip, sizes.repetitions)
        rows = [_keyframe_row(clip, _clip_name(sizes), sizes)]
    return rows if film is None else [*rows, _keyframe_row(film, film.name, sizes)]


def _keyframe_row(path: Path, name: str, sizes: DecodeSizes) -> Row:
    times = _every_second(path)
    logger.info("keyframes of %s alone", name)
    num_keyframes = _num_frames(sample_keyframes, path, times, sizes.image_size)
    result = compare(
        lambda: _num_frames(sample_keyframes, path, times, sizes.image_size),
        lambda: _run(sample_ours, path, times, sizes.image_size),
        repeats=sizes.repeats,
    )
    kept = f"{num_keyframes} frames in place of {len(times)}"
    text = f"keyframes alone, time over that of sampling at 1 fps ({name}; {kept}; noise {result.noise:.0%})"
    return Row(name=text, value=1 / result.speedup, unit="x", command=COMMAND + "keyframes [--film FILM]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A kind of file, and which of its frames are sampled."""

    name: str
    clip: ClipSpec
    repetitions: int = 1
    num_frames: int | None = None
    """Number of evenly spread frames; None = every second."""
    last_seconds: int | None = None
    """Only the last seconds."""
    strategies: tuple[str, ...] = tuple(STRATEGIES)
    """Names of those compared with ours."""


CASES = (
    Case(name="dense, 1 fps", clip=ClipSpec()),
    Case(name="32 frames from 1 h", clip=ClipSpec(), repetitions=60, num_frames=32, strategies=("seeks", "decord")),
    Case(
        name="last 10 s of 10 h",
        clip=ClipSpec(width=128, height=72, fps=24),
        repetitions=600,
        last_seconds=10,
        strategies=("seeks", "decord"),
    ),
    Case(name="a GOP of one, 1 fps", clip=ClipSpec(gop=1)),
    Case(name="a GOP of 600, 1 fps", clip=ClipSpec(gop=600)),
    Case(name="variable frame rate, 1 fps", clip=ClipSpec(is_variable=True)),
)


def strategy_rows(
    film: Path | None = None, cases: Sequence[Case] = CASES, sizes: DecodeSizes = DecodeSizes()
) -> list[Row]:
    """Our time over that of the best other strategy, for each kind of file."""
    rows = []
    for case in cases:
        logger.info("case: %s", case.name)
        with tempfile.TemporaryDirectory() as folder:
            path = _synthetic_file(Path(folder), case.clip, case.repetitions)
            times = _case_times(path, case)
            ratios = _in_turn({name: STRATEGIES[name] for name in case.strategies}, path, times, sizes)
        best = max(ratios, key=lambda name: ratios[name])
        others = ", ".join(f"{name} {1 / ratio:.2f}" for name, ratio in sorted(ratios.items(), key=lambda r: -r[1]))
        text = f"{case.name}: our time over that of the best other strategy ({best}; against ours {others})"
        rows.append(Row(name=text, value=ratios[best], unit="x", bar="<= 1.1", command=COMMAND + "strategies"))
    return rows


def _in_turn(
    strategies: dict[str, Strategy], path: Path, times: Sequence[Fraction], sizes: DecodeSizes
) -> dict[str, float]:
    """Our seconds over those of each strategy: medians over turns after an unmeasured one."""
    for strategy in (sample_ours, *strategies.values()):
        _run(strategy, path, times, sizes.image_size)
    ratios: dict[str, list[float]] = {name: [] for name in strategies}
    for repeat in range(max(sizes.repeats, sizes.close_repeats)):
        ours = _seconds(sample_ours, path, times, sizes.image_size)
        for name, strategy in strategies.items():
            if repeat < sizes.repeats or statistics.median(ratios[name]) > CLOSE:
                ratios[name].append(ours / _seconds(strategy, path, times, sizes.image_size))
    return {name: statistics.median(found) for name, found in ratios.items()}


def _seconds(strategy: Strategy, path: Path, times: Sequence[Fraction], image_size: int) -> float:
    start = time.perf_counter()
    _run(strategy, path, times, image_size)
    return time.perf_counter() - start


def long_rows(film: Path | None = None, sizes: DecodeSizes = DecodeSizes()) -> list[Row]:
    """Time per second and memory of a long file, compared with one minute of it."""
    hours = f"{sizes.long_clip.seconds * sizes.long_repetitions / HOUR:g}"
    with tempfile.TemporaryDirectory() as folder:
        minute = _synthetic_file(Path(folder), sizes.long_clip, 1)
        long = Path(folder) / "long.mp4"
        repeat_clip(minute, long, sizes.long_repetitions)
        logger.info("%s h by stream copy: %.0f MB", hours, long.stat().st_size / 1e6)
        short_seconds, long_seconds = [], []
        times, long_times = _every_second(minute), _every_second(long)
        for _ in range(sizes.long_repeats):
            short_seconds.append(_seconds_each(minute, times, sizes.long_image_size, repeats=20))
            long_seconds.append(_seconds_each(long, long_times, sizes.long_image_size, repeats=1))
            logger.info("a second of the long file: %.3g s of work", long_seconds[-1])
        memory = [
            _peak_bytes(path, times, sizes.image_size)
            for path, times in ((minute, times), (long, long_times[: HOUR // 4]))
        ]
    ratio = statistics.median(long_seconds) / statistics.median(short_seconds)
    name = f"a file of {hours} h against one of 1 min, "
    command = COMMAND + "long"
    return [
        Row(name=name + "time for each second of video", value=ratio, unit="x", bar="<= 1.1", command=command),
        Row(name=name + "peak memory", value=memory[1] / memory[0], unit="x", bar="<= 1.2", command=command),
        Row(name="peak memory of a process that samples it", value=memory[1] / 1e6, unit="MB", command=command),
    ]


def _seconds_each(path: Path, times: Sequence[Fraction], image_size: int, *, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        _run(sample_ours, path, times, image_size)
    return (time.perf_counter() - start) / repeats / len(times)


def _peak_bytes(path: Path, times: Sequence[Fraction], image_size: int) -> int:
    """Peak memory of a new process that samples at the encoder size."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_sample_and_report, (path, times, image_size))


def _sample_and_report(path: Path, times: Sequence[Fraction], image_size: int) -> int:
    _run(sample_ours, path, times, image_size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _synthetic_file(folder: Path, clip: ClipSpec, repetitions: int) -> Path:
    make_clip(folder / "clip.mp4", clip)
    if repetitions == 1:
        return folder / "clip.mp4"
    repeat_clip(folder / "clip.mp4", folder / "repeated.mp4", repetitions)
    return folder / "repeated.mp4"


def _clip_name(sizes: DecodeSizes) -> str:
    clip, minutes = sizes.clip, sizes.clip.seconds * sizes.repetitions // 60
    return f"synthetic clip of {minutes} min, {clip.fps} fps, {clip.width} x {clip.height}"


def _case_times(path: Path, case: Case) -> list[Fraction]:
    times = _every_second(path)
    if case.last_seconds is not None:
        return times[-case.last_seconds :]
    if case.num_frames is not None:
        return [times[len(times) * k // case.num_frames] for k in range(case.num_frames)]
    return times


def _every_second(path: Path) -> list[Fraction]:
    end = probe_media(str(path)).duration_seconds
    return sample_times(Fraction(0), Fraction(1), 0, count_frames(Fraction(0), end, Fraction(1)))


def _run(strategy: Strategy, path: Path, times: Sequence[Fraction], image_size: int) -> None:
    """Raises RuntimeError if frames are missing."""
    num_frames = _num_frames(strategy, path, times, image_size)
    if num_frames != len(times):
        raise RuntimeError(f"{strategy.__name__} gave {num_frames} of {len(times)} frames of {path}")


def _num_frames(strategy: Strategy, path: Path, times: Sequence[Fraction], image_size: int) -> int:
    return sum(len(frames) for frames in strategy(path, times, image_size))


DECODE_GROUPS: dict[str, Callable[[Path | None], list[Row]]] = {
    "sampling": sampling_rows,
    "cost": cost_rows,
    "keyframes": keyframe_rows,
    "strategies": strategy_rows,
    "long": long_rows,
}
