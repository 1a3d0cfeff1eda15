"""Predicts the work and the time of a run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import pyarrow as pa

from timeviper_platform.common.ray_cluster import has_cluster
from timeviper_platform.data.encode.frame_encoder import describe_encoder
from timeviper_platform.data.encode.recipe import differences, older_recipe, recipe_hash
from timeviper_platform.data.plan.segments import Segment
from timeviper_platform.data.plan.stored_plan import PlanCounts, finished_segments, missing_rows
from timeviper_platform.data.preprocess.calibrate import Calibration, SegmentSample
from timeviper_platform.data.preprocess.config import PreprocessConfig
from timeviper_platform.data.preprocess.ray_graph import Nodes, calibrate_here, calibrate_on_ray, pool_sizes
from timeviper_platform.data.preprocess.run import last_rate, make_recipe, plan_tables, worker_spec
from timeviper_platform.data.preprocess.worker import WorkerSpec
from timeviper_platform.data.store.layout import find_header


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    media: int
    files_left_out: dict[str, int]
    """See `PreprocessReport`."""
    errors: int
    """media rejected by their headers"""
    errors_by_type: dict[str, int]
    """media by error type"""
    segments: int
    segments_missing: int
    frames_missing: int
    feature_bytes: int
    seconds: float | None
    """estimate by the calibration; None if nothing is missing or decodable"""
    seconds_at_last_rate: float | None
    """estimate by the last report; None before the first run"""
    calibration: Calibration | None


def estimate(config: PreprocessConfig) -> Estimate:
    """Writes nothing. Raises ValueError as `run_preprocess` does."""
    config = config.resolve_paths()
    encoder = describe_encoder(config.encoder)
    recipe = make_recipe(encoder, config)
    header = find_header(config.feature_store)
    if header is not None and header["recipe"] != recipe:
        lines = [*differences(header["recipe"], recipe), *filter(None, [older_recipe(header["recipe"])])]
        raise ValueError("\n".join(["the feature store has another recipe:", *lines]))
    digest = recipe_hash(recipe)
    counts, sample = PlanCounts(), SegmentSample()
    finished = finished_segments(config.feature_store, config.errors_to_retry)
    left_out = Counter[str]()
    for table in plan_tables(config, digest, left_out):
        is_missing = missing_rows(table, finished)
        counts.add(table, is_missing)
        sample.add(table.filter(pa.array(is_missing)))
    segments, spec = sample.segments, worker_spec(config, encoder, digest)
    calibration = _measure(segments, spec, config) if segments else None
    frames, rate = counts.frames_missing, last_rate(config.feature_store)
    return Estimate(
        media=counts.media,
        files_left_out=dict(left_out.most_common()),
        errors=counts.errors.total(),
        errors_by_type=dict(counts.errors),
        segments=counts.segments,
        segments_missing=counts.segments_missing,
        frames_missing=frames,
        feature_bytes=frames * encoder.num_tokens_per_frame * encoder.dim * 2,
        seconds=None if calibration is None else frames / _ideal(calibration, config),
        seconds_at_last_rate=frames / rate if rate else None,
        calibration=calibration,
    )


def _measure(segments: list[Segment], spec: WorkerSpec, config: PreprocessConfig) -> Calibration | None:
    return calibrate_on_ray(segments, spec, config.execution) if has_cluster() else calibrate_here(segments, spec)


def _ideal(calibration: Calibration, config: PreprocessConfig) -> float:
    nodes = Nodes.now()
    has_gpu, mode = config.encoder.device != "cpu", config.execution.mode
    split = replace(config.execution, mode="split")
    if mode == "auto":
        slots = pool_sizes(nodes, split, calibration)
        mode = calibration.best_mode(*slots, num_cores=nodes.num_cpus, has_gpu=has_gpu)
    slots = pool_sizes(nodes, replace(config.execution, mode=mode), calibration)
    return calibration.ideal_frames_per_second(
        *slots, is_fused=mode == "fused", num_cores=nodes.num_cpus, has_gpu=has_gpu
    )
