"""Media items to the sampling plan: headers to rows of at most 64 sampled frames, and rows to units of work.

Knows identities, versions and counts. Decodes nothing and knows no Ray. Equal input gives equal ids, whatever ran
before: that is what makes the job one that can be run again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from timeviper_platform import storage
from timeviper_platform.data.decode import count_samples, sample_times
from timeviper_platform.data.manifest import MediaItem
from timeviper_platform.data.media import DecodeError, ErrorType, MediaLimits, Modality, reading
from timeviper_platform.data.probe import probe_media, sha256_of
from timeviper_platform.schemas import PLAN

SEGMENT_SAMPLES = 64
"""28 MB of frames at 384 x 384: what a worker holds at once, whatever the video's length."""

UNITS_PER_WORKER = 8
MAX_UNIT_SEGMENTS = 4096

PROBE_THREADS = 16
"""Probing waits for disks and object stores."""


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
    first_sample: int
    num_samples: int

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Segment:
        """The segment of a PLAN row."""
        return cls(**{field.name: row[field.name] for field in fields(cls)})

    def times(self, fps: Fraction) -> list[Fraction]:
        """t of every sample."""
        return sample_times(exact(self.grid_start_seconds), fps, self.first_sample, self.num_samples)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanError:
    """A medium whose headers say that it cannot be preprocessed."""

    media_id: str
    uri: str
    error_stage: str
    error_type: str
    error_message: str


@dataclass(frozen=True, slots=True)
class Unit:
    """Consecutive segments that become one data file."""

    name: str
    """derived from the segment ids: the same segments have the same file"""
    segments: tuple[Segment, ...]

    @property
    def num_samples(self) -> int:
        """Frames to decode."""
        return sum(segment.num_samples for segment in self.segments)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """Which frames are taken."""

    fps: float = 1.0
    """samples a second; sample k lies at start + k / fps and shows the frame on screen then"""

    def __post_init__(self) -> None:
        if not 0 < self.fps <= 240:
            raise ValueError(f"{self.fps = } must be above 0 and at most 240")


def exact(seconds: float) -> Fraction:
    """The decimal number that the float stands for: 0.1 is 1/10."""
    return Fraction(repr(float(seconds)))


def plan_media(
    items: Sequence[MediaItem],
    *,
    fps: Fraction,
    recipe_hash: str,
    limits: MediaLimits,
    hash_mode: Literal["none", "sha256"] = "none",
) -> Iterator[list[Segment] | PlanError]:
    """For each medium, in order, its segments, or what is wrong with it. Reads headers alone (and hashes if asked)."""

    def plan(item: MediaItem) -> list[Segment] | PlanError:
        try:
            return plan_item(item, fps=fps, recipe_hash=recipe_hash, limits=limits, hash_mode=hash_mode)
        except DecodeError as error:
            return PlanError(
                media_id=item.media_id,
                uri=item.uri,
                error_stage=error.stage,
                error_type=error.error_type,
                error_message=error.message,
            )

    with ThreadPoolExecutor(PROBE_THREADS) as pool:
        yield from pool.map(plan, items)


