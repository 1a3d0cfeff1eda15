"""How fast this machine decodes and encodes a few real segments: what an estimate of a run's time is made from.

Knows which segments to try and what a frame costs in each step, in one process with the run's own steps. Does not know
Ray: what other processes do to each other's speed is not in it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from timeviper_platform.data.encode import FrameEncoder
from timeviper_platform.data.segments import Segment, segments_of
from timeviper_platform.data.steps import SegmentDecoder, SegmentEncoder, WorkerSpec

MAX_SEGMENTS = 6
MAX_SECONDS = 20.0
"""After this no further segment is begun."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Seconds a frame of one process, measured."""

    segments: int
    """that were decoded and encoded; those in error are not counted"""
    frames: int
    decode_seconds: float
    encode_seconds: float

    def seconds(self, frames: int, decode_slots: int, encode_slots: int, *, is_fused: bool) -> float:
        """What `frames` take: the slower step alone where the steps have their own workers, else their sum."""
        decode = self.decode_seconds / decode_slots
        encode = self.encode_seconds / encode_slots
        return frames / self.frames * (decode + encode if is_fused else max(decode, encode))


class SegmentSample:
    """A few segments out of all that go by: those with the smallest ids, which are hashes, so any is as likely."""

    def __init__(self, size: int = MAX_SEGMENTS) -> None:
        self._size = size
        self._rows: pa.Table | None = None

    def add(self, segments: pa.Table) -> None:
        """Takes PLAN rows of segments."""
        few = segments.take(pc.select_k_unstable(segments, self._size, [("segment_id", "ascending")]))
        rows = few if self._rows is None else pa.concat_tables([self._rows, few])
        self._rows = rows.sort_by("segment_id").slice(0, self._size)

    @property
    def segments(self) -> list[Segment]:
        """At most `size`."""
        return [] if self._rows is None else segments_of(self._rows)


def calibrate(segments: Sequence[Segment], spec: WorkerSpec, encoder: FrameEncoder) -> Calibration | None:
    """Decodes and encodes the segments one after the other; None when not one frame decodes.

    The first is done twice and counted once: what only a first time costs (libraries, memory) is no frame's cost.
    """
    decoder, rows = SegmentDecoder(spec), SegmentEncoder(encoder, spec.fps)
    num_segments = num_frames = 0
    decode_seconds = encode_seconds = 0.0
    began = time.perf_counter()
    for number, segment in enumerate([*segments[:1], *segments]):
        if number > 1 and time.perf_counter() - began > MAX_SECONDS:
            break
        (row,) = rows.rows([decoder.decode(segment)])
        if number and row["num_frames"]:
            num_segments += 1
            num_frames += row["num_frames"]
            decode_seconds += row["decode_ms"] / 1e3
            encode_seconds += row["encode_ms"] / 1e3
    if not num_frames:
        return None
    return Calibration(
        segments=num_segments, frames=num_frames, decode_seconds=decode_seconds, encode_seconds=encode_seconds
    )
