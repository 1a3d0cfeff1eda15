"""What a run did, in numbers: audit, rejects and report; and when it gives up.

Knows counts and clocks. Does not know how anything is decoded or written.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from timeviper_platform.common.schemas import REJECTS
from timeviper_platform.data.media.container import RETRYABLE, ErrorType
from timeviper_platform.data.plan.segments import PlanError
from timeviper_platform.data.preprocess.calibrate import cost_of
from timeviper_platform.data.preprocess.worker import TaskResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessReport:
    """One run; `report.json` holds the same."""

    media: int
    """in the input"""
    segments: int
    """planned"""
    segments_done: int
    """with status ok"""
    segments_partial: int
    segments_error: int
    segments_encoded: int
    """in this run; the others were there before"""
    frames: int
    """stored for this input"""
    frames_encoded: int
    """in this run"""
    errors: int
    """media that are rejected, wholly or in part"""
    errors_by_stage: dict[str, dict[str, int]]
    """stage -> type -> media"""
    frames_per_second: float
    """in the steady state, the middle 60 %, of the last run that encoded"""
    bytes: int
    """of features stored for this input"""
    seconds: dict[str, float]
    """wall time: plan, start_up (Ray, and workers until the first unit), run, finalize (with Ray's end), total"""
    stage_seconds: dict[str, float]
    """sum over the workers: decode, encode, write"""
    workers: dict[str, int]
    """processes that did some of the work, by stage; fused ones are in every stage"""
    utilisation: dict[str, float]
    """busy seconds of a stage's workers over the seconds they had, from the first unit's start to the last one's end"""
    ideal_frames_per_second: float
    """1 / max(seconds a frame / workers) over the stages, at the seconds of CPU that a frame cost in this run's
    workers (on a GPU: seconds), and no more than the cores could do: waits for a core or for storage lower the share"""
    share_of_ideal: float
    """frames_per_second over that"""
    cores_per_encoder: float
    """CPU cores that decode and write as fast as one encoder encodes; for an encoder on a GPU, cores needed per GPU"""
    retries: int
    """requests to storage that failed for a passing reason and were made again, in this run"""
    audit: dict[str, int]
    """planned = ok + partial + error, with missing = duplicate = 0"""

    def to_json(self) -> dict[str, Any]:
        """As it is written to `report.json`."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        reasons = ", ".join(
            f"{count} {kind} ({stage})"
            for stage, kinds in self.errors_by_stage.items()
            for kind, count in kinds.items()
        )
        return [
            f"media      {self.media}, of which rejected: {self.errors}" + (f" = {reasons}" if reasons else ""),
            f"segments   {self.segments} planned = {self.segments_done} ok + {self.segments_partial} partial"
            f" + {self.segments_error} error; encoded in this run: {self.segments_encoded}",
            *self._retry_lines(),
            f"frames     {self.frames} stored, {self.bytes / 1e6:.1f} MB; encoded in this run: {self.frames_encoded}"
            f" at {self.frames_per_second:.1f} a second",
            "seconds    " + ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items()),
            "stages     " + ", ".join(f"{name} {value:.1f} s" for name, value in self.stage_seconds.items()),
            *(self._speed_lines() if self.workers else []),
            f"retries    {self.retries}",
        ]

    def _retry_lines(self) -> list[str]:
        """How to have another try at what no run tries again by itself; headers are read again by each."""
        decoding = (kinds for stage, kinds in self.errors_by_stage.items() if stage.startswith("decode"))
        final = sorted({kind for kinds in decoding for kind in kinds} - RETRYABLE)
        if not self.segments_error or not final:
            return []
        return [f"errors     stay; after a change that helps, try them again with 'retry_errors=[{', '.join(final)}]'"]

    def _speed_lines(self) -> list[str]:
        busy = ", ".join(f"{n} {name} ({self.utilisation[name]:.0%} busy)" for name, n in self.workers.items())
        return [
            f"workers    {busy}; one encoder needs {self.cores_per_encoder:.1f} cores to decode and write for it",
            f"ideal      {self.ideal_frames_per_second:.1f} frames a second at these costs; reached:"
            f" {self.share_of_ideal:.0%}",
        ]


def steady_rate(outcomes: Sequence[TaskResult]) -> float:
    """Frames a second in the middle 60 % of the run, from the first finished unit on; a unit's frames are spread
    evenly over its time.

    Actors start one after the other and end one after the other: neither end says how fast the work goes. Split
    decoders may begin long before the encoder has loaded its weights.
    """
    if not outcomes:
        return 0.0
    begin, end = min(o.started for o in outcomes), max(o.ended for o in outcomes)
    low, high = begin + 0.2 * (end - begin), end - 0.2 * (end - begin)
    low = min(max(low, min(o.ended for o in outcomes)), (low + high) / 2)  # a few long units: half of it at least
    frames = sum(
        o.num_frames * max(0.0, min(high, o.ended) - max(low, o.started)) / max(1e-9, o.ended - o.started)
        for o in outcomes
    )
    return frames / max(1e-9, high - low)


@dataclass(frozen=True, slots=True)
class Speed:
    """How a run's speed compares with what its own costs allow."""

    workers: dict[str, int]
    utilisation: dict[str, float]
    ideal_frames_per_second: float
    share_of_ideal: float
    cores_per_encoder: float


def measure_speed(outcomes: Sequence[TaskResult], *, num_cores: int, has_gpu: bool = False) -> Speed:
    """The speed of a run against 1 / max(seconds a frame / workers) over its stages.

    A fused worker encodes and writes while its child decodes ahead of it; split stages have processes of their own.

    Args:
        outcomes: of the run's units.
        num_cores: of all its machines.
        has_gpu: encoding takes nothing of them.
    """
    frames = sum(o.num_frames for o in outcomes)
    if not frames:
        return Speed({}, {}, 0.0, 0.0, 0.0)
    decode, encode = sum(o.decode_seconds for o in outcomes), sum(o.encode_seconds for o in outcomes)
    write = sum(o.write_seconds for o in outcomes)
    is_fused = all(o.decoder == o.encoder for o in outcomes)
    busy = {"decode": decode, "encode": encode, "write": write}
    names = {"decode": "decoder", "encode": "encoder", "write": "worker"}
    workers = {stage: len({getattr(o, name) for o in outcomes}) for stage, name in names.items()}
    wall = max(1e-9, max(o.ended for o in outcomes) - min(o.started for o in outcomes))
    slots = workers["decode"], workers["encode"]
    costs = cost_of(outcomes)
    ideal = costs.ideal_frames_per_second(*slots, is_fused=is_fused, num_cores=num_cores, has_gpu=has_gpu)
    return Speed(
        workers=workers,
        utilisation={stage: round(busy[stage] / (workers[stage] * wall), 3) for stage in busy},
        ideal_frames_per_second=round(ideal, 2),
        share_of_ideal=round(steady_rate(outcomes) / ideal, 3),
        cores_per_encoder=round((decode + write) / max(1e-9, encode), 2),
    )


@dataclass(slots=True)
class ConsecutiveFailureLimit:
    """Stops a job whose media fail one after the other for one and the same reason: that is no matter of media."""

    limit: int | None
    """None = never"""
    _reason: str = ""
    _num_media: int = 0
    _last_media_id: str = ""

    def add(self, media: Iterable[str], reasons: Iterable[str], *, message: str = "") -> None:
        """Takes note of media in the order of work; '' stands for those that did not fail.

        Raises:
            RuntimeError: when the limit is reached, with the reason and the way out.
        """
        for media_id, reason in zip(media, reasons, strict=True):
            if not reason or reason != self._reason:
                self._reason, self._num_media, self._last_media_id = reason, 0, ""
            if reason and media_id != self._last_media_id:  # a long film's segments are one medium
                self._num_media, self._last_media_id = self._num_media + 1, media_id
            if self.limit is not None and self._num_media >= self.limit:
                raise RuntimeError(self._text(message))

    def _text(self, message: str) -> str:
        advice = _WAYS_OUT.get(self._reason.partition("/")[2], "look at one of them with ffprobe")
        return (
            f"{self._num_media} media in a row failed for one reason, {self._reason}: {advice}. The last was"
            f" {self._last_media_id}" + (f" ({message})" if message else "") + ". What is done is kept: run the job"
            " again, or raise execution.max_consecutive_failures (null = never stop) if the media are to blame"
        )


_WAYS_OUT: dict[str, str] = {
    ErrorType.NOT_FOUND: "are the paths right, and is the share mounted on the workers",
    ErrorType.PERMISSION_DENIED: "may the workers' user or credentials read them",
    ErrorType.READ_FAILED: "is the storage up, and within its rate limits",
    ErrorType.BAD_URI: "correct the addresses",
    ErrorType.BAD_ROW: "correct the manifest",
    ErrorType.NO_DECODER: "has this FFmpeg the codec",
}


def reject_table(errors: Iterable[PlanError], index: pa.Table) -> pa.Table:
    """REJECTS rows: one for each medium, status, stage and type.

    Args:
        errors: media that the plan could not take.
        index: INDEX rows of this input.
    """
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for error in errors:
        rows[(error.media_id, "error", error.error_stage, error.error_type)] = {
            **asdict(error),
            "status": "error",
            "num_segments": 0,
            "frames_missing": 0,
        }
    bad = index.filter(pc.field("status") != "ok")
    for found in bad.select([*_REJECT_FIELDS, "frames_missing"]).to_pylist():
        key = (found["media_id"], found["status"], found["error_stage"], found["error_type"])
        row = rows.setdefault(key, {**found, "num_segments": 0, "frames_missing": 0})
        row["num_segments"] += 1
        row["frames_missing"] += found["frames_missing"]
    return pa.Table.from_pylist(list(rows.values()), schema=REJECTS)


_REJECT_FIELDS = ["media_id", "uri", "status", "error_stage", "error_type", "error_message"]
