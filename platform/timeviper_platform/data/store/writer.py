"""The feature store, write side: rows with features to data files and commit records.

Knows what 'committed' means: the data file is written, then its commit record (the INDEX rows of that file), both
whole or not at all, both under a name that the caller derives from the content. Whatever lies there without a commit
record is ignored by readers and removed by the next run. A commit record may name others that it replaces: writing
it is the one moment in which those stop to count (`settle` then clears them away, at leisure and again if killed).
One job writes to a store at a time. Does not know where rows come from.
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
from timeviper_platform.data.encode.recipe import differences, recipe_hash
from timeviper_platform.data.store.commits import (
    RANK,
    has_data_file,
    iter_commits,
    read_commit,
    remove_lost,
    replaced_by,
    uncommitted_files,
    write_commit,
)
from timeviper_platform.data.store.index_writer import write_index
from timeviper_platform.data.store.layout import COMMITS_FOLDER, DATA_FOLDER, INDEX_FILE, STORE_FILE, read_header

ROW_GROUP_BYTES = 512 << 10
"""What is used where nobody says another. A row group ends with the row that fills it: a full segment (64 frames x 16
tokens x 1152: 2.4 MB) or a clip of 24 s is one by itself, so that whoever reads a stretch of a film reads nothing
beside it. Small items share one, so that the footer, 3 KB a row group, stays below 1 %. Readers fetch neighbouring row
groups together."""

Row = dict[str, Any]
"""One FEATURES row as a dict; `features` holds bytes, or None for an error row."""


def create_store(uri: str, recipe: Mapping[str, Any]) -> str:
    """Makes the store at `uri` or finds it there; returns the recipe's hash.

    Raises:
        ValueError: when the store there was made by another recipe, with what differs.
        RuntimeError: when the folder cannot be written.
    """
    digest = recipe_hash(recipe)
    header = read_header(uri)
    if header is None:
        storage.ensure_writable(uri)
        content = {
            "schema_version": schemas.STORE_VERSION,
            "recipe_hash": digest,
            "recipe": dict(recipe),
            "written_by": f"timeviper-platform {_code_version()}",
        }
        storage.write_json(storage.join_uri(uri, STORE_FILE), content)
    elif header["recipe_hash"] != digest:
        lines = "\n".join(f"  {line}" for line in differences(header["recipe"], dict(recipe)))
        raise ValueError(
            f"the store at {uri} was made by another recipe, and features of two recipes do not mix:\n{lines}\n"
            "Write to another output folder, or remove that one."
        )
    else:
        storage.ensure_writable(uri)
    return digest


def write_file(
    uri: str,
    name: str,
    rows: Iterable[Row],
    *,
    recipe_digest: str,
    replaces: Sequence[str] = (),
    row_group_bytes: int = ROW_GROUP_BYTES,
) -> list[Row]:
    """Writes and commits the data file `name` of the store at `uri`; returns its INDEX rows.

    A file that is committed under this name stays when no row would become better: a worker that outlived its run
    takes nothing from a newer one, whose features of these segments are the same bytes.

    Args:
        uri: the store.
        name: without suffix, derived from what the rows are.
        rows: may be a generator: one row group is in memory at a time.
        recipe_digest: the store's recipe_hash.
        replaces: names of committed data files whose rows these are from now on; `settle` removes them.
        row_group_bytes: of features; the row that reaches them is the last of its row group.

    Raises:
        RuntimeError: when the store cannot be written.
    """
    file_name = f"{name}.parquet"
    index_rows: list[Row] = []
    schema = schemas.FEATURES.with_metadata({**schemas.FEATURES.metadata, b"timeviper.recipe_hash": recipe_digest})

    def write(file: IO[bytes]) -> None:
        with _parquet_writer(file, schema) as writer:
            for number, group in enumerate(_row_groups(rows, row_group_bytes)):
                writer.write_table(pa.Table.from_pylist(group, schema=schema), row_group_size=len(group))
                for place, row in enumerate(group):
                    location = {"file": file_name, "row_group": number, "row_in_group": place}
                    index_rows.append({**{k: v for k, v in row.items() if k != "features"}, **location})
        if found := _as_good(uri, file_name, index_rows):
            raise _CommittedBefore(found)

    try:
        storage.write_atomic(storage.join_uri(uri, DATA_FOLDER, file_name), write)
    except _CommittedBefore as found:
        return found.rows
    write_commit(uri, file_name, pa.Table.from_pylist(index_rows, schema=schemas.INDEX), replaces)
    return index_rows


class _CommittedBefore(Exception):
    """Ends a write whose outcome is there already."""

    def __init__(self, rows: list[Row]) -> None:
        super().__init__()
        self.rows = rows


def _as_good(uri: str, file_name: str, rows: Sequence[Row]) -> list[Row]:
    """The committed INDEX rows of a data file when they are of the same segments and none of `rows` is better."""
    try:
        found: list[Row] = read_commit(uri, file_name).to_pylist()
    except FileNotFoundError:
        return []
    if [row["segment_id"] for row in found] != [row["segment_id"] for row in rows]:
        return []
    is_better = any(RANK[new["status"]] < RANK[old["status"]] for new, old in zip(rows, found, strict=True))
    return found if not is_better and has_data_file(uri, file_name) else []


def settle(uri: str) -> int:
    """Clears away what a compaction replaced, however far it came; returns how many data files it removed.

    The index points to the new files first; then the old records and files go; last, the new records forget them, so
    that a file may be written again under an old name.
    """
    replaces = {name: others for name, record in iter_commits(uri, columns=[]) if (others := replaced_by(record))}
    replaced = sorted({name for names in replaces.values() for name in names})
    if not replaced:
        return 0
    if storage.exists(storage.join_uri(uri, INDEX_FILE)):
        write_index(uri)
    for folder in (COMMITS_FOLDER, DATA_FOLDER):
        for name in replaced:
            storage.remove(storage.join_uri(uri, folder, name))
    for name in sorted(replaces.keys() - set(replaced)):
        rows = read_commit(uri, name)
        if rows.num_rows:
            write_commit(uri, name, rows)
        else:  # all that it held was superseded
            storage.remove(storage.join_uri(uri, COMMITS_FOLDER, name))
            storage.remove(storage.join_uri(uri, DATA_FOLDER, name))
    return len(replaced)


def remove_uncommitted(uri: str) -> int:
    """Deletes data files and commit records that lack the other, and half-written files; returns how many.

    Only for the one job that writes to the store, before it starts to.
    """
    num_removed = remove_lost(uri)
    settle(uri)
    leftovers = [storage.join_uri(DATA_FOLDER, name) for name in uncommitted_files(uri)]
    for folder in (DATA_FOLDER, COMMITS_FOLDER):
        names = names_in(storage.join_uri(uri, folder))
        leftovers += [storage.join_uri(folder, name) for name in names if name.endswith(".tmp")]
    for leftover in leftovers:
        storage.remove(storage.join_uri(uri, leftover))
    return num_removed + len(leftovers)


def write_store(uri: str, media: Mapping[str, Tensor], *, recipe: Mapping[str, Any], fps: float = 1.0) -> None:
    """A finished store from features at hand: media_id -> (F, N, dim), frame k at k / fps seconds.

    Raises:
        ValueError: when a tensor has not three dimensions.
    """
    digest = create_store(uri, recipe)
    rows = [_row_of(media_id, features, digest, fps) for media_id, features in media.items()]
    name = hashlib.sha256("".join(row["segment_id"] for row in rows).encode()).hexdigest()[:32]
    write_file(uri, name, rows, recipe_digest=digest)
    write_index(uri, {row["media_id"]: row["source_version"] for row in rows})


def features_bytes(features: Tensor) -> bytes:
    """What a row's `features` holds: little-endian bf16 in C order."""
    return features.to(torch.bfloat16).contiguous().view(torch.int16).numpy().astype("<i2", copy=False).tobytes()