def plan_item(
    item: MediaItem, *, fps: Fraction, recipe_hash: str, limits: MediaLimits, hash_mode: Literal["none", "sha256"]
) -> list[Segment]:
    """The segments of one medium.

    Raises:
        DecodeError: when its headers say that it cannot be preprocessed.
    """
    size, etag, version = _version(item.uri)
    probe = probe_media(item.uri, limits)
    sha256 = sha256_of(item.uri) if hash_mode == "sha256" else None
    start = exact(item.start_seconds or 0.0)
    end = probe.end_seconds if item.end_seconds is None else min(probe.end_seconds, exact(item.end_seconds))
    count = 1 if probe.modality == "image" else count_samples(start, end, fps)
    _check_count(item, count, probe.end_seconds, limits)
    version = sha256 or version
    if item.start_seconds is not None or item.end_seconds is not None:
        version += f"#t={item.start_seconds},{item.end_seconds}"
    num_segments = -(-count // SEGMENT_SAMPLES)
    return [
        Segment(
            segment_id=segment_id(item.media_id, version, recipe_hash, index),
            media_id=item.media_id,
            source_version=version,
            segment_index=index,
            num_segments=num_segments,
            uri=item.uri,
            size=size,
            etag=etag,
            sha256=sha256,
            modality=probe.modality,
            duration_seconds=float(probe.end_seconds),
            source_fps=probe.source_fps,
            width=probe.width,
            height=probe.height,
            codec=probe.codec,
            grid_start_seconds=float(start),
            first_sample=index * SEGMENT_SAMPLES,
            num_samples=min(SEGMENT_SAMPLES, count - index * SEGMENT_SAMPLES),
        )
        for index in range(num_segments)
    ]


def segment_id(media_id: str, source_version: str, recipe_hash: str, segment_index: int) -> str:
    """32 hex digits that name a segment of one version of one medium under one recipe."""
    return hashlib.sha256(f"{media_id}/{source_version}/{recipe_hash}/{segment_index}".encode()).hexdigest()[:32]


def cut_units(segments: Sequence[Segment], frames_per_file: int, num_workers: int) -> list[Unit]:
    """Segments in order, cut into units of at most `frames_per_file` frames but never fewer than one segment.

    Small inputs are cut finer, so that every worker has work until near the end.
    """
    total = sum(segment.num_samples for segment in segments)
    share = -(-total // (UNITS_PER_WORKER * num_workers))
    return list(_cut(segments, min(frames_per_file, max(SEGMENT_SAMPLES, share))))


def _cut(segments: Iterable[Segment], frames_per_unit: int) -> Iterator[Unit]:
    group: list[Segment] = []
    num_frames = 0
    for segment in segments:
        if group and (num_frames + segment.num_samples > frames_per_unit or len(group) == MAX_UNIT_SEGMENTS):
            yield _unit(group)
            group, num_frames = [], 0
        group.append(segment)
        num_frames += segment.num_samples
    if group:
        yield _unit(group)


def plan_table(planned: Iterable[list[Segment] | PlanError]) -> pa.Table:
    """PLAN rows: one a segment, and one for each medium in error."""
    rows: list[dict[str, Any]] = []
    for entry in planned:
        if isinstance(entry, PlanError):
            rows.append({"segment_id": "", "source_version": "", "status": "error", **asdict(entry)})
        else:
            rows += [{**asdict(segment), "status": "planned"} for segment in entry]
    return pa.Table.from_pylist(rows, schema=PLAN)


def _unit(group: Sequence[Segment]) -> Unit:
    name = hashlib.sha256("".join(segment.segment_id for segment in group).encode()).hexdigest()[:32]
    return Unit(name, tuple(group))


def _version(uri: str) -> tuple[int, str | None, str]:
    """Size, etag, and what tells this content from a later one under the same name."""
    with reading("probe", uri):
        filesystem, path = storage.split_uri(uri)
        if storage.is_local(uri):
            stat = Path(path).stat()
            return stat.st_size, None, f"{stat.st_size}-{stat.st_mtime_ns}"
        info = filesystem.info(path)
        size = int(info.get("size") or 0)
        etag = str(info.get("ETag") or info.get("etag") or "").strip('"') or None
        return size, etag, etag or f"{size}-{info.get('LastModified') or info.get('created')}"


def _check_count(item: MediaItem, count: int, end: Fraction, limits: MediaLimits) -> None:
    if count == 0:
        message = f"{item.uri}: no sample lies in {item.start_seconds}..{item.end_seconds} of {float(end)} s"
        raise DecodeError("probe", ErrorType.EMPTY_RANGE, message)
    if count > limits.max_samples:
        message = (
            f"{item.uri}: {count} samples are past {limits.max_samples = }; raise it if the header tells the truth"
        )
        raise DecodeError("probe", ErrorType.TOO_MANY_FRAMES, message)
