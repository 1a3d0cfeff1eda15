"""Reads features."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from timeviper_platform.common import storage
from timeviper_platform.data.store.index import Modality, StoreIndex
from timeviper_platform.data.store.layout import DATA_FOLDER, INDEX_FILE, find_header
from timeviper_platform.data.store.row_groups import RowGroups, value_buffer
from timeviper_platform.data.video.sampling import select_frames, thin_to_fps

if TYPE_CHECKING:
    from torch import Tensor

READ_TOGETHER_BYTES = 16 << 20
"""Maximum bytes per read."""

MAX_INFOS = 4096
"""Media with cached frame times; an hour takes 58 kB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaInfo:
    media_id: str
    modality: Modality
    num_frames: int
    """F, without undecodable frames"""
    num_tokens_per_frame: int
    dim: int
    duration_seconds: float
    pts_seconds: np.ndarray
    """(F,) float64, PTS on the source's clock"""
    times_seconds: np.ndarray
    """(F,) float64, sampling times t; 0 <= t - PTS < one source frame"""
    sha256: str | None
    uri: str

    def select(
        self,
        *,
        max_frames: int | None = None,
        frame_selection: Literal["uniform", "first"] = "uniform",
        start_seconds: float | None = None,
        end_seconds: float | None = None,
        fps: float | None = None,
    ) -> list[int]:
        """Returns ascending indices of the frames with sampling times in [start_seconds, end_seconds), thinned.

        Args:
            frame_selection: see `select_frames`.
            fps: maximum frame rate, applied first.

        Raises:
            ValueError: if `max_frames` is below 1 or the clip ends before it starts.
        """
        times = self.times_seconds
        clip = select_frames(times, max_frames=None, start_seconds=start_seconds, end_seconds=end_seconds)
        if fps is not None:
            clip = [clip[index] for index in thin_to_fps(times[clip], fps)]
        chosen = select_frames(times[clip], max_frames=max_frames, frame_selection=frame_selection)
        return [clip[index] for index in chosen]

    def clip_seconds(self, start_seconds: float | None = None, end_seconds: float | None = None) -> float:
        """Returns the length of a clip, cut at the medium's ends."""
        stop = self.duration_seconds if end_seconds is None else min(end_seconds, self.duration_seconds)
        return max(0.0, stop - max(0.0, start_seconds or 0.0))


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaFeatures:
    info: MediaInfo
    features: Tensor
    """(F', N, dim) bfloat16, owned by the caller"""
    pts_seconds: np.ndarray
    """(F',) float64"""

    def __post_init__(self) -> None:
        if self.features.shape[0] != len(self.pts_seconds):
            raise ValueError(f"{self.features.shape[0]} frames of features but {len(self.pts_seconds)} PTS")


