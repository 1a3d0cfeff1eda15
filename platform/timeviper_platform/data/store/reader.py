"""The feature store, read side: media_id and frame numbers to bf16 tensors; and the one rule that thins frames.

Knows the store's folders; store_index.py knows the index, row_groups.py the data files. Does not know how features are
made (pipeline.py), nor what samples, prompts or models are. Neighbouring segments' row groups come with one range read.

    store.json       schema version, recipe, recipe_hash
    index.parquet    INDEX rows, sorted by media_id, segment_index
    data/*.parquet   FEATURES rows;  commits/*.parquet  the INDEX rows of each data file
"""

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
from timeviper_platform.data.store.row_groups import RowGroups, value_buffer

if TYPE_CHECKING:
    from torch import Tensor
from timeviper_platform.data.store.layout import DATA_FOLDER, INDEX_FILE, find_header
from timeviper_platform.data.video.sampling import select_frames, thin_to_fps

READ_TOGETHER_BYTES = 16 << 20
"""of one medium's neighbouring row groups, fetched at once: worth an object store's latency, and bounded"""

MAX_INFOS = 4096
"""media whose times are kept as arrays; a film of an hour takes 58 kB"""


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaInfo:
    """What the store holds of one medium, without reading features."""

    media_id: str
    modality: Modality
    num_frames: int
    """frames that are stored, F; those that could not be decoded are not counted"""
    num_tokens_per_frame: int
    dim: int
    duration_seconds: float
    pts_seconds: np.ndarray
    """(F,) float64: PTS of every frame on the source's clock"""
    times_seconds: np.ndarray
    """(F,) float64: the time t at which each was sampled; 0 <= t - PTS < one source frame"""
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
        """Indices of the frames to read, ascending. Training, evaluation and serving all select here.

        A clip holds the frames whose sampling time t lies in [start_seconds, end_seconds). They are thinned to `fps`
        first, then to `max_frames`.

        Args:
            max_frames: None keeps all.
            frame_selection: how to thin to `max_frames`, see `select_frames`.
            start_seconds: None = from the beginning.
            end_seconds: None = to the end.
            fps: at most this many frames a second; None keeps the stored rate.

        Raises:
            ValueError: if `max_frames` is below 1 or the clip ends before it starts.
        """
        times = self.times_seconds
        clip = select_frames(times, max_frames=None, start_seconds=start_seconds, end_seconds=end_seconds)
        if fps is not None:
            clip = [clip[place] for place in thin_to_fps(times[clip], fps)]
        chosen = select_frames(times[clip], max_frames=max_frames, frame_selection=frame_selection)
        return [clip[index] for index in chosen]


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaFeatures:
    """Frames of one medium."""

    info: MediaInfo
    features: Tensor
    """(F', N, dim) bfloat16; the caller's own"""
    pts_seconds: np.ndarray
    """(F',) float64"""

    def __post_init__(self) -> None:
        if self.features.shape[0] != len(self.pts_seconds):
            raise ValueError(f"{self.features.shape[0]} frames of features but {len(self.pts_seconds)} PTS")


