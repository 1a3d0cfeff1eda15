"""."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from timeviper_platform.data.encode.frame_encoder import FrameEncoder
from timeviper_platform.data.encode.recipe import differences, recipe_hash
from timeviper_platform.data.plan.stored_plan import (
    PlanCounts,
    finished_segments,
    missing_rows,
)
from timeviper_platform.data.preprocess.calibrate import Calibration, SegmentSample, calibrate
from timeviper_platform.data.preprocess.ray_graph import (
    num_cores,
    worker_slots,
)
from timeviper_platform.data.preprocess.run import (
    PreprocessConfig,
    _absolute,
    _last_rate,
    make_recipe,
    plan_tables,
    worker_spec,
)
from timeviper_platform.data.store.layout import read_header


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What a run would do (`--dry-run`)."""

    media: int
    errors: int
    errors_by_type: dict[str, int]
    """error type -> media"""
    segments: int
    segments_missing: int
    frames_missing: int
    feature_bytes: int
    seconds: float | None
    """by the calibration; None when there is nothing to do, or nothing to try it on decodes"""
    seconds_at_last_rate: float | None
    """by the store's last report; None before a first run"""
    calibration: Calibration | None


def estimate(config: PreprocessConfig) -> Estimate:
    """What `run_preprocess` would do; writes nothing.

    Raises:
        ValueError: see `run_preprocess`.
    """
    config = _absolute(config)
    encoder = FrameEncoder(config.encoder)
    recipe = make_recipe(encoder, config)
    header = read_header(config.feature_store)
    if header is not None and header["recipe"] != recipe:
        raise ValueError("\n".join(["the store there has another recipe:", *differences(header["recipe"], recipe)]))
    digest = recipe_hash(recipe)
    counts, sample = PlanCounts(), SegmentSample()
    finished = finished_segments(config.feature_store, config.errors_to_retry)
    for table in plan_tables(config, digest):
        is_missing = missing_rows(table, finished)
        counts.add(table, is_missing)
        sample.add(table.filter(pa.array(is_missing)))
    frames = counts.frames_missing
    rate = _last_rate(config.feature_store)
    calibration = calibrate(sample.segments, worker_spec(config, encoder, digest), encoder)
    ideal = None if calibration is None else _ideal(calibration, config)
    return Estimate(
        media=counts.media,
        errors=counts.errors.total(),
        errors_by_type=dict(counts.errors),
        segments=counts.segments,
        segments_missing=counts.segments_missing,
        frames_missing=frames,
        feature_bytes=frames * encoder.num_tokens_per_frame * encoder.dim * 2,
        seconds=None if ideal is None else frames / ideal,
        seconds_at_last_rate=frames / rate if rate else None,
        calibration=calibration,
    )


def _ideal(calibration: Calibration, config: PreprocessConfig) -> float:
    """Frames a second that the configured workers could do at these costs."""
    slots, cores = worker_slots(config.execution), num_cores()
    has_gpu, mode = config.encoder.device != "cpu", config.execution.mode
    if mode == "auto":
        mode = calibration.best_mode(*slots, num_cores=cores, has_gpu=has_gpu)
    return calibration.ideal_frames_per_second(*slots, is_fused=mode == "fused", num_cores=cores, has_gpu=has_gpu)