class FeatureStore:
    """A finished store. Thread-safe; unpickling opens it again.

    Reads the index again when a compaction has removed a data file.
    """

    def __init__(
        self, uri: str, header: dict[str, Any], index: StoreIndex, *, state: str = "", cache_bytes: int = 128 << 20
    ) -> None:
        self.uri = uri
        self.recipe: dict[str, Any] = header["recipe"]
        self.recipe_hash: str = header["recipe_hash"]
        self._index = index
        self._state = state
        """State of the index file before it was read."""
        self._row_groups = RowGroups(storage.join_uri(uri, DATA_FOLDER), cache_bytes)
        self._infos = lru_cache(maxsize=MAX_INFOS)(lambda media_id: _info(self._index, media_id))

    @classmethod
    def open(cls, uri: str, *, cache_bytes: int = 128 << 20) -> FeatureStore:
        """Opens a finished store; raises ValueError if there is none."""
        header = find_header(uri)
        if header is None or not storage.exists(storage.join_uri(uri, INDEX_FILE)):
            found = "a store without an index (its job has not finished)" if header else "no feature store"
            raise ValueError(f"{found} at {uri!r}; run jobs/preprocess.py with feature_store: {uri}")
        index = storage.join_uri(uri, INDEX_FILE)
        state = storage.state_of(index)
        return cls(uri, header, StoreIndex.open(index), state=state, cache_bytes=cache_bytes)

    def refreshed(self) -> FeatureStore:
        """Returns the current store: this object, or a new one if preprocessing has written since.

        Raises:
            ValueError: if another recipe has taken its place.
            OSError: if it cannot be read.
        """
        if storage.state_of(storage.join_uri(self.uri, INDEX_FILE)) == self._state:
            return self
        fresh = FeatureStore.open(self.uri, cache_bytes=self._row_groups.cache_bytes)
        if fresh.recipe_hash != self.recipe_hash:
            raise ValueError(f"the store at {self.uri!r} now has another recipe; open it again")
        return fresh

    def __reduce__(self) -> tuple[Any, ...]:
        return _open, (self.uri, self._row_groups.cache_bytes)

    @property
    def media_ids(self) -> Sequence[str]:
        """Sorted ids of the media with at least one segment without error."""
        return self._index.media_ids

    def __contains__(self, media_id: object) -> bool:
        return media_id in self._index

    def find(self, sha256: str) -> str | None:
        """Finds the whole medium with these bytes; None if absent or not hashed."""
        return self._index.find(sha256)

    def find_uri(self, uri: str) -> str | None:
        """Finds the whole medium at this address of its manifest; None if absent."""
        return self._index.find_uri(uri)

    def version_of(self, media_id: str) -> str:
        """Returns the data file of a medium's first segment, which changes when it is preprocessed again.

        Raises:
            KeyError: if the store does not have the medium.
        """
        return self._index.location(self._index.rows_of(media_id).start).file

    def index_digest(self) -> str:
        """Equal digests mean equal media and frames."""
        filesystem, path = storage.split_uri(storage.join_uri(self.uri, INDEX_FILE))
        with filesystem.open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def info(self, media_id: str) -> MediaInfo:
        """Raises KeyError if the store does not have the medium."""
        return self._infos(media_id)

    def read(self, media_id: str, frames: Sequence[int] | None = None) -> MediaFeatures:
        """Reads features.

        Args:
            frames: ascending indices, which may repeat; None = all.

        Raises:
            KeyError: if the store does not have the medium.
            ValueError: if the indices are invalid.
            RuntimeError: if a data file is missing or damaged.
        """
        import torch  # not needed to read the index

        info = self.info(media_id)
        indices = np.arange(info.num_frames) if frames is None else np.asarray(frames, dtype=np.int64)
        if indices.size and (indices[0] < 0 or indices[-1] >= info.num_frames or bool((np.diff(indices) < 0).any())):
            raise ValueError(f"{media_id}: frames must ascend within 0..{info.num_frames - 1}, not {frames}")
        features = torch.empty(len(indices), info.num_tokens_per_frame, info.dim, dtype=torch.bfloat16)
        # int16 because numpy has no bfloat16
        target = features.view(torch.int16).numpy()
        index = self._index  # another thread may replace it
        stops = np.cumsum(index.num_frames(index.rows_of(media_id)))
        bounds = np.searchsorted(indices, np.concatenate([[0], stops]))
        needed: list[int] = np.flatnonzero(bounds[:-1] < bounds[1:]).tolist()
        for position, number in enumerate(needed):
            begin, end = bounds[number], bounds[number + 1]
            segment = self._segment(media_id, number, ahead=needed[position + 1 :])
            target[begin:end] = segment.numpy()[indices[begin:end] - (stops[number] - len(segment))]
        return MediaFeatures(info=info, features=features, pts_seconds=info.pts_seconds[indices])

    def _segment(self, media_id: str, number: int, ahead: Sequence[int] = ()) -> Tensor:
        """(F, N, dim) int16 view. The same read fetches adjacent segments of `ahead`."""
        index = self._index
        rows = index.rows_of(media_id)
        row = rows[number]
        try:
            return self._read_segment(index, row, [rows[later] for later in ahead])
        except FileNotFoundError:
            fresh = StoreIndex.open(storage.join_uri(self.uri, INDEX_FILE))
        rows = fresh.rows_of(media_id) if media_id in fresh else range(0)
        if number >= len(rows) or fresh.text("segment_id", rows[number]) != index.text("segment_id", row):
            raise RuntimeError(f"{media_id}: the store at {self.uri} now holds another version; open it again")
        self._index = fresh
        try:
            return self._read_segment(fresh, rows[number])
        except FileNotFoundError as error:
            location = fresh.location(rows[number])
            raise RuntimeError(
                f"{location.file} is in the index but not in the store at {self.uri}; run the job again"
            ) from error

    def _read_segment(self, index: StoreIndex, row: int, ahead: Sequence[int] = ()) -> Tensor:
        from torch.utils.dlpack import from_dlpack

        location = index.location(row)
        groups, num_bytes = {location.row_group}, 0
        max_bytes = min(READ_TOGETHER_BYTES, self._row_groups.cache_bytes // 2)
        for later in ahead:
            num_bytes += 2 * math.prod(index.shape(later))
            following = index.location(later)
            if following.file != location.file or following.row_group > max(groups) + 1 or num_bytes > max_bytes:
                break
            groups.add(following.row_group)
        values = self._row_groups.read(location.file, location.row_group, max(groups) + 1)
        buffer = value_buffer(values, location.row_in_group)
        # torch.frombuffer would warn about read-only memory
        bits = pa.Array.from_buffers(pa.int16(), buffer.size // 2, [None, buffer])
        return from_dlpack(bits).reshape(index.shape(row))


def _open(uri: str, cache_bytes: int) -> FeatureStore:
    return FeatureStore.open(uri, cache_bytes=cache_bytes)


def _info(index: StoreIndex, media_id: str) -> MediaInfo:
    rows = index.rows_of(media_id)
    _, num_tokens, dim = index.shape(rows.start)
    return MediaInfo(
        media_id=media_id,
        modality=index.modality(rows.start),
        num_frames=int(index.num_frames(rows).sum()),
        num_tokens_per_frame=num_tokens,
        dim=dim,
        duration_seconds=index.duration_seconds(rows.start),
        pts_seconds=index.seconds("frame_pts_seconds", rows),
        times_seconds=index.seconds("frame_times_seconds", rows),
        sha256=index.text("sha256", rows.start),
        uri=index.text("uri", rows.start) or "",
    )
