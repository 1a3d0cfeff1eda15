"""The feature store, read side: media_id and frame numbers to bf16 tensors; and the one rule that thins frames.

Knows the store's folders, the index and Parquet row groups. Does not know how features are made (pipeline.py), nor
what samples, prompts or models are. One range read gets one row group; handles and row groups are kept in small LRUs.

    store.json       schema version, recipe, recipe_hash
    index.parquet    INDEX rows, sorted by media_id, segment_index
    data/*.parquet   FEATURES rows;  commits/*.parquet  the INDEX rows of each data file
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from timeviper_platform import schemas, storage

if TYPE_CHECKING:
    from torch import Tensor

STORE_FILE = "store.json"
INDEX_FILE = "index.parquet"
DATA_FOLDER = "data"
COMMITS_FOLDER = "commits"

MAX_OPEN_FILES = 128
"""A footer is about 0.1-1 MB and costs a millisecond (two requests on an object store) to read again."""

Modality = Literal["video", "image"]


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
    """Random access to a finished store. Safe to share between threads; reopen it in another process.

    Args:
        uri: the folder.
        header: content of `store.json`.
        index: INDEX rows in order of (media_id, segment_index); rows with status error are left out.
        cache_bytes: row groups kept in memory; neighbours in a row group cost no second read.
    """

    def __init__(self, uri: str, header: dict[str, Any], index: pa.Table, *, cache_bytes: int = 128 << 20) -> None:
        self.uri = uri
        self.recipe: dict[str, Any] = header["recipe"]
        self.recipe_hash: str = header["recipe_hash"]
        index = index.filter(pc.field("status") != "error")
        self._columns = {
            name: index[name].to_pylist() for name in ("file", "modality", "sha256", "uri", "row_group", "row_in_group")
        }
        self._num_frames = index["num_frames"].to_numpy()
        self._tokens = index["num_tokens_per_frame"].to_numpy()
        self._dim = index["dim"].to_numpy()
        self._duration = index["duration_seconds"].to_numpy()
        self._pts = _flat_lists(index["frame_pts_seconds"])
        self._times = _flat_lists(index["frame_times_seconds"])
        self._rows = _row_ranges(index["media_id"].to_pylist())
        self._by_sha256 = {
            self._columns["sha256"][rows.start]: media_id
            for media_id, rows in self._rows.items()
            if self._columns["sha256"][rows.start] is not None
        }
        self._files: OrderedDict[str, tuple[Any, threading.Lock]] = OrderedDict()
        self._row_groups: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        self._lock = threading.Lock()

    @classmethod
    def open(cls, uri: str, *, cache_bytes: int = 128 << 20) -> FeatureStore:
        """The finished store in the folder `uri`.

        Raises:
            ValueError: when there is none, or it has another schema version.
        """
        header = read_header(uri)
        if header is None or not storage.exists(storage.join_uri(uri, INDEX_FILE)):
            found = "a store without an index (its job has not finished)" if header else "no feature store"
            raise ValueError(f"{found} at {uri!r}; run jobs/preprocess.py with output: {uri}")
        with _open(storage.join_uri(uri, INDEX_FILE)) as file:
            index = file.read()
        schemas.check_version(index.schema, schemas.INDEX, source=storage.join_uri(uri, INDEX_FILE))
        return cls(uri, header, index, cache_bytes=cache_bytes)

    @property
    def media_ids(self) -> Sequence[str]:
        """Every medium with at least one frame, in sorted order."""
        return list(self._rows)

    def __contains__(self, media_id: object) -> bool:
        return media_id in self._rows

    def find(self, sha256: str) -> str | None:
        """The media_id of the medium with these bytes; None when absent or the store was made without hashing."""
        return self._by_sha256.get(sha256)

    def info(self, media_id: str) -> MediaInfo:
        """What is stored of a medium.

        Raises:
            KeyError: when the store does not hold it.
        """
        rows = self._rows[media_id]
        return MediaInfo(
            media_id=media_id,
            modality=self._columns["modality"][rows.start],
            num_frames=int(self._num_frames[rows.start : rows.stop].sum()),
            num_tokens_per_frame=int(self._tokens[rows.start]),
            dim=int(self._dim[rows.start]),
            duration_seconds=float(self._duration[rows.start]),
            pts_seconds=_slice_lists(self._pts, rows),
            times_seconds=_slice_lists(self._times, rows),
            sha256=self._columns["sha256"][rows.start],
            uri=self._columns["uri"][rows.start],
        )

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
        first_frame = 0
        for row in self._rows[media_id]:
            last_frame = first_frame + int(self._num_frames[row])
            begin, end = np.searchsorted(wanted, (first_frame, last_frame))
            if begin < end:
                target[begin:end] = self._segment(row)[wanted[begin:end] - first_frame]
            first_frame = last_frame
        return MediaFeatures(info=info, features=features, pts_seconds=info.pts_seconds[wanted])

    def _segment(self, row: int) -> np.ndarray:
        """(F, N, dim) int16 view of a stored segment."""
        values = self._row_group(self._columns["file"][row], self._columns["row_group"][row])
        buffer = values[self._columns["row_in_group"][row]].as_buffer()
        shape = (int(self._num_frames[row]), int(self._tokens[row]), int(self._dim[row]))
        return np.frombuffer(buffer, dtype="<i2").reshape(shape)

    def _row_group(self, name: str, number: int) -> Any:
        key = (name, number)
        with self._lock:
            if key in self._row_groups:
                self._row_groups.move_to_end(key)
                return self._row_groups[key]
        file, file_lock = self._file(name)
        with file_lock:  # a ParquetFile serves one read at a time
            try:
                values = file.read_row_group(number, columns=["features"], use_threads=False)["features"].chunk(0)
            except OSError as error:  # pyarrow's errors of input and output, and of damaged pages
                raise RuntimeError(f"cannot read row group {number} of {name} in {self.uri}: {error}") from error
        with self._lock:
            if key not in self._row_groups:
                self._row_groups[key] = values
                self._cached_bytes += values.nbytes
            while self._cached_bytes > self._cache_bytes and len(self._row_groups) > 1:
                self._cached_bytes -= self._row_groups.popitem(last=False)[1].nbytes
        return values

    def _file(self, name: str) -> tuple[Any, threading.Lock]:
        with self._lock:
            if name not in self._files:
                uri = storage.join_uri(self.uri, DATA_FOLDER, name)
                try:
                    self._files[name] = (_open(uri), threading.Lock())
                except FileNotFoundError as error:
                    raise RuntimeError(f"{uri} is in the index but not in the store; run the job again") from error
                while len(self._files) > MAX_OPEN_FILES:
                    self._files.popitem(last=False)
            self._files.move_to_end(name)
            return self._files[name]


def read_header(uri: str) -> dict[str, Any] | None:
    """`store.json` of the store at `uri`, or None when there is none.

    Raises:
        ValueError: when the store was written under another schema version.
    """
    path = storage.join_uri(uri, STORE_FILE)
    if not storage.exists(path):
        return None
    header: dict[str, Any] = storage.read_json(path)
    if header.get("schema_version") != schemas.STORE_VERSION:
        raise ValueError(
            f"{path}: schema_version = {header.get('schema_version')!r}, this release reads {schemas.STORE_VERSION};"
            " write the store again, or read it with the release that wrote it"
        )
    return header


def select_frames(
    pts_seconds: Sequence[float] | np.ndarray,
    *,
    max_frames: int | None,
    mode: Literal["uniform", "first"] = "uniform",
    start_seconds: float | None = None,
    end_seconds: float | None = None,
) -> list[int]:
    """Numbers of the frames that a reader takes, ascending: those in start <= t < end, thinned to `max_frames`.

    `uniform` keeps the first and the last and spreads the others evenly (the paper's training: at most 256);
    `first` takes the first ones (its evaluation). Training, serving and evaluation all thin here.

        select_frames([0, 1, 2, 3, 4], max_frames=3)                    -> [0, 2, 4]
        select_frames([0, 1, 2, 3, 4], max_frames=2, start_seconds=1)   -> [1, 4]

    Args:
        pts_seconds: (F,) ascending; a medium's `times_seconds` where the sampled t rather than the PTS shall count.
        max_frames: None keeps all.
        mode: how to thin.
        start_seconds: None = from the beginning.
        end_seconds: None = to the end.

    Raises:
        ValueError: when `max_frames` is below 1 or end is not after start.
    """
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"{max_frames = } must be at least 1, or None for every frame")
    if start_seconds is not None and end_seconds is not None and end_seconds <= start_seconds:
        raise ValueError(f"{end_seconds = } must be after {start_seconds = }")
    times = np.asarray(pts_seconds, dtype=np.float64)
    keep = np.ones(len(times), dtype=bool)
    if start_seconds is not None:
        keep &= times >= start_seconds
    if end_seconds is not None:
        keep &= times < end_seconds
    inside = np.flatnonzero(keep)
    count = len(inside)
    if max_frames is None or count <= max_frames:
        chosen = inside
    elif mode == "first":
        chosen = inside[:max_frames]
    elif max_frames == 1:
        chosen = inside[(count - 1) // 2 :][:1]
    else:  # integers, so that no platform rounds a half differently
        places = (np.arange(max_frames) * (count - 1) + (max_frames - 1) // 2) // (max_frames - 1)
        chosen = inside[places]
    return [int(number) for number in chosen]


def _open(uri: str) -> Any:
    filesystem, path = storage.split_uri(uri)
    if storage.is_local(uri):
        return pq.ParquetFile(path, memory_map=True)
    # one row group is one range read, so a cache between would only copy it
    return pq.ParquetFile(filesystem.open(path, "rb", cache_type="none"), pre_buffer=True)


def _flat_lists(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """Offsets (rows + 1,) and values of a list column, without a Python object a row."""
    lists = column.combine_chunks()
    if isinstance(lists, pa.ChunkedArray):  # an empty column
        lists = pa.concat_arrays(lists.chunks) if lists.num_chunks else pa.array([], lists.type)
    return lists.offsets.to_numpy(), lists.values.to_numpy()


def _slice_lists(flat: tuple[np.ndarray, np.ndarray], rows: range) -> np.ndarray:
    offsets, values = flat
    return values[offsets[rows.start] : offsets[rows.stop]]


def _row_ranges(media_ids: list[str]) -> dict[str, range]:
    ranges: dict[str, range] = {}
    start = 0
    for number, media_id in enumerate(media_ids):
        if number + 1 == len(media_ids) or media_ids[number + 1] != media_id:
            ranges[media_id] = range(start, number + 1)
            start = number + 1
    return ranges
