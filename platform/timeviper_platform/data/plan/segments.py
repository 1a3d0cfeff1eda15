"""Cuts media into segments of at most 64 sampled frames, the PLAN rows.

Equal inputs give equal segment ids, so that jobs can resume. Does not import Ray.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from timeviper_platform.common.schemas import CLIP_MARK, PLAN
from timeviper_platform.data.media.container import (
    DecodeError,
    ErrorType,
    MediaLimits,
    Modality,
    check_size,
    source_name,
)
from timeviper_platform.data.media.medium import Medium, exact
from timeviper_platform.data.media.probe import LocalProbes, ProbeSource, file_version, sha256_of
from timeviper_platform.data.video.sampling import count_frames, sample_times
from timeviper_platform.data.video_worker.frame_source import DecodeConfig
from timeviper_platform.data.video_worker.isolated import IsolatedProbes

SEGMENT_FRAMES = 64
"""A worker holds one segment: 28 MB at 384 x 384."""

MAX_TABLE_ROWS = 65_536
"""Maximum rows of one PLAN table. A page of films has millions."""

READ_THREADS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """One row of the plan: up to 64 consecutive sampled frames of one medium."""

    segment_id: str
    media_id: str
    source_version: str
    segment_index: int
    num_segments: int
    uri: str
    size: int
    etag: str | None
    sha256: str | None
    modality: Modality
    duration_seconds: float
    source_fps: float
    width: int
    height: int
    codec: str
    joined_parts: int | None
    grid_start_seconds: float
    first_frame: int
    num_frames: int
    step_seconds: float | None = None
    """Time between frames; None = 1 / fps."""

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Segment:
        return cls(**{field.name: row[field.name] for field in fields(cls)})

    def times(self, fps: Fraction) -> list[Fraction]:
        return sample_times(exact(self.grid_start_seconds), self._rate(fps), self.first_frame, self.num_frames)

    def time(self, index: int, fps: Fraction) -> Fraction:
        """Returns the sampling time of frame `index`; `num_frames` gives the segment's end."""
        return exact(self.grid_start_seconds) + (self.first_frame + index) / self._rate(fps)

    def _rate(self, fps: Fraction) -> Fraction:
        return fps if self.step_seconds is None else 1 / exact(self.step_seconds)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanSpec:
    fps: Fraction
    recipe_hash: str
    limits: MediaLimits = field(default_factory=MediaLimits)
    hash_mode: Literal["none", "sha256"] = "none"
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    max_table_rows: int = MAX_TABLE_ROWS
    min_frames: int | None = None

    def probe_source(self) -> ProbeSource:
        """Returns a new reader of headers, for many pages."""
        if self.decode.isolation == "process":
            return IsolatedProbes(self.limits, self.decode)
        return LocalProbes(self.limits)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    fps: float = 1.0
    """Sampled frames per second. Frame k is the one on screen at start + k / fps."""
    frame_selection: Literal["all", "keyframes"] = "all"
    """all = the frame on screen at every sampling time; keyframes = the last keyframe of each interval, if any, at a
    fraction of the cost.
    """
    min_frames: int | None = None
    """Minimum frames of a video. One with fewer at `fps` (rounded up to a multiple of 4) is sampled at the middles of
    this many equal parts instead. 32 in the paper's evaluation; null = none. Part of the recipe."""

    def __post_init__(self) -> None:
        if not 0 < self.fps <= 240:
            raise ValueError(f"{self.fps = } must be above 0 and at most 240")
        if self.min_frames is not None and self.min_frames < 1:
            raise ValueError(f"{self.min_frames = } must be at least 1, or null")
        if self.min_frames is not None and self.frame_selection == "keyframes":
            raise ValueError(f"{self.min_frames = } samples between keyframes; set frame_selection: all")


