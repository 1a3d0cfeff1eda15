"""The report of a run."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from timeviper_platform.data.inputs.readers import count_text
from timeviper_platform.data.media.container import RETRYABLE
from timeviper_platform.data.preprocess.calibrate import Calibration, cost_of
from timeviper_platform.data.preprocess.repeats import RepeatingMedium
from timeviper_platform.data.preprocess.tasks import TaskResult, process_name
from timeviper_platform.data.store.audit import Outcomes


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessReport:
    """Content of the store's report.json."""

    media: Outcomes
    """planned = ok + partial + rejected"""
    segments: Outcomes
    """planned = ok + partial + rejected; missing = duplicate = 0"""
    files_left_out: dict[str, int]
    """files in scanned folders and tars whose names are not those of media, by suffix"""
    segments_encoded: int
    """segments tried in this run"""
    frames: int
    """all stored frames"""
    frames_encoded: int
    """newly encoded frames"""
    frames_missing: int
    """sampled frames of planned segments that are not stored"""
    frames_repeated: int
    """stored frames that repeat the one before"""
    media_repeating: int
    """media above `execution.warn_repeated_share`"""
    most_repeating: list[RepeatingMedium]
    """the worst of them"""
    errors_by_stage: dict[str, dict[str, int]]
    """stage -> error type -> media that are partial or rejected; a medium may have several reasons"""
    joined_media: int
    """videos of several recordings whose clocks restart or jump"""
    joined_parts: int
    """recordings in them"""
    frames_per_second: float
    """`steady_rate` of the last run that encoded frames"""
    bytes: int
    """all stored feature bytes"""
    seconds: dict[str, float]
    """wall seconds: plan, start_up (Ray and workers), run, finalize (with Ray's shutdown), total"""
    stage_seconds: dict[str, float]
    """sums over workers: decode, encode, write"""
    workers: dict[str, int]
    """processes by stage; a fused worker counts in each"""
    utilisation: dict[str, float]
    """busy share by stage"""
    ideal_frames_per_second: float
    """rate without waits"""
    share_of_ideal: float
    cores_per_encoder: float
    """cores that decode and write as fast as one encoder encodes"""
    retries: int
    """repeated storage requests"""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        reasons = ", ".join(
            f"{count} {kind} ({stage})"
            for stage, kinds in self.errors_by_stage.items()
            for kind, count in kinds.items()
        )
        return [
            f"media      {self.media}" + (f"; reasons: {reasons}" if reasons else ""),
            *self._joined_lines(),
            *([f"left out   {count_text(self.files_left_out)}, by their names"] if self.files_left_out else []),
            f"segments   {self.segments}; tried in this run: {self.segments_encoded}",
            *self._retry_lines(),
            f"frames     {self.frames} stored, {self.frames_missing} missing, {self.bytes / 1e6:.1f} MB; encoded in"
            f" this run: {self.frames_encoded} at {self.frames_per_second:.1f} per second",
            *self._repeat_lines(),
            "seconds    " + ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items()),
            "stages     " + ", ".join(f"{name} {value:.1f} s" for name, value in self.stage_seconds.items()),
            *(self._speed_lines() if self.workers else []),
            f"retries    {self.retries}",
        ]

    def _joined_lines(self) -> list[str]:
        if not self.joined_media:
            return []
        return [f"joined     {self.joined_media} videos hold {self.joined_parts} recordings, read one after the other"]

    def _retry_lines(self) -> list[str]:
        decoding = (kinds for stage, kinds in self.errors_by_stage.items() if stage.startswith("decode"))
        final = sorted({kind for kinds in decoding for kind in kinds} - RETRYABLE)
        if not self.segments.rejected or not final:
            return []
        return [f"errors     are kept; to try them again after a fix, add 'retry_errors=[{', '.join(final)}]'"]

    def _repeat_lines(self) -> list[str]:
        if not self.frames_repeated:
            return []
        share = self.frames_repeated / self.frames
        named = ", ".join(f"{medium.uri} ({medium.repeated / medium.frames:.0%})" for medium in self.most_repeating)
        text = f"repeats    {self.frames_repeated} frames ({share:.0%}) repeat the one before"
        return [text + (f"; {self.media_repeating} media repeat most, such as {named}" if named else "")]

    def _speed_lines(self) -> list[str]:
        busy = ", ".join(f"{n} {name} ({self.utilisation[name]:.0%} busy)" for name, n in self.workers.items())
        return [
            f"workers    {busy}; {self.cores_per_encoder:.1f} cores decode and write as fast as one encoder encodes",
            f"ideal      {self.ideal_frames_per_second:.1f} frames per second at these costs; reached:"
            f" {self.share_of_ideal:.0%}",
        ]


