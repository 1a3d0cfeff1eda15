"""Media items to the sampling plan: headers to rows of at most 64 sampled frames, and rows to units of work.

Knows identities, versions and counts; has headers read where it may crash or hang (isolation.py). Decodes nothing and
knows no Ray. Equal input gives equal ids, whatever ran before: that is what makes the job one that can be run again.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from timeviper_platform.common.schemas import CLIP_MARK, PLAN
from timeviper_platform.data.media.container import DecodeError, ErrorType, MediaLimits, Modality, source_name
from timeviper_platform.data.media.medium import Medium
from timeviper_platform.data.media.probe import LocalProbes, ProbeSource, file_version, sha256_of
from timeviper_platform.data.video.frames import check_size
from timeviper_platform.data.video.sampling import count_frames, sample_times
from timeviper_platform.data.video_worker.frame_source import DecodeConfig
from timeviper_platform.data.video_worker.isolated import IsolatedProbes

SEGMENT_FRAMES = 64
"""28 MB of frames at 384 x 384: what a worker holds at once, whatever the video's length."""

UNITS_PER_WORKER = 8
MAX_UNIT_SEGMENTS = 4096

MAX_TABLE_ROWS = 65_536
"""Of a plan's table: a page of films would have millions."""

READ_THREADS = 16
"""Asking for a file's version and hashing it wait for disks and object stores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """One PLAN row without its outcome."""

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
    grid_start_seconds: float
    first_frame: int
    num_frames: int

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Segment:
        """The segment of a PLAN row."""
        return cls(**{field.name: row[field.name] for field in fields(cls)})

    def times(self, fps: Fraction) -> list[Fraction]:
        """t of every sample."""
        return sample_times(exact(self.grid_start_seconds), fps, self.first_frame, self.num_frames)

    def time(self, number: int, fps: Fraction) -> Fraction:
        """t of sample `number` of the segment, from 0; that of `num_frames` is its end."""
        return exact(self.grid_start_seconds) + (self.first_frame + number) / fps


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanError:
    """A medium whose headers say that it cannot be preprocessed."""

    media_id: str
    uri: str
    error_stage: str
    error_type: str
    error_message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanSpec:
    """How media become segments; all that whoever probes is told."""

    fps: Fraction
    recipe_hash: str
    limits: MediaLimits = field(default_factory=MediaLimits)
    hash_mode: Literal["none", "sha256"] = "none"
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    """where headers are read, and what that may take"""

    def probe_source(self) -> ProbeSource:
        """Reads headers; whoever plans many pages keeps one."""
        if self.decode.isolation == "process":
            return IsolatedProbes(self.limits, self.decode)
        return LocalProbes(self.limits)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedMedium:
    """What the PLAN rows of one medium share; num_frames is that of all of them, 0 for a medium in error."""

    media_id: str
    uri: str
    status: Literal["planned", "error"]
    source_version: str = ""
    size: int | None = None
    etag: str | None = None
    sha256: str | None = None
    modality: Modality | None = None
    duration_seconds: float | None = None
    source_fps: float | None = None
    width: int | None = None
    height: int | None = None
    codec: str | None = None
    grid_start_seconds: float | None = None
    num_frames: int = 0
    error_stage: str | None = None
    error_type: str | None = None
    error_message: str | None = None

    @property
    def num_rows(self) -> int:
        """PLAN rows of this medium."""
        return max(1, -(-self.num_frames // SEGMENT_FRAMES))


@dataclass(frozen=True, slots=True)
class WriteTask:
    """Consecutive segments that become one data file."""

    name: str
    """derived from the segment ids: the same segments have the same file"""
    segments: tuple[Segment, ...]

    @property
    def num_frames(self) -> int:
        """Frames to decode."""
        return sum(segment.num_frames for segment in self.segments)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """Which frames are taken."""

    fps: float = 1.0
    """samples a second; sample k lies at start + k / fps and shows the frame on screen then"""
    frame_selection: Literal["all", "keyframes"] = "all"
    """keyframes = a sample shows the last keyframe since the one before it, and is left out where there is none: a
    small part of the work, for a first look at many hours"""

    def __post_init__(self) -> None:
        if not 0 < self.fps <= 240:
            raise ValueError(f"{self.fps = } must be above 0 and at most 240")


@functools.lru_cache(maxsize=1024)  # most are 0, and reading a decimal takes longer than all else of an image's row
def exact(seconds: float) -> Fraction:
    """The decimal number that the float stands for: 0.1 is 1/10."""
    return Fraction(repr(float(seconds)))


def plan_page(items: Sequence[Medium], spec: PlanSpec, probes: ProbeSource | None = None) -> Iterator[pa.Table]:
    """PLAN rows of the items, in order, in tables of about MAX_TABLE_ROWS: the segments of each medium, or one row that
    says what is wrong with it.

    Reads headers alone (and hashes if asked), and nothing where the manifest says it all.

    Args:
        items: in the order of their rows.
        spec: how media become segments.
        probes: what reads headers; None = of this page's own.
    """
    if all(_is_told(item, spec) for item in items):
        planned = [_planned(item, spec) for item in items]
    else:
        with ThreadPoolExecutor(READ_THREADS) as pool:
            versions = list(pool.map(lambda item: _with_version(item, spec), items))
            known = _with_probes(versions, spec.probe_source() if probes is None else probes)
            planned = list(pool.map(lambda item: _planned(item, spec), known))
    group: list[PlannedMedium] = []
    num_rows = 0
    for medium in planned:
        group.append(medium)
        num_rows += medium.num_rows
        if num_rows >= MAX_TABLE_ROWS:
            yield _table(group, spec.recipe_hash)
            group, num_rows = [], 0
    if group:
        yield _table(group, spec.recipe_hash)


def plan_item(item: Medium, spec: PlanSpec) -> PlannedMedium:
    """What is to be sampled of one medium, whose version and probe are known unless it is rejected.

    Raises:
        DecodeError: when its source or its headers say that it cannot be preprocessed.
    """
    if item.error is not None:
        raise item.error
    file = item.version
    assert file is not None
    assert item.modality is not None
    check_size(item.width, item.height, spec.limits, "probe", source_name(item.uri))
    sha256 = item.sha256 or (sha256_of(item.uri, spec.limits) if spec.hash_mode == "sha256" else None)
    start = exact(item.start_seconds or 0.0)
    end = item.duration_seconds if item.end_seconds is None else min(item.duration_seconds, exact(item.end_seconds))
    count = 1 if item.modality == "image" else count_frames(start, end, spec.fps)
    _check_count(item, count, item.duration_seconds, spec.limits)
    version = sha256 or file.text
    if item.start_seconds is not None or item.end_seconds is not None:
        version += f"{CLIP_MARK}{item.start_seconds},{item.end_seconds}"
    return PlannedMedium(
        media_id=item.media_id,
        uri=item.uri,
        status="planned",
        source_version=version,
        size=file.size,
        etag=file.etag,
        sha256=sha256,
        modality=item.modality,
        duration_seconds=float(item.duration_seconds),
        source_fps=item.source_fps,
        width=item.width,
        height=item.height,
        codec=item.codec,
        grid_start_seconds=float(start),
        num_frames=count,
    )


def segment_id(media_id: str, source_version: str, recipe_hash: str, segment_index: int) -> str:
    """32 hex digits that name a segment of one version of one medium under one recipe."""
    return hashlib.sha256(f"{media_id}/{source_version}/{recipe_hash}/{segment_index}".encode()).hexdigest()[:32]


def cut_units(segments: Collection[Segment], frames_per_file: int, num_workers: int) -> list[WriteTask]:
    """Segments in order, cut into units of at most `frames_per_file` frames but never fewer than one segment.

    Small inputs are cut finer, so that every worker has work until near the end.
    """
    return list(iter_units(segments, frames_per_file, num_workers))


def iter_units(segments: Collection[Segment], frames_per_file: int, num_workers: int) -> Iterator[WriteTask]:
    """`cut_units` one at a time; reads the segments twice."""
    total = sum(segment.num_frames for segment in segments)
    share = -(-total // (UNITS_PER_WORKER * num_workers))
    return _cut(segments, min(frames_per_file, max(SEGMENT_FRAMES, share)))


def _cut(segments: Iterable[Segment], frames_per_unit: int) -> Iterator[WriteTask]:
    group: list[Segment] = []
    num_frames = 0
    for segment in segments:
        if group and (num_frames + segment.num_frames > frames_per_unit or len(group) == MAX_UNIT_SEGMENTS):
            yield _unit(group)
            group, num_frames = [], 0
        group.append(segment)
        num_frames += segment.num_frames
    if group:
        yield _unit(group)


def segments_of(table: pa.Table) -> list[Segment]:
    """The segments among PLAN rows."""
    return [Segment.from_row(row) for row in table.filter(pc.field("status") == "planned").to_pylist()]


def errors_of(table: pa.Table) -> list[PlanError]:
    """The media in error among PLAN rows."""
    names = [field.name for field in fields(PlanError)]
    return [PlanError(**row) for row in table.filter(pc.field("status") == "error").select(names).to_pylist()]


def _table(media: Sequence[PlannedMedium], recipe_hash: str) -> pa.Table:
    """PLAN rows, column by column: a row at a time costs five times as much."""
    samples = np.array([medium.num_frames for medium in media], dtype=np.int64)
    num_segments = -(-samples // SEGMENT_FRAMES)
    num_rows = np.maximum(1, num_segments)  # a medium in error has a row too
    source = np.repeat(np.arange(len(media)), num_rows)
    index = np.arange(len(source)) - np.repeat(np.cumsum(num_rows) - num_rows, num_rows)
    is_error = (samples == 0)[source]
    ids = [
        "" if error else segment_id(media[number].media_id, media[number].source_version, recipe_hash, place)
        for number, place, error in zip(source.tolist(), index.tolist(), is_error.tolist(), strict=True)
    ]
    counted = {
        "segment_index": index,
        "num_segments": num_segments[source],
        "first_frame": index * SEGMENT_FRAMES,
        "num_frames": np.minimum(SEGMENT_FRAMES, samples[source] - index * SEGMENT_FRAMES),
    }
    columns = [
        pa.array(ids, pa.string())
        if field.name == "segment_id"
        else pa.array(counted[field.name], field.type, mask=is_error)
        if field.name in counted
        else pa.array([getattr(medium, field.name) for medium in media], field.type).take(pa.array(source))
        for field in PLAN
    ]
    return pa.table(columns, schema=PLAN)


def _is_told(item: Medium, spec: PlanSpec) -> bool:
    """True when planning the item needs no file."""
    known = item.version is not None and item.is_probed
    return item.error is not None or (known and (spec.hash_mode == "none" or item.sha256 is not None))


def _with_version(item: Medium, spec: PlanSpec) -> Medium:
    """The item with its file's version, asked for where nobody told it."""
    if item.error is not None or item.version is not None:
        return item
    try:
        return replace(item, version=file_version(item.uri, spec.limits))
    except DecodeError as error:
        return replace(item, error=error)


