"""The whole job: media -> plan -> decode, encode, write -> index, audit, rejects, report.

Knows the order of things and what makes a run one that can be repeated: what is committed is never done again. The
work itself is in segments.py (plan), steps.py (decode, encode, write), graph.py (Ray) and store_writer.py (commits).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from timeviper_platform.common import storage
from timeviper_platform.common.ray_cluster import has_cluster
from timeviper_platform.data.encode.frame_encoder import FrameEncoder, VisionTowerConfig
from timeviper_platform.data.inputs.readers import read_pages
from timeviper_platform.data.media.container import ErrorType, MediaLimits
from timeviper_platform.data.plan.segments import PlanSpec, SamplingConfig, Segment, cut_units, exact
from timeviper_platform.data.plan.stored_plan import (
    Plan,
    PlanPages,
    finished_segments,
    plan_here,
    write_plan,
)
from timeviper_platform.data.preprocess import report as reporting
from timeviper_platform.data.preprocess.finalize import finalize_store
from timeviper_platform.data.preprocess.progress import Progress
from timeviper_platform.data.preprocess.ray_graph import (
    ExecutionConfig,
    num_cores,
    plan_on_ray,
    run_on_ray,
)
from timeviper_platform.data.preprocess.report import ConsecutiveFailureLimit, PreprocessReport
from timeviper_platform.data.preprocess.worker import TaskResult, WorkerSpec, process_name, run_here
from timeviper_platform.data.store.writer import create_store, remove_uncommitted
from timeviper_platform.data.video_worker.frame_source import DecodeConfig

logger = logging.getLogger(__name__)

REPORT_FILE = "report.json"

Runner = Callable[[Collection[Segment], WorkerSpec, ExecutionConfig], Iterator[TaskResult]]


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessConfig:
    """One run of `jobs/preprocess.py`."""

    input: str
    """a manifest (.parquet, .jsonl, .csv), a glob, a folder, or one file; local or any fsspec URI; see inputs.py"""
    feature_store: str
    """the feature store's folder; made when missing, added to when made by the same recipe"""
    encoder: VisionTowerConfig = field(default_factory=VisionTowerConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    limits: MediaLimits = field(default_factory=MediaLimits)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    hash: Literal["none", "sha256"] = "none"
    """sha256 reads every byte of every file once more; needed by stores that serving looks uploads up in"""
    retry_errors: tuple[str, ...] | Literal["all"] = ()
    """error types of committed segments that this run tries once more, as after a higher deadline_seconds or
    max_pixels; those that are the world's fault (media.RETRYABLE) every run does"""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.errors_to_retry) - set(ErrorType)):
            raise ValueError(
                f"retry_errors: there is no {', '.join(unknown)}; name some of {', '.join(ErrorType)}, or say all"
            )
        if self.sampling.frame_selection == "keyframes" and self.decode.backend != "pyav":
            raise ValueError(
                f"{self.sampling.frame_selection = } needs decode.backend pyav, not {self.decode.backend!r}"
            )
        mode, device = self.execution.mode, self.encoder.device
        if self.decode.backend == "nvdec" and (mode != "fused" or device != "cuda"):
            raise ValueError(
                "decode.backend nvdec decodes on the encoder's GPU, which split decoders have no share of: execution."
                f"{mode = } must be fused and encoder.{device = } cuda; or use backend pyav"
            )

    @property
    def errors_to_retry(self) -> tuple[str, ...]:
        """`retry_errors` one by one."""
        return tuple(ErrorType) if self.retry_errors == "all" else self.retry_errors


