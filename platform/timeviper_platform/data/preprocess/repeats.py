"""Counts stored frames that repeat the one before: slides, screen recordings, or a source whose clock is broken."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

NUM_NAMED = 5
"""Media that the report names."""


@dataclass(frozen=True, order=True, slots=True)
class RepeatingMedium:
    repeated: int
    """stored frames with the PTS of the one before"""
    frames: int
    """stored frames"""
    media_id: str
    uri: str


@dataclass(slots=True)
class Repeats:
    """Sums over media. Counted from stored PTS, so that all runs that filled a store count alike."""

    max_share: float = 1.0
    """share of repeated frames above which a medium counts in `media` and `worst`"""
    frames: int = 0
    media: int = 0
    worst: list[RepeatingMedium] = field(default_factory=list)
    """the most repeated frames first, at most NUM_NAMED"""

    def add(self, index: pa.Table) -> None:
        """Adds all INDEX rows of some media, sorted by (media_id, segment_index)."""
        found = _count(index)
        above = [medium for medium in found if medium.repeated > self.max_share * medium.frames]
        self.frames += sum(medium.repeated for medium in found)
        self.media += len(above)
        self.worst = heapq.nlargest(NUM_NAMED, [*self.worst, *above])


def _count(index: pa.Table) -> list[RepeatingMedium]:
    """Returns the media with any repeated frame."""
    index = index.filter(pc.greater(index["num_frames"], 0))
    lists = index["frame_pts_seconds"].combine_chunks()
    pts, lengths = lists.flatten().to_numpy(), pc.list_value_length(lists).to_numpy()
    media = index["media_id"].combine_chunks().dictionary_encode()
    owner = np.repeat(media.indices.to_numpy(), lengths)
    is_repeated = (pts[1:] == pts[:-1]) & (owner[1:] == owner[:-1])
    names = media.dictionary.to_pylist()
    repeated = np.bincount(owner[1:][is_repeated], minlength=len(names))
    frames = np.bincount(owner, minlength=len(names))
    uris = dict(zip(index["media_id"].to_pylist(), index["uri"].to_pylist(), strict=True))
    return [
        RepeatingMedium(repeats, count, media_id, uris[media_id])
        for repeats, count, media_id in zip(repeated.tolist(), frames.tolist(), names, strict=True)
        if repeats
    ]
