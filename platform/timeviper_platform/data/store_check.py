"""A feature store held against itself: what it says it holds (`inspect_store`), and whether it does (`verify_store`).

Knows every promise of the store: a commit record for each data file, equal rows in both, checksums, an index of just
these rows, and planned = ok + partial + error. Reads every byte to verify, one row group at a time; writes nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from timeviper_platform import storage
from timeviper_platform.data.commits import Commits, num_feature_bytes, read_commits
from timeviper_platform.data.features import (
    COMMITS_FOLDER,
    DATA_FOLDER,
    INDEX_FILE,
    read_header,
)
from timeviper_platform.data.index_writer import INDEXED_KEY
from timeviper_platform.data.planning import PLAN_FOLDER, read_part
from timeviper_platform.data.report import audit, count_rejects
from timeviper_platform.data.row_groups import open_data_file, value_buffer
from timeviper_platform.data.store_writer import features_fault, recipe_hash
from timeviper_platform.schemas import FEATURES, INDEX

VERIFY_THREADS = 4
"""Files verified at a time; each holds one row group, 20 MB."""

_PLACE = ("file", "row_group", "row_in_group")


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One thing that is wrong, and where."""

    file: str
    """within the store's folder"""
    what: str
    row_group: int | None = None
    row_in_group: int | None = None
    segment_id: str | None = None
    media_id: str | None = None

    def __str__(self) -> str:
        row = "" if self.row_group is None else f" row group {self.row_group} row {self.row_in_group}"
        ids = "" if self.segment_id is None else f" segment {self.segment_id} of medium {self.media_id}"
        return f"{self.file}{row}{ids}: {self.what}"


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """What a verification read and found."""

    files: int
    rows: int
    bytes: int
    """of features, all of them read"""
    audit: dict[str, int] | None
    """of the last run's plan; None without one (a store that no job made)"""
    leftovers: int
    """data files that a killed run did not commit; readers ignore them and the next run removes them"""
    problems: list[Problem]

    def lines(self) -> list[str]:
        """For people."""
        counts = "no plan" if self.audit is None else ", ".join(f"{n} {name}" for name, n in self.audit.items())
        lines = [
            f"verified   {self.files} data files, {self.rows} rows, {self.bytes / 1e6:.1f} MB of features",
            f"audit      {counts}",
            f"leftovers  {self.leftovers} data files without a commit record",
            *(f"BAD        {problem}" for problem in self.problems),
        ]
        if not self.problems:
            return [*lines, "result     nothing wrong"]
        return [
            *lines,
            f"result     {len(self.problems)} problems. To have bad rows made again, remove the files of their names"
            f" from {COMMITS_FOLDER}/ and run jobs/preprocess.py with the same configuration",
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreSummary:
    """What a store holds."""

    media: int
    segments: dict[str, int]
    """by status, of the current versions"""
    segments_superseded: int
    frames: int
    bytes: int
    """of features that count"""
    file_bytes: int
    """of all data files"""
    files: int
    is_indexed: bool
    """False while commits are younger than the index: a run was killed, or one works"""
    recipe_hash: str
    recipe: dict[str, Any]
    rejects: dict[str, dict[str, int]]
    """stage -> type -> media, of the last run"""

    def lines(self) -> list[str]:
        """For people."""
        rejected = [f"{n} {kind} ({stage})" for stage, kinds in self.rejects.items() for kind, n in kinds.items()]
        statuses = ", ".join(f"{n} {status}" for status, n in self.segments.items()) or "none"
        return [
            f"media      {self.media}",
            f"segments   {statuses}; superseded: {self.segments_superseded}",
            f"frames     {self.frames}, {self.bytes / 1e6:.1f} MB of features",
            f"files      {self.files}, {self.file_bytes / 1e6:.1f} MB"
            + ("" if self.is_indexed else "; the index is older than they are: run the job again"),
            f"rejected   {', '.join(rejected) or 'none'}",
            f"recipe     {self.recipe_hash}",
            *(f"  {line}" for line in json.dumps(self.recipe, indent=2).splitlines()),
        ]


def inspect_store(uri: str) -> StoreSummary:
    """What the store at `uri` holds, from its records alone.

    Raises:
        ValueError: when there is none.
    """
    header = _header(uri)
    commits = read_commits(uri)
    committed = commits.rows()
    index = _read_index(uri)
    rows = INDEX.empty_table() if index is None else index
    rejects = storage.join_uri(uri, "rejects.parquet")
    sizes = _sizes(storage.join_uri(uri, DATA_FOLDER))
    return StoreSummary(
        media=len(pc.unique(rows.filter(pc.not_equal(rows["status"], "error"))["media_id"])),
        segments=dict(sorted(Counter(rows["status"].to_pylist()).items())),
        segments_superseded=len(pc.unique(committed["segment_id"])) - rows.num_rows if index is not None else 0,
        frames=pc.sum(rows["num_frames"]).as_py() or 0,
        bytes=num_feature_bytes(rows),
        file_bytes=sum(sizes.get(name, 0) for name in commits.tables),
        files=len(commits.tables),
        is_indexed=index is not None and index.schema.metadata.get(INDEXED_KEY) == commits.digest(),
        recipe_hash=header["recipe_hash"],
        recipe=header["recipe"],
        rejects=count_rejects(_read_table(rejects)) if storage.exists(rejects) else {},
    )


def verify_store(uri: str) -> VerifyReport:
    """Reads all of the store at `uri` and holds it against its promises.

    Raises:
        ValueError: when there is none.
    """
    header = _header(uri)
    commits = read_commits(uri)
    committed = commits.rows()
    problems = []
    if recipe_hash(header["recipe"]) != header["recipe_hash"]:
        problems.append(Problem(file="store.json", what="recipe_hash is not the recipe's"))
    with ThreadPoolExecutor(VERIFY_THREADS) as pool:
        found = pool.map(lambda item: list(_check_file(uri, *item)), commits.tables.items())
        problems += [problem for of_file in found for problem in of_file]
    problems += _check_index(uri, commits)
    counts = _audit(uri, committed)
    if counts is not None and (counts["missing"] or counts["duplicate"]):
        problems.append(Problem(file=PLAN_FOLDER, what=f"planned is not ok + partial + error: {counts}"))
    there = _sizes(storage.join_uri(uri, DATA_FOLDER))
    return VerifyReport(
        files=len(commits.tables),
        rows=committed.num_rows,
        bytes=num_feature_bytes(committed),
        audit=counts,
        leftovers=len(there.keys() - commits.tables.keys()),
        problems=problems,
    )


def _check_file(uri: str, name: str, record: pa.Table) -> Iterator[Problem]:
    """What is wrong with a data file, row by row."""
    path = f"{DATA_FOLDER}/{name}"
    try:
        file = open_data_file(storage.join_uri(uri, path))
    except (OSError, pa.ArrowInvalid) as error:
        yield from _each_row(path, record, f"the file cannot be opened: {error}")
        return
    with file:
        if file.metadata.num_rows != record.num_rows:
            yield Problem(file=path, what=f"{file.metadata.num_rows} rows, its commit record has {record.num_rows}")
            return
        for number in range(file.metadata.num_row_groups):
            wanted = record.filter(pc.equal(record["row_group"], number)).sort_by("row_in_group")
            try:
                found = file.read_row_group(number, use_threads=False)
            except (OSError, pa.ArrowInvalid) as error:
                yield from _each_row(path, wanted, f"the row group cannot be read: {error}")
                continue
            yield from _check_rows(path, wanted, found)


def _check_rows(path: str, wanted: pa.Table, found: pa.Table) -> Iterator[Problem]:
    if found.num_rows != wanted.num_rows:
        yield from _each_row(path, wanted, f"its row group has {found.num_rows} rows instead of {wanted.num_rows}")
        return
    names = [name for name in FEATURES.names if name != "features"]
    features = found["features"].combine_chunks()
    valid = features.is_valid().to_pylist()
    pairs = zip(wanted.to_pylist(), found.select(names).to_pylist(), strict=True)
    for place, (record, row) in enumerate(pairs):
        differing = [name for name in names if row[name] != record[name]]
        fault = f"{', '.join(differing)} differ from the commit record" if differing else None
        value = memoryview(value_buffer(features, place)) if valid[place] else None
        fault = fault or features_fault(record, value)
        if fault is not None:
            yield _row_problem(path, record, fault)


def _check_index(uri: str, commits: Commits) -> Iterator[Problem]:
    """Every index row must be a committed one, once, and a medium's rows must be all of its segments."""
    index = _read_index(uri)
    if index is None:
        yield Problem(file=INDEX_FILE, what="there is none: the job has not finished; run it again")
        return
    committed = commits.rows()
    if index.schema.metadata.get(INDEXED_KEY) != commits.digest():
        yield Problem(file=INDEX_FILE, what="it was made from other data files than are committed; run the job again")
        return
    names = ["segment_id", "media_id", "status", *_PLACE]
    places = {tuple(row[name] for name in names) for row in committed.select(names).to_pylist()}
    seen: set[str] = set()
    segments: Counter[tuple[str, int]] = Counter()
    for row in index.select([*names, "num_segments"]).to_pylist():
        if row["segment_id"] in seen:
            yield _row_problem(INDEX_FILE, row, "the segment is there twice")
        elif tuple(row[name] for name in names) not in places:
            yield _row_problem(INDEX_FILE, row, f"no commit record says so of {row['file']}")
        seen.add(row["segment_id"])
        segments[(row["media_id"], row["num_segments"])] += 1
    for (media_id, num_segments), count in segments.items():
        if count != num_segments:
            yield Problem(file=INDEX_FILE, what=f"medium {media_id} has {count} of {num_segments} segments")
    for media_id in sorted(set(committed["media_id"].to_pylist()) - {media_id for media_id, _ in segments}):
        yield Problem(file=INDEX_FILE, what=f"medium {media_id} is committed but not there")


def _audit(uri: str, committed: pa.Table) -> dict[str, int] | None:
    parts = storage.list_files(storage.join_uri(uri, PLAN_FOLDER), ".parquet")
    if not parts:
        return None
    plans = (read_part(part) for part in parts)
    ids = (plan.filter(pc.equal(plan["status"], "planned"))["segment_id"] for plan in plans)
    return audit((segment_id for column in ids for segment_id in column.to_pylist()), committed)


def _each_row(path: str, record: pa.Table, what: str) -> Iterator[Problem]:
    yield from (_row_problem(path, row, what) for row in record.to_pylist())


def _row_problem(path: str, row: dict[str, Any], what: str) -> Problem:
    return Problem(
        file=path,
        what=what,
        row_group=row["row_group"],
        row_in_group=row["row_in_group"],
        segment_id=row["segment_id"],
        media_id=row["media_id"],
    )


def _header(uri: str) -> dict[str, Any]:
    header = read_header(uri)
    if header is None:
        raise ValueError(f"no feature store at {uri!r}; run jobs/preprocess.py with output: {uri}")
    return header


def _read_index(uri: str) -> pa.Table | None:
    path = storage.join_uri(uri, INDEX_FILE)
    return _read_table(path) if storage.exists(path) else None


def _read_table(uri: str) -> pa.Table:
    return pq.ParquetFile(pa.BufferReader(storage.read_bytes(uri))).read()


def _sizes(folder: str) -> dict[str, int]:
    """Name and bytes of each Parquet file in a folder."""
    filesystem, path = storage.split_uri(folder)
    found = filesystem.ls(path, detail=True) if filesystem.isdir(path) else []
    sizes = {PurePosixPath(item["name"]).name: int(item["size"] or 0) for item in found}
    return {name: size for name, size in sizes.items() if name.endswith(".parquet") and not name.startswith(".")}