class FeatureStore:
    """Random access to a finished store. Safe to share between threads; another process opens it anew.

    What is open stays readable while a compaction moves rows to other files: a reader that misses a file reads the
    index again, once.

    Args:
        uri: the folder.
        header: content of `store.json`.
        index: what `index.parquet` says.
        cache_bytes: row groups kept in memory; neighbours in a row group cost no second read.
    """

    def __init__(self, uri: str, header: dict[str, Any], index: StoreIndex, *, cache_bytes: int = 128 << 20) -> None:
        self.uri = uri
        self.recipe: dict[str, Any] = header["recipe"]
        self.recipe_hash: str = header["recipe_hash"]
        self._index = index
        self._row_groups = RowGroups(storage.join_uri(uri, DATA_FOLDER), cache_bytes)
        self._infos = lru_cache(maxsize=MAX_INFOS)(lambda media_id: _info(self._index, media_id))

    @classmethod
    def open(cls, uri: str, *, cache_bytes: int = 128 << 20) -> FeatureStore:
        """The finished store in the folder `uri`.

        Raises:
            ValueError: when there is none, or it has another schema version.
        """
        header = find_header(uri)
        if header is None or not storage.exists(storage.join_uri(uri, INDEX_FILE)):
            found = "a store without an index (its job has not finished)" if header else "no feature store"
            raise ValueError(f"{found} at {uri!r}; run jobs/preprocess.py with feature_store: {uri}")
        return cls(uri, header, StoreIndex.open(storage.join_uri(uri, INDEX_FILE)), cache_bytes=cache_bytes)

    def __reduce__(self) -> tuple[Any, ...]:
        return _open, (self.uri, self._row_groups.cache_bytes)

    @property
    def media_ids(self) -> Sequence[str]:
        """Every medium with at least one segment that is not in error, in sorted order."""
        return self._index.media_ids

    def __contains__(self, media_id: object) -> bool:
        return media_id in self._index

    def find(self, sha256: str) -> str | None:
        """The media_id of the whole medium with these bytes; None when absent or the store was made without hashing."""
        return self._index.find(sha256)

    def index_digest(self) -> str:
        """Hash of `index.parquet` as it is now: equal means the same media with the same frames."""
        filesystem, path = storage.split_uri(storage.join_uri(self.uri, INDEX_FILE))
        with filesystem.open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def info(self, media_id: str) -> MediaInfo:
        """What is stored of a medium.

        Raises:
            KeyError: when the store does not hold it.
        """
        return self._infos(media_id)

    def read(self, media_id: str, frames: Sequence[int] | None = None) -> MediaFeatures:
        """Features of the frames with these numbers, or of all; reads only the row groups that hold them.

        Args:
            media_id: one of `media_ids`.
            frames: numbers within the medium, ascending; repeats are allowed.

        Raises:
            KeyError: when the store does not hold the medium.
            ValueError: for frame numbers out of order or out of range.
            RuntimeError: when a data file is gone or damaged.
        """
        import torch  # a process that decodes takes select_frames from here, and stays without torch

        info = self.info(media_id)
        wanted = np.arange(info.num_frames) if frames is None else np.asarray(frames, dtype=np.int64)
        if wanted.size and (wanted[0] < 0 or wanted[-1] >= info.num_frames or bool((np.diff(wanted) < 0).any())):
            raise ValueError(f"{media_id}: frames must ascend within 0..{info.num_frames - 1}, not {frames}")
        features = torch.empty(len(wanted), info.num_tokens_per_frame, info.dim, dtype=torch.bfloat16)
        # numpy has no bf16: both sides are viewed as 16-bit integers, and copied once, straight into the result
        target = features.view(torch.int16).numpy()
        index = self._index  # another thread may put a newer one there
        stops = np.cumsum(index.num_frames(index.rows_of(media_id)))
        bounds = np.searchsorted(wanted, np.concatenate([[0], stops]))
        needed: list[int] = np.flatnonzero(bounds[:-1] < bounds[1:]).tolist()
        for place, number in enumerate(needed):
            begin, end = bounds[number], bounds[number + 1]
            segment = self._segment(media_id, number, ahead=needed[place + 1 :])
            target[begin:end] = segment.numpy()[wanted[begin:end] - (stops[number] - len(segment))]
        return MediaFeatures(info=info, features=features, pts_seconds=info.pts_seconds[wanted])

    def _segment(self, media_id: str, number: int, ahead: Sequence[int] = ()) -> Tensor:
        """(F, N, dim) int16 view of a medium's stored segment, the index read again if its file is gone.

        Segments `ahead` will be wanted next: those that lie right behind it come with the same read.
        """
        index = self._index
        rows = index.rows_of(media_id)
        row = rows[number]
        try:
            return self._read_segment(index, row, [rows[later] for later in ahead])
        except FileNotFoundError:
            fresh = StoreIndex.open(storage.join_uri(self.uri, INDEX_FILE))
        rows = fresh.rows_of(media_id) if media_id in fresh else range(0)
        if number >= len(rows) or fresh.text("segment_id", rows[number]) != index.text("segment_id", row):
            raise RuntimeError(f"{media_id}: the store at {self.uri} holds another version by now; open it again")
        self._index = fresh
        try:
            return self._read_segment(fresh, rows[number])
        except FileNotFoundError as error:
            place = fresh.place(rows[number])
            raise RuntimeError(
                f"{place.file} is in the index but not in the store at {self.uri}; run the job again"
            ) from error

    def _read_segment(self, index: StoreIndex, row: int, ahead: Sequence[int] = ()) -> Tensor:
        from torch.utils.dlpack import from_dlpack

        place = index.place(row)
        groups, num_bytes = {place.row_group}, 0
        most = min(READ_TOGETHER_BYTES, self._row_groups.cache_bytes // 2)
        for later in ahead:
            num_bytes += 2 * math.prod(index.shape(later))
            behind = index.place(later)
            if behind.file != place.file or behind.row_group > max(groups) + 1 or num_bytes > most:
                break
            groups.add(behind.row_group)
        buffer = value_buffer(self._row_groups.read(place.file, place.row_group, max(groups) + 1), place.row_in_group)
        # by DLPack: torch.frombuffer warns that Arrow's memory is read-only
        values = pa.Array.from_buffers(pa.int16(), buffer.size // 2, [None, buffer])
        return from_dlpack(values).reshape(index.shape(row))


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
