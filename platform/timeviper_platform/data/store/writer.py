"""Writes data files and their commit records.

Both are written atomically, and readers ignore data files without a record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from torch import Tensor

from timeviper_platform.common import schemas, storage
from timeviper_platform.common.listing import names_in
from timeviper_platform.data.encode.recipe import differences, older_recipe, recipe_hash
from timeviper_platform.data.store.commits import STATUS_RANK, CommitLog, replaced_files
from timeviper_platform.data.store.index import ROW_GROUP_ROWS
from timeviper_platform.data.store.index_writer import write_index
from timeviper_platform.data.store.layout import (
    COMMITS_FOLDER,
    DATA_FOLDER,
    INDEX_FILE,
    STORE_FILE,
    find_header,
    read_header,
)

ROW_GROUP_BYTES = 512 << 10
"""Size at which a row group is complete.

A full segment (2.4 MB) has its own, so that reading a clip reads little else. Small items share one, as each adds
3 KB to the footer.
"""

Row = dict[str, Any]
"""A FEATURES row; `features` holds bytes, or None for an error row."""


class StoreWriter:
    """The store of one writing job. The constructor reads nothing."""

    def __init__(
        self,
        uri: str,
        recipe_hash: str,
        *,
        row_group_bytes: int = ROW_GROUP_BYTES,
        index_row_group_rows: int = ROW_GROUP_ROWS,
    ) -> None:
        self.uri = uri
        self.recipe_hash = recipe_hash
        self.commits = CommitLog(uri)
        self._row_group_bytes = row_group_bytes
        self._index_row_group_rows = index_row_group_rows

    @classmethod
    def create(cls, uri: str, recipe: Mapping[str, Any]) -> StoreWriter:
        """Creates or opens the store at `uri`.

        Raises:
            ValueError: if an existing store has another recipe.
            RuntimeError: if the folder is not writable.
        """
        writer = cls(uri, recipe_hash(recipe))
        header = find_header(uri)
        if header is not None and header["recipe_hash"] != writer.recipe_hash:
            lines = "\n".join(f"  {line}" for line in differences(header["recipe"], dict(recipe)))
            fix = older_recipe(header["recipe"]) or "Write to another feature_store, or remove that one."
            raise ValueError(
                f"the store at {uri} has another recipe, and features of two recipes do not mix:\n{lines}\n{fix}"
            )
        storage.ensure_writable(uri)
        if header is None:
            content = {
                "schema_version": schemas.STORE_VERSION,
                "recipe_hash": writer.recipe_hash,
                "recipe": dict(recipe),
                "written_by": f"timeviper-platform {_code_version()}",
            }
            storage.write_json(storage.join_uri(uri, STORE_FILE), content)
        return writer

    @classmethod
    def open(
        cls, uri: str, *, row_group_bytes: int = ROW_GROUP_BYTES, index_row_group_rows: int = ROW_GROUP_ROWS
    ) -> StoreWriter:
        """Opens an existing store; raises ValueError if there is none."""
        recipe_hash = read_header(uri)["recipe_hash"]
        return cls(uri, recipe_hash, row_group_bytes=row_group_bytes, index_row_group_rows=index_row_group_rows)

    def write_file(self, name: str, rows: Iterable[Row], *, replaces: Sequence[str] = ()) -> list[Row]:
        """Writes and commits the data file `name`; returns its INDEX rows.

        Keeps an existing commit of the same segments unless a row improves: a late worker must not undo newer work.

        Args:
            name: without suffix, derived from the content of the rows.
            rows: may be a generator; memory holds one row group.
            replaces: committed data files; `settle` removes them.
        """
        file_name = f"{name}.parquet"
        index_rows: list[Row] = []
        metadata = {**schemas.FEATURES.metadata, b"timeviper.recipe_hash": self.recipe_hash}
        schema = schemas.FEATURES.with_metadata(metadata)

        def write(file: IO[bytes]) -> None:
            with _parquet_writer(file, schema) as writer:
                for row_group, group in enumerate(_row_groups(rows, self._row_group_bytes)):
                    writer.write_table(pa.Table.from_pylist(group, schema=schema), row_group_size=len(group))
                    for row_in_group, row in enumerate(group):
                        location = {"file": file_name, "row_group": row_group, "row_in_group": row_in_group}
                        index_rows.append({**{k: v for k, v in row.items() if k != "features"}, **location})
            if committed := self._commit_to_keep(file_name, index_rows):
                raise _AlreadyCommittedError(committed)

        try:
            storage.write_atomic(storage.join_uri(self.uri, DATA_FOLDER, file_name), write)
        except _AlreadyCommittedError as found:
            return found.rows
        self.commits.write(file_name, pa.Table.from_pylist(index_rows, schema=schemas.INDEX), replaces)
        return index_rows

    def write_index(self, current_versions: Mapping[str, str] | None = None) -> None:
        write_index(self.uri, current_versions, row_group_rows=self._index_row_group_rows)

    def settle(self) -> int:
        """Removes replaced data files and their records; returns their number.

        The next call completes a killed one. Order: index, old records, old files, `replaces` of new records.
        """
        records = self.commits.records(columns=[])
        replaces = {name: others for name, record in records if (others := replaced_files(record))}
        replaced = sorted({name for names in replaces.values() for name in names})
        if not replaced:
            return 0
        if storage.exists(storage.join_uri(self.uri, INDEX_FILE)):
            self.write_index()
        for folder in (COMMITS_FOLDER, DATA_FOLDER):
            for name in replaced:
                storage.remove(storage.join_uri(self.uri, folder, name))
        for name in sorted(replaces.keys() - set(replaced)):
            rows = self.commits.read(name)
            if rows.num_rows:
                self.commits.write(name, rows)
            else:  # all of its rows were superseded
                storage.remove(storage.join_uri(self.uri, COMMITS_FOLDER, name))
                storage.remove(storage.join_uri(self.uri, DATA_FOLDER, name))
        return len(replaced)

    def remove_uncommitted(self) -> int:
        """Deletes leftovers of killed jobs; returns their number.

        Call before the job's workers start.
        """
        num_removed = self.commits.remove_lost()
        self.settle()
        leftovers = [storage.join_uri(DATA_FOLDER, name) for name in self.commits.uncommitted()]
        for folder in (DATA_FOLDER, COMMITS_FOLDER):
            names = names_in(storage.join_uri(self.uri, folder))
            leftovers += [storage.join_uri(folder, name) for name in names if name.endswith(".tmp")]
        for leftover in leftovers:
            storage.remove(storage.join_uri(self.uri, leftover))
        return num_removed + len(leftovers)

    def _commit_to_keep(self, file_name: str, rows: Sequence[Row]) -> list[Row]:
        """Returns the committed rows if they have the same segments and no row improves."""
        try:
            found: list[Row] = self.commits.read(file_name).to_pylist()
        except FileNotFoundError:
            return []
        if [row["segment_id"] for row in found] != [row["segment_id"] for row in rows]:
            return []
        improves = any(
            STATUS_RANK[new["status"]] < STATUS_RANK[old["status"]] for new, old in zip(rows, found, strict=True)
        )
        return found if not improves and self.commits.has_data_file(file_name) else []


class _AlreadyCommittedError(Exception):
    def __init__(self, rows: list[Row]) -> None:
        super().__init__()
        self.rows = rows


def write_store(uri: str, media: Mapping[str, Tensor], *, recipe: Mapping[str, Any], fps: float = 1.0) -> None:
    """Writes a finished store from media_id -> (F, N, dim), with frame k sampled at k / fps seconds."""
    store = StoreWriter.create(uri, recipe)
    rows = [_feature_row(media_id, features, store.recipe_hash, fps) for media_id, features in media.items()]
    name = hashlib.sha256("".join(row["segment_id"] for row in rows).encode()).hexdigest()[:32]
    store.write_file(name, rows)
    store.write_index({row["media_id"]: row["source_version"] for row in rows})


def features_bytes(features: Tensor) -> bytes:
    """Returns little-endian bf16 in C order."""
    return features.to(torch.bfloat16).contiguous().view(torch.int16).numpy().astype("<i2", copy=False).tobytes()


def features_fault(row: Mapping[str, Any], features: Any) -> str | None:
    """Returns why a row's features contradict its INDEX columns, or None."""
    size = 0 if features is None else len(features)
    expected = 2 * row["num_frames"] * row["num_tokens_per_frame"] * row["dim"] if row["num_frames"] else 0
    if size != expected:
        return f"{size} bytes of features instead of {expected}"
    if len(row["frame_times_seconds"] or ()) != len(row["frame_pts_seconds"] or ()) or (
        row["status"] != "error" and len(row["frame_pts_seconds"]) != row["num_frames"]
    ):
        return "the number of frame times is not the number of frames"
    checksum = row["features_xxh64"]
    if checksum is not None and xxhash.xxh64_intdigest(features or b"") != checksum:
        return "the xxh64 of the features is not the stored one"
    return None


