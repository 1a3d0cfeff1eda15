"""The whole job: media -> plan -> decode, encode, write -> index, audit, rejects, report."""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa

from timeviper_platform.common import storage
from timeviper_platform.common.cluster_checks import StorageProof, check_every_node, refuse_lost_outputs, storage_proof
from timeviper_platform.common.lease import hold_lease
from timeviper_platform.common.ray_cluster import connect, has_cluster
from timeviper_platform.data.encode.frame_encoder import EncoderDescription, describe_encoder
from timeviper_platform.data.inputs.readers import origin_of, read_pages
from timeviper_platform.data.media.http_file import is_web
from timeviper_platform.data.media.medium import exact
from timeviper_platform.data.plan.segments import PlanSpec, Segment
from timeviper_platform.data.plan.stored_plan import Plan, finished_segments, plan_here, write_plan
from timeviper_platform.data.preprocess.config import ExecutionConfig, PreprocessConfig
from timeviper_platform.data.preprocess.failures import ConsecutiveFailureLimit
from timeviper_platform.data.preprocess.finalize import finalize_store
from timeviper_platform.data.preprocess.progress import Progress, report_plan
from timeviper_platform.data.preprocess.ray_graph import Nodes, plan_on_ray, run_on_ray
from timeviper_platform.data.preprocess.report import PreprocessReport, RunTotals, measure_speed, steady_rate
from timeviper_platform.data.preprocess.tasks import TaskResult, cut_tasks
from timeviper_platform.data.preprocess.worker import WorkerSpec, run_here
from timeviper_platform.data.store.writer import StoreWriter

logger = logging.getLogger(__name__)

REPORT_FILE = "report.json"

Runner = Callable[[Collection[Segment], WorkerSpec, ExecutionConfig], Iterator[TaskResult]]
"""Type of `run_on_ray` and `run_in_process`."""


def run_preprocess(config: PreprocessConfig, *, run: Runner = run_on_ray) -> PreprocessReport:
    """Adds the missing segments of `config.input` to the feature store; calls `run` if there are any.

    Raises:
        ValueError: for a missing input or encoder, or a store with another recipe.
        LeaseHeldError: if another job writes to the store.
        RuntimeError: if the store cannot be written, or the audit finds a gap.
    """
    refuse_lost_outputs({"feature_store": config.feature_store})
    config = config.resolve_paths()
    storage.ensure_writable(config.feature_store)
    folders, inputs = {"feature_store": config.feature_store}, _checkable_input(config.input)
    with hold_lease(config.feature_store, "jobs/preprocess.py"), storage_proof(folders, inputs) as proof:
        # one connection: in a process that connects a third time, Ray exports each counter twice
        with connect() if has_cluster() else nullcontext():
            return _run(config, run, proof)


def _checkable_input(uri: str) -> dict[str, str]:
    """The file or folder that nodes must see; empty if it is missing here, because reading it gives a better error."""
    root = uri if not any(mark in uri for mark in "*?[") else re.split(r"[^/]*[*?\[]", uri, maxsplit=1)[0]
    return {"input": root} if root and not is_web(uri) and storage.exists(root) else {}


def _run(config: PreprocessConfig, run: Runner, proof: StorageProof) -> PreprocessReport:
    stopwatch = _Stopwatch()
    retries_before = storage.num_retries()
    if config.decode.backend != "pyav":  # the decoding child processes have no log
        logger.info("decode.backend %s reads the local files it supports; pyav reads the rest", config.decode.backend)
    encoder = describe_encoder(config.encoder)
    if has_cluster():
        logger.info("%d nodes see the feature store and the input", check_every_node(proof))
    store = StoreWriter.create(config.feature_store, make_recipe(encoder, config))
    if num_removed := store.remove_uncommitted():
        logger.info("removed %d files that an earlier run had not committed", num_removed)
    left_out = Counter[str]()
    plan = _plan(config, store.recipe_hash, left_out)
    stopwatch.lap("plan")
    spec = replace(worker_spec(config, encoder, store.recipe_hash), proof=proof)
    done = _process(plan, spec, config, run) if plan.missing else RunTotals()
    if done:
        started, ended, _ = done.spans()
        stopwatch.lap("start_up", until=float(started.min()))
        stopwatch.lap("run", until=float(ended.max()))
    return _finalize(config, plan, done, stopwatch, retries_before, left_out)


def make_recipe(encoder: EncoderDescription, config: PreprocessConfig) -> dict[str, Any]:
    """Everything that determines the features' values."""
    is_whole = config.sampling.frame_selection == "all"
    rule = "last frame with PTS <= t" if is_whole else "last keyframe with t - 1 / fps < PTS <= t, if any"
    sampling = {"fps": config.sampling.fps, "rule": rule, "backend": config.decode.backend}
    if config.sampling.min_frames is not None:
        sampling["min_frames"] = config.sampling.min_frames
    return {**encoder.recipe, "sampling": sampling}


def plan_tables(config: PreprocessConfig, recipe_hash: str, left_out: Counter[str] | None = None) -> Iterator[pa.Table]:
    """Plans the input on the connected cluster or else in this process. See `read_pages` for `left_out`."""
    spec = PlanSpec(
        fps=exact(config.sampling.fps),
        recipe_hash=recipe_hash,
        limits=config.limits,
        hash_mode=config.hash,
        decode=config.decode,
        min_frames=config.sampling.min_frames,
    )
    media = read_pages(config.input, bytes_column=config.bytes_column, left_out=left_out)
    return (plan_on_ray if has_cluster() else plan_here)(media, spec)