def _with_probes(items: Sequence[Medium], probes: ProbeSource) -> list[Medium]:
    """The items with what their headers say, read where nobody told it."""
    known = list(items)
    places = [place for place, item in enumerate(items) if item.error is None and not item.is_probed]
    for place, item in zip(places, probes.probe([items[place] for place in places]), strict=True):
        known[place] = item
    return known


def _planned(item: Medium, spec: PlanSpec) -> PlannedMedium:
    """What became of an item that is known now, or in error."""
    try:
        return plan_item(item, spec)
    except DecodeError as error:
        return PlannedMedium(
            media_id=item.media_id,
            uri=source_name(item.uri),
            status="error",
            error_stage=error.stage,
            error_type=error.error_type,
            error_message=error.message,
        )


def _unit(group: Sequence[Segment]) -> WriteTask:
    name = hashlib.sha256("".join(segment.segment_id for segment in group).encode()).hexdigest()[:32]
    return WriteTask(name, tuple(group))


def _check_count(item: Medium, count: int, end: Fraction, limits: MediaLimits) -> None:
    if count == 0:
        message = (
            f"{source_name(item.uri)}: no sample lies in {item.start_seconds}..{item.end_seconds} of {float(end)} s"
        )
        raise DecodeError("probe", ErrorType.EMPTY_RANGE, message)
    if count > limits.max_frames:
        name = source_name(item.uri)
        message = f"{name}: {count} samples are past {limits.max_frames = }; raise it if the header tells the truth"
        raise DecodeError("probe", ErrorType.TOO_MANY_FRAMES, message)