def run_preprocess(config: PreprocessConfig, *, run: Runner = run_on_ray) -> PreprocessReport:
    """Does what is missing of `config.input` in the store at `config.feature_store`.

    Args:
        config: see the class.
        run: does the missing segments; called only when there are any.

    Raises:
        ValueError: for a missing input or encoder, or a store of another recipe.
        RuntimeError: when the output cannot be written, or the audit finds a gap.
    """
    clock = _Clock()
    retries = storage.num_retries()
    config = _absolute(config)
    storage.ensure_writable(config.feature_store)
    if config.decode.backend != "pyav":  # decoding children have no log
        logger.info(
            "decode.backend %s takes whole local files that it shows as they are; pyav takes all others",
            config.decode.backend,
        )
    encoder = FrameEncoder(config.encoder)
    recipe = make_recipe(encoder, config)
    digest = create_store(config.feature_store, recipe)
    num_removed = remove_uncommitted(config.feature_store)
    if num_removed:
        logger.info("removed %d files that an earlier run had not committed", num_removed)
    fuse = ConsecutiveFailureLimit(config.execution.max_consecutive_failures)
    finished = finished_segments(config.feature_store, config.errors_to_retry)
    plan = write_plan(config.feature_store, _guarded(plan_tables(config, digest), fuse), finished)
    logger.info(
        "%d media: %d segments planned, %d to do, %d media rejected by their headers",
        *(plan.num_media, len(plan.segments), len(plan.missing), plan.counts.errors.total()),
    )
    clock.lap("plan")
    spec = worker_spec(config, encoder, digest)
    del encoder  # the workers have their own
    outcomes = _run(plan, spec, config.execution, run) if plan.missing else []
    if outcomes:
        clock.lap("start_up", until=min(outcome.started for outcome in outcomes))
        clock.lap("run", until=max(outcome.ended for outcome in outcomes))
    return _finalize(config, plan, outcomes, clock, retries)


def make_recipe(encoder: FrameEncoder, config: PreprocessConfig) -> dict[str, Any]:
    """Everything that decides the features' values, as JSON."""
    is_whole = config.sampling.frame_selection == "all"
    rule = "last frame with PTS <= t" if is_whole else "last keyframe with t - 1 / fps < PTS <= t, if any"
    sampling = {"fps": config.sampling.fps, "rule": rule, "backend": config.decode.backend}
    return {**encoder.recipe, "sampling": sampling}


def plan_tables(config: PreprocessConfig, digest: str) -> Iterator[pa.Table]:
    """PLAN tables of the whole input, as they are made: on the cluster when connected to one, else in this process."""
    spec = PlanSpec(
        fps=exact(config.sampling.fps),
        recipe_hash=digest,
        limits=config.limits,
        hash_mode=config.hash,
        decode=config.decode,
    )
    plan_pages: PlanPages = plan_on_ray if has_cluster() else plan_here
    return plan_pages(read_pages(config.input), spec)


def worker_spec(config: PreprocessConfig, encoder: FrameEncoder, digest: str) -> WorkerSpec:
    """What the workers of a run are told."""
    return WorkerSpec(
        store=config.feature_store,
        recipe_hash=digest,
        encoder=config.encoder,
        image_size=encoder.image_size,
        fps=exact(config.sampling.fps),
        decode=config.decode,
        limits=config.limits,
        num_threads=config.execution.num_threads,
        keyframes_only=config.sampling.frame_selection == "keyframes",
        row_group_bytes=config.execution.row_group_bytes,
    )


def run_in_process(missing: Collection[Segment], spec: WorkerSpec, execution: ExecutionConfig) -> Iterator[TaskResult]:
    """A runner without Ray, for tests and for measuring what Ray costs."""
    yield from run_here(cut_units(missing, execution.frames_per_file, num_workers=1), spec)


def _run(plan: Plan, spec: WorkerSpec, execution: ExecutionConfig, run: Runner) -> list[TaskResult]:
    progress = Progress(len(plan.missing), plan.counts.frames_missing, execution.progress_seconds)
    fuse = ConsecutiveFailureLimit(execution.max_consecutive_failures)
    with progress:
        for outcome in run(plan.missing, spec, execution):
            progress.add(outcome)
            fuse.add(outcome.media, outcome.reasons, message=outcome.last_error)
    return progress.outcomes