STAGES = {"decode": "decoder", "encode": "encoder", "write": "worker"}
"""stage -> field of TaskResult that names its process"""


class RunTotals:
    """Sums over task results. Grows by 24 bytes per task and a name per process."""

    def __init__(self, results: Iterable[TaskResult] = ()) -> None:
        self.segments = self.frames = self.retries_elsewhere = 0
        """`retries_elsewhere`: storage retries of other processes than this one"""
        self.seconds = dict.fromkeys(STAGES, 0.0)
        """busy wall seconds by stage"""
        self.processes: dict[str, set[str]] = {stage: set() for stage in STAGES}
        self.cost = Calibration(segments=0, frames=0, decode_seconds=0.0, encode_seconds=0.0)
        """CPU seconds by stage"""
        self.is_fused = True
        self._spans = tuple(array("d") for _ in range(3))  # start, end and frames of each task
        for result in results:
            self.add(result)

    def add(self, result: TaskResult) -> None:
        self.segments += result.segments.planned
        self.frames += result.num_frames
        self.retries_elsewhere += result.retries if result.worker != process_name() else 0
        for stage, process in STAGES.items():
            self.seconds[stage] += getattr(result, f"{stage}_seconds")
            self.processes[stage].add(getattr(result, process))
        self.cost += cost_of([result])
        self.is_fused = self.is_fused and result.decoder == result.encoder
        for values, value in zip(self._spans, (result.started, result.ended, result.num_frames), strict=True):
            values.append(value)

    def __bool__(self) -> bool:
        return len(self._spans[0]) > 0

    def spans(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns start and end, in seconds since the epoch, and frames of each task."""
        started, ended, frames = (np.array(values) for values in self._spans)
        return started, ended, frames


def steady_rate(totals: RunTotals) -> float:
    """Frames per second in the middle 60 % of a run, since workers start and end one after the other.

    Spreads a task's frames evenly over its time.
    """
    if not totals:
        return 0.0
    started, ended, frames = totals.spans()
    begin, end = started.min(), ended.max()
    low, high = begin + 0.2 * (end - begin), end - 0.2 * (end - begin)
    low = min(max(low, ended.min()), (low + high) / 2)  # at least half of a run with few long tasks
    shares = np.clip(np.minimum(high, ended) - np.maximum(low, started), 0, None) / np.maximum(1e-9, ended - started)
    return float((frames * shares).sum() / max(1e-9, high - low))


@dataclass(frozen=True, slots=True)
class Speed:
    workers: dict[str, int]
    utilisation: dict[str, float]
    ideal_frames_per_second: float
    share_of_ideal: float
    cores_per_encoder: float


def measure_speed(totals: RunTotals, *, num_cores: int, has_gpu: bool = False) -> Speed:
    """Compares the speed with 1 / max(CPU seconds per frame / workers) over the stages."""
    if not totals.frames:
        return Speed({}, {}, 0.0, 0.0, 0.0)
    busy = totals.seconds
    workers = {stage: len(names) for stage, names in totals.processes.items()}
    started, ended, _ = totals.spans()
    wall = max(1e-9, float(ended.max() - started.min()))
    ideal = totals.cost.ideal_frames_per_second(
        workers["decode"], workers["encode"], is_fused=totals.is_fused, num_cores=num_cores, has_gpu=has_gpu
    )
    return Speed(
        workers=workers,
        utilisation={stage: round(busy[stage] / (workers[stage] * wall), 3) for stage in STAGES},
        ideal_frames_per_second=round(ideal, 2),
        share_of_ideal=round(steady_rate(totals) / ideal, 3),
        cores_per_encoder=round((busy["decode"] + busy["write"]) / max(1e-9, busy["encode"]), 2),
    )