def worker_spec(config: PreprocessConfig, encoder: EncoderDescription, recipe_hash: str) -> WorkerSpec:
    return WorkerSpec(
        feature_store=config.feature_store,
        recipe_hash=recipe_hash,
        encoder=config.encoder,
        encoder_recipe=encoder.recipe,
        image_size=encoder.image_size,
        resample=encoder.resample,
        fps=exact(config.sampling.fps),
        decode=config.decode,
        limits=config.limits,
        num_threads=config.execution.num_threads,
        keyframes_only=config.sampling.frame_selection == "keyframes",
        row_group_bytes=config.execution.row_group_bytes,
    )


def run_in_process(missing: Collection[Segment], spec: WorkerSpec, execution: ExecutionConfig) -> Iterator[TaskResult]:
    """A `Runner` without Ray, for tests and for measuring Ray's overhead."""
    yield from run_here(cut_tasks(missing, execution.frames_per_file, num_workers=1), spec)


def last_rate(feature_store: str) -> float:
    """Frames per second of the last run that encoded frames, or 0."""
    uri = storage.join_uri(feature_store, REPORT_FILE)
    try:
        return float((storage.read_json_or_none(uri) or {"frames_per_second": 0.0})["frames_per_second"])
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged (%s) and left out of the estimate", storage.shown_uri(uri), error)
        return 0.0


def _plan(config: PreprocessConfig, recipe_hash: str, left_out: Counter[str]) -> Plan:
    failures = ConsecutiveFailureLimit(config.execution.max_consecutive_failures)
    finished = finished_segments(config.feature_store, config.errors_to_retry)
    plan = write_plan(config.feature_store, failures.check(plan_tables(config, recipe_hash, left_out)), finished)
    logger.info(
        "%d media: %d segments planned, %d missing, %d media rejected by their headers",
        *(plan.counts.media, len(plan.segments), len(plan.missing), plan.counts.errors.total()),
    )
    if has_cluster():
        report_plan(config.feature_store, plan.counts.errors)
    return plan


def _process(plan: Plan, spec: WorkerSpec, config: PreprocessConfig, run: Runner) -> RunTotals:
    execution = config.execution
    failures = ConsecutiveFailureLimit(
        execution.max_consecutive_failures,
        origin_of=lambda media_id: origin_of(media_id, config.input, config.bytes_column),
    )
    with Progress(len(plan.missing), plan.counts.frames_missing, execution.progress_seconds) as progress:
        for result in run(plan.missing, spec, execution):
            progress.add(result)
            failures.add(result.media, result.reasons, result.messages)
    return progress.totals


def _finalize(
    config: PreprocessConfig,
    plan: Plan,
    done: RunTotals,
    stopwatch: _Stopwatch,
    retries_before: int,
    left_out: Counter[str],
) -> PreprocessReport:
    max_repeated_share = config.execution.warn_repeated_share
    totals = finalize_store(config.feature_store, plan.tables(), max_repeated_share=max_repeated_share)
    media, segments, repeats = totals.audit.media, totals.audit.segments, totals.repeats
    stopwatch.lap("finalize")
    report = PreprocessReport(
        media=media,
        segments=segments,
        segments_encoded=done.segments,
        files_left_out=dict(left_out.most_common()),
        frames=totals.frames,
        frames_encoded=done.frames,
        frames_missing=totals.frames_missing,
        frames_repeated=repeats.frames,
        media_repeating=repeats.media,
        most_repeating=repeats.worst,
        errors_by_stage=totals.errors_by_stage(),
        joined_media=plan.counts.joined_media,
        joined_parts=plan.counts.joined_parts,
        frames_per_second=round(steady_rate(done), 2) if done else last_rate(config.feature_store),
        bytes=totals.bytes,
        seconds=stopwatch.seconds,
        stage_seconds={stage: round(seconds, 2) for stage, seconds in done.seconds.items()},
        **asdict(measure_speed(done, num_cores=Nodes.now().num_cpus, has_gpu=config.encoder.device != "cpu")),
        retries=storage.num_retries() - retries_before + done.retries_elsewhere,
    )
    storage.write_report(storage.join_uri(config.feature_store, REPORT_FILE), report.to_json())
    if repeats.frames > max_repeated_share * totals.frames:
        logger.warning(
            "%d of %d stored frames repeat the one before: their media show less than sampling.fps = %g pictures per"
            " second, or their clock is broken; report.json names the worst of %d media",
            *(repeats.frames, totals.frames, config.sampling.fps, repeats.media),
        )
    if segments.missing or segments.duplicate:
        raise RuntimeError(
            f"{config.feature_store}: the audit found {segments} segments; run the job again and report this bug"
        )
    return report


class _Stopwatch:
    """Wall seconds of named laps."""

    def __init__(self) -> None:
        self._begin = self._last = time.time()
        self._seconds: dict[str, float] = {}

    def lap(self, name: str, *, until: float | None = None) -> None:
        now = time.time() if until is None else until
        self._seconds[name] = round(max(0.0, now - self._last), 2)
        self._last = now

    @property
    def seconds(self) -> dict[str, float]:
        return {**self._seconds, "total": round(self._last - self._begin, 2)}