def _guarded(tables: Iterable[pa.Table], fuse: ConsecutiveFailureLimit) -> Iterator[pa.Table]:
    """PLAN tables as they pass, until their headers reject too many media in a row for one reason.

    What a downloader could not get says nothing of this run, and its lists of such rows have no others between them.
    """
    for table in tables:
        columns = (table[name].to_pylist() for name in ("media_id", "status", "error_stage", "error_type"))
        tried = [row for row in zip(*columns, strict=True) if row[2] != "download"]
        reasons = [f"{stage}/{kind}" if status == "error" else "" for _, status, stage, kind in tried]
        fuse.add([media_id for media_id, *_ in tried], reasons)
        yield table


def _finalize(
    config: PreprocessConfig, plan: Plan, outcomes: Sequence[TaskResult], clock: _Clock, retries_before: int
) -> PreprocessReport:
    """Index, rejects, audit and report of a run.

    Args:
        config: the run's.
        plan: what was planned.
        outcomes: of this run's units.
        clock: running since the start.
        retries_before: this process's count when the run began.
    """
    totals = finalize_store(config.feature_store, plan.tables())
    counts = totals.counts()
    clock.lap("finalize")
    elsewhere = sum(o.retries for o in outcomes if o.worker != process_name())
    report = PreprocessReport(
        media=plan.num_media,
        segments=len(plan.segments),
        segments_done=counts["ok"],
        segments_partial=counts["partial"],
        segments_error=counts["error"],
        segments_encoded=sum(o.num_ok + o.num_partial + o.num_error for o in outcomes),
        frames=totals.frames,
        frames_encoded=sum(o.num_frames for o in outcomes),
        errors=totals.rejected_media,
        errors_by_stage=totals.errors_by_stage(),
        frames_per_second=round(reporting.steady_rate(outcomes), 2) if outcomes else _last_rate(config.feature_store),
        bytes=totals.bytes,
        seconds=clock.seconds,
        stage_seconds={
            "decode": round(sum(o.decode_seconds for o in outcomes), 2),
            "encode": round(sum(o.encode_seconds for o in outcomes), 2),
            "write": round(sum(o.write_seconds for o in outcomes), 2),
        },
        **asdict(reporting.measure_speed(outcomes, num_cores=num_cores(), has_gpu=config.encoder.device != "cpu")),
        retries=storage.num_retries() - retries_before + elsewhere,
        audit=counts,
    )
    storage.write_json(storage.join_uri(config.feature_store, REPORT_FILE), report.to_json())
    if counts["missing"] or counts["duplicate"]:
        raise RuntimeError(f"{config.feature_store}: the audit found {counts}; run the job again, and report this")
    return report


def _last_rate(store: str) -> float:
    """Frames a second of the last run that encoded; 0 before a first one."""
    uri = storage.join_uri(store, REPORT_FILE)
    return float(storage.read_json(uri)["frames_per_second"]) if storage.exists(uri) else 0.0


def _absolute(config: PreprocessConfig) -> PreprocessConfig:
    """With local paths that mean the same in every worker's folder."""

    def resolve(uri: str) -> str:
        return storage.split_uri(uri)[1] if storage.is_local(uri) else uri

    encoder = config.encoder.with_names(lambda name: str(Path(name).resolve()) if Path(name).is_dir() else name)
    return replace(config, input=resolve(config.input), feature_store=resolve(config.feature_store), encoder=encoder)


class _Clock:
    """Wall time by name, one after the other."""

    def __init__(self) -> None:
        self._begin = self._last = time.time()
        self._seconds: dict[str, float] = {}

    def lap(self, name: str, *, until: float | None = None) -> None:
        """The time since the last lap, up to now or to an earlier moment."""
        now = time.time() if until is None else until
        self._seconds[name] = round(max(0.0, now - self._last), 2)
        self._last = now

    @property
    def seconds(self) -> dict[str, float]:
        return {**self._seconds, "total": round(self._last - self._begin, 2)}