def plan_page(media: Sequence[Medium], spec: PlanSpec, probes: ProbeSource | None = None) -> Iterator[pa.Table]:
    """Yields PLAN tables of about `spec.max_table_rows`, in the order of `media`.

    Opens no file that the manifest describes in full. `probes` None = a new reader.
    """
    if all(_needs_no_file(medium, spec) for medium in media):
        planned = [_plan_medium(medium, spec) for medium in media]
    else:
        with ThreadPoolExecutor(READ_THREADS) as pool:
            versions = list(pool.map(lambda medium: _with_version(medium, spec), media))
            probed = _with_headers(versions, spec.probe_source() if probes is None else probes)
            planned = list(pool.map(lambda medium: _plan_medium(medium, spec), probed))
    group: list[dict[str, Any]] = []
    num_rows = 0
    for columns in planned:
        group.append(columns)
        num_rows += max(1, -(-columns["num_frames"] // SEGMENT_FRAMES))
        if num_rows >= spec.max_table_rows:
            yield _table(group, spec.recipe_hash)
            group, num_rows = [], 0
    if group:
        yield _table(group, spec.recipe_hash)


def segment_id(media_id: str, source_version: str, recipe_hash: str, segment_index: int) -> str:
    """Returns 32 hex digits for a segment of one version of a medium under one recipe."""
    return hashlib.sha256(f"{media_id}/{source_version}/{recipe_hash}/{segment_index}".encode()).hexdigest()[:32]


def segments_of(table: pa.Table) -> list[Segment]:
    return [Segment.from_row(row) for row in table.filter(pc.field("status") == "planned").to_pylist()]


def _plan_medium(medium: Medium, spec: PlanSpec) -> dict[str, Any]:
    """Returns values shared by a medium's PLAN rows; `num_frames` is the total, 0 in error."""
    try:
        if medium.error is not None:
            raise medium.error
        return _sampled(medium, spec)
    except DecodeError as error:
        return {
            "media_id": medium.media_id,
            "uri": source_name(medium.uri),
            "status": "error",
            "source_version": "",
            "num_frames": 0,
            "error_stage": error.stage,
            "error_type": error.error_type,
            "error_message": f"{error.message} ({medium.origin})" if medium.origin else error.message,
        }


def _sampled(medium: Medium, spec: PlanSpec) -> dict[str, Any]:
    file = medium.version
    assert file is not None
    assert medium.modality is not None
    check_size(medium.width, medium.height, spec.limits, "probe", source_name(medium.uri))
    sha256 = medium.sha256 or (sha256_of(medium.uri, spec.limits) if spec.hash_mode == "sha256" else None)
    start, end = exact(medium.start_seconds or 0.0), medium.duration_seconds
    if medium.end_seconds is not None:
        end = min(end, exact(medium.end_seconds))
    num_frames = 1 if medium.modality == "image" else count_frames(start, end, spec.fps)
    _check_num_frames(medium, num_frames, spec.limits)
    step = None
    # the public code fills up to a multiple of 4 before it compares
    if medium.modality == "video" and spec.min_frames is not None and -(-num_frames // 4) * 4 < spec.min_frames:
        num_frames, step = spec.min_frames, (end - start) / spec.min_frames
        start += step / 2
    source_version = sha256 or file.text
    if medium.start_seconds is not None or medium.end_seconds is not None:
        source_version += f"{CLIP_MARK}{medium.start_seconds},{medium.end_seconds}"
    return {
        "media_id": medium.media_id,
        "uri": medium.uri,
        "status": "planned",
        "source_version": source_version,
        "size": file.size,
        "etag": file.etag,
        "sha256": sha256,
        "modality": medium.modality,
        "duration_seconds": float(medium.duration_seconds),
        "source_fps": medium.source_fps,
        "width": medium.width,
        "height": medium.height,
        "codec": medium.codec,
        "joined_parts": medium.joined_parts,
        "grid_start_seconds": float(start),
        "step_seconds": None if step is None else float(step),
        "num_frames": num_frames,
    }


def _check_num_frames(medium: Medium, num_frames: int, limits: MediaLimits) -> None:
    name = source_name(medium.uri)
    if num_frames == 0:
        clip = f"{medium.start_seconds}..{medium.end_seconds}"
        message = f"{name}: no sampling time lies in the clip {clip} of {float(medium.duration_seconds)} s"
        raise DecodeError("probe", ErrorType.EMPTY_RANGE, message)
    if num_frames > limits.max_frames:
        message = f"{name}: {num_frames} frames exceed {limits.max_frames = }; raise it if the duration is right"
        raise DecodeError("probe", ErrorType.TOO_MANY_FRAMES, message)


def _table(media: Sequence[dict[str, Any]], recipe_hash: str) -> pa.Table:
    """Builds rows by column, five times as fast as by row."""
    totals = np.array([medium["num_frames"] for medium in media], dtype=np.int64)
    num_segments = -(-totals // SEGMENT_FRAMES)
    num_rows = np.maximum(1, num_segments)  # a medium in error has one row
    source = np.repeat(np.arange(len(media)), num_rows)
    index = np.arange(len(source)) - np.repeat(np.cumsum(num_rows) - num_rows, num_rows)
    is_error = (totals == 0)[source]
    ids = [
        "" if error else segment_id(media[row]["media_id"], media[row]["source_version"], recipe_hash, segment_index)
        for row, segment_index, error in zip(source.tolist(), index.tolist(), is_error.tolist(), strict=True)
    ]
    per_segment = {
        "segment_index": index,
        "num_segments": num_segments[source],
        "first_frame": index * SEGMENT_FRAMES,
        "num_frames": np.minimum(SEGMENT_FRAMES, totals[source] - index * SEGMENT_FRAMES),
    }
    columns = [
        pa.array(ids, pa.string())
        if field.name == "segment_id"
        else pa.array(per_segment[field.name], field.type, mask=is_error)
        if field.name in per_segment
        else pa.array([medium.get(field.name) for medium in media], field.type).take(pa.array(source))
        for field in PLAN
    ]
    return pa.table(columns, schema=PLAN)


def _needs_no_file(medium: Medium, spec: PlanSpec) -> bool:
    is_known = medium.version is not None and medium.is_probed
    return medium.error is not None or (is_known and (spec.hash_mode == "none" or medium.sha256 is not None))


def _with_version(medium: Medium, spec: PlanSpec) -> Medium:
    if medium.error is not None or medium.version is not None:
        return medium
    try:
        return replace(medium, version=file_version(medium.uri, spec.limits))
    except DecodeError as error:
        return replace(medium, error=error)


def _with_headers(media: Sequence[Medium], probes: ProbeSource) -> list[Medium]:
    probed = list(media)
    unknown = [index for index, medium in enumerate(media) if medium.error is None and not medium.is_probed]
    for index, medium in zip(unknown, probes.probe([media[index] for index in unknown]), strict=True):
        probed[index] = medium
    return probed