def _feature_row(media_id: str, features: Tensor, recipe_hash: str, fps: float) -> Row:
    if features.ndim != 3:
        raise ValueError(f"{media_id}: features must be (F, N, dim), not {tuple(features.shape)}")
    num_frames, num_tokens, dim = features.shape
    data = features_bytes(features)
    times = (np.arange(num_frames) / fps).tolist()
    content = xxhash.xxh64(data)
    return {
        "segment_id": hashlib.sha256(f"{media_id}/{content.hexdigest()}/{recipe_hash}/0".encode()).hexdigest()[:32],
        "media_id": media_id,
        "source_version": content.hexdigest(),
        "segment_index": 0,
        "num_segments": 1,
        "modality": "video" if num_frames > 1 else "image",
        "start_seconds": 0.0,
        "end_seconds": num_frames / fps,
        "duration_seconds": num_frames / fps,
        "frame_times_seconds": times,
        "frame_pts_seconds": times,
        "num_frames": num_frames,
        "num_tokens_per_frame": num_tokens,
        "dim": dim,
        "dtype": "bfloat16",
        "status": "ok",
        "frames_missing": 0,
        "features_xxh64": content.intdigest(),
        "features": data,
    }


def _row_groups(rows: Iterable[Row], row_group_bytes: int) -> Iterator[list[Row]]:
    group: list[Row] = []
    num_bytes = 0
    for row in rows:
        group.append(row)
        num_bytes += len(row["features"] or b"")
        if num_bytes >= row_group_bytes:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


def _parquet_writer(file: IO[bytes], schema: pa.Schema) -> Any:
    others = [name for name in schema.names if name != "features"]
    return pq.ParquetWriter(
        file,
        schema,
        compression={"features": "none"} | dict.fromkeys(others, "zstd"),  # bf16 features hardly compress
        use_dictionary=False,
        write_statistics=["segment_id", "media_id"],
        write_page_checksum=True,
    )


def _code_version() -> str:
    try:
        return version("timeviper-platform")
    except PackageNotFoundError:
        return "unreleased"