def features_fault(row: Mapping[str, Any], features: Any) -> str | None:
    """What is wrong with the features of a row, held against its INDEX columns; None when nothing is.

    Args:
        row: INDEX columns.
        features: bytes or a buffer, or None.
    """
    size = 0 if features is None else len(features)
    expected = 2 * row["num_frames"] * row["num_tokens_per_frame"] * row["dim"] if row["num_frames"] else 0
    if size != expected:
        return f"{size} bytes of features instead of {expected}"
    if len(row["frame_times_seconds"] or ()) != len(row["frame_pts_seconds"] or ()) or (
        row["status"] != "error" and len(row["frame_pts_seconds"]) != row["num_frames"]
    ):
        return "frame times and frames differ in number"
    checksum = row["features_xxh64"]
    if checksum is not None and xxhash.xxh64_intdigest(features or b"") != checksum:
        return "the features are not those that were written (xxh64)"
    return None


def _row_of(media_id: str, features: Tensor, digest: str, fps: float) -> Row:
    if features.ndim != 3:
        raise ValueError(f"{media_id}: features must be (F, N, dim), not {tuple(features.shape)}")
    num_frames, num_tokens, dim = features.shape
    data = features_bytes(features)
    times = (np.arange(num_frames) / fps).tolist()
    content = xxhash.xxh64(data)
    return {
        "segment_id": hashlib.sha256(f"{media_id}/{content.hexdigest()}/{digest}/0".encode()).hexdigest()[:32],
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
    except PackageNotFoundError:  # run from a source folder that was never installed
        return "unreleased"
