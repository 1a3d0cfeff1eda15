"""Checks every byte of a store against checksums, commit records, index and plan."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from timeviper_platform.common import storage
from timeviper_platform.common.listing import pages
from timeviper_platform.common.schemas import FEATURES, INDEX, PLAN
from timeviper_platform.data.encode.recipe import recipe_hash
from timeviper_platform.data.store.audit import Audit, audit
from timeviper_platform.data.store.commits import CommitLog, files_digest, num_feature_bytes
from timeviper_platform.data.store.index_writer import index_tables, read_files_digest
from timeviper_platform.data.store.layout import (
    COMMITS_FOLDER,
    DATA_FOLDER,
    INDEX_FILE,
    PLAN_FOLDER,
    read_header,
    read_plan_file,
)
from timeviper_platform.data.store.row_groups import open_data_file, value_buffer
from timeviper_platform.data.store.sorted_runs import SortedRuns, merge_runs
from timeviper_platform.data.store.writer import features_fault

VERIFY_THREADS = 4
"""Files verified at once; each holds one row group, up to 20 MB."""

MAX_PROBLEMS = 1000
"""Maximum listed problems; all are counted."""

_LOCATION = ("file", "row_group", "row_in_group")
_COMMITTED = pa.schema([INDEX.field(name) for name in ("segment_id", "media_id", "status", *_LOCATION)])
_INDEXED = _COMMITTED.append(INDEX.field("num_segments"))
_PLANNED = pa.schema([PLAN.field(name) for name in ("segment_id", "media_id", "status")])


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    file: str
    """path within the store"""
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
    files: int
    rows: int
    bytes: int
    """bytes of features read"""
    audit: Audit | None
    """counts of the last run's plan; None without a plan"""
    leftovers: int
    """uncommitted data files, removed by the next run"""
    problems: list[Problem]
    """the first `max_problems`"""
    num_problems: int

    def lines(self) -> list[str]:
        lines = [
            f"verified   {self.files} data files, {self.rows} rows, {self.bytes / 1e6:.1f} MB of features",
            f"media      {self.audit.media if self.audit else 'no plan'}",
            f"segments   {self.audit.segments if self.audit else 'no plan'}",
            f"leftovers  {self.leftovers} data files without a commit record",
            *(f"BAD        {problem}" for problem in self.problems),
        ]
        if self.num_problems > len(self.problems):
            lines.append(f"BAD        and {self.num_problems - len(self.problems)} more")
        if not self.problems:
            return [*lines, "result     nothing wrong"]
        return [
            *lines,
            f"result     {self.num_problems} problems. To redo the bad rows, remove the files of the same names from"
            f" {COMMITS_FOLDER}/ and run jobs/preprocess.py with the same configuration",
        ]


def verify_store(uri: str, *, max_problems: int = MAX_PROBLEMS, num_threads: int = VERIFY_THREADS) -> VerifyReport:
    """Verifies the store at `uri`; raises ValueError if there is none."""
    header, commits = read_header(uri), CommitLog(uri)
    problems = _Problems(max_problems)
    if recipe_hash(header["recipe"]) != header["recipe_hash"]:
        problems.add([Problem(file="store.json", what="recipe_hash does not match the recipe")])
    lost = pa.array(commits.lost(), pa.string())
    files, with_rows = set(), []
    num_rows = num_bytes = 0
    with tempfile.TemporaryDirectory(prefix="timeviper-verify-") as folder:
        committed = SortedRuns(Path(folder, "committed"), _COMMITTED, "media_id")
        with ThreadPoolExecutor(num_threads) as pool:
            for page in pages(commits.current_records(), 4 * num_threads):
                for name, record in page:
                    files.add(name)
                    with_rows += [name] if record.num_rows else []
                    num_rows += record.num_rows
                    num_bytes += num_feature_bytes(record)
                    committed.add(record)
                for of_file in pool.map(lambda item: list(_check_file(uri, *item)), page):
                    problems.add(of_file)
        indexed = SortedRuns(Path(folder, "indexed"), _INDEXED, "media_id")
        fault = _index_fault(uri, with_rows)
        if fault is None:
            for table in index_tables(uri, _INDEXED.names):
                indexed.add(table)
        else:
            problems.add([Problem(file=INDEX_FILE, what=fault)])
        planned = SortedRuns(Path(folder, "planned"), _PLANNED, "media_id")
        parts = storage.files_in(storage.join_uri(uri, PLAN_FOLDER), ".parquet")
        for part in parts:
            planned.add(read_plan_file(part))
        counts = Audit()
        for of_plan, of_commits, of_index in merge_runs([planned, committed, indexed], "media_id"):
            if fault is None:
                problems.add(_check_media(of_commits, of_index))
            there = of_commits.filter(pc.invert(pc.is_in(of_commits["file"], lost)))
            counts += audit(of_plan, there)
    if parts and (counts.segments.missing or counts.segments.duplicate):
        what = f"planned is not ok + partial + rejected: {counts.segments} segments"
        problems.add([Problem(file=PLAN_FOLDER, what=what)])
    return VerifyReport(
        files=len(files),
        rows=num_rows,
        bytes=num_bytes,
        audit=counts if parts else None,
        leftovers=sum(name not in files for name in commits.data_files()),
        problems=problems.first,
        num_problems=problems.count,
    )


class _Problems:
    def __init__(self, max_problems: int) -> None:
        self._max_problems = max_problems
        self.first: list[Problem] = []
        self.count = 0

    def add(self, found: Iterable[Problem]) -> None:
        for problem in found:
            self.count += 1
            if len(self.first) < self._max_problems:
                self.first.append(problem)


def _check_file(uri: str, name: str, record: pa.Table) -> Iterator[Problem]:
    path = f"{DATA_FOLDER}/{name}"
    try:
        file = open_data_file(storage.join_uri(uri, path), verify_pages=False)
    except (OSError, pa.ArrowInvalid) as error:
        yield from _each_row(path, record, f"the file cannot be opened: {error}")
        return
    with file:
        if file.metadata.num_rows != record.num_rows:
            yield Problem(file=path, what=f"{file.metadata.num_rows} rows, its commit record has {record.num_rows}")
            return
        for number in range(file.metadata.num_row_groups):
            expected = record.filter(pc.equal(record["row_group"], number)).sort_by("row_in_group")
            try:
                found = file.read_row_group(number, use_threads=False)
            except (OSError, pa.ArrowInvalid) as error:
                yield from _each_row(path, expected, f"the row group cannot be read: {error}")
                continue
            yield from _check_rows(path, expected, found)


def _check_rows(path: str, expected: pa.Table, found: pa.Table) -> Iterator[Problem]:
    if found.num_rows != expected.num_rows:
        yield from _each_row(path, expected, f"its row group has {found.num_rows} rows instead of {expected.num_rows}")
        return
    names = [name for name in FEATURES.names if name != "features"]
    features = found["features"].combine_chunks()
    valid = features.is_valid().to_pylist()
    pairs = zip(expected.to_pylist(), found.select(names).to_pylist(), strict=True)
    for index, (record, row) in enumerate(pairs):
        differing = [name for name in names if row[name] != record[name]]
        fault = f"{', '.join(differing)} differ from the commit record" if differing else None
        value = memoryview(value_buffer(features, index)) if valid[index] else None
        fault = fault or features_fault(record, value)
        if fault is not None:
            yield _row_problem(path, record, fault)


def _index_fault(uri: str, with_rows: list[str]) -> str | None:
    """Returns why the index rows need no check, or None."""
    digest = read_files_digest(uri)
    if digest is None:
        return "missing: the job has not finished; run it again"
    if digest != files_digest(with_rows):
        return "built from other data files than are committed; run the job again"
    return None


def _check_media(committed: pa.Table, indexed: pa.Table) -> Iterator[Problem]:
    names = ["segment_id", "media_id", "status", *_LOCATION]
    committed_rows = {tuple(row[name] for name in names) for row in committed.select(names).to_pylist()}
    seen: set[str] = set()
    segments: Counter[tuple[str, int]] = Counter()
    for row in indexed.to_pylist():
        if row["segment_id"] in seen:
            yield _row_problem(INDEX_FILE, row, "duplicate segment")
        elif tuple(row[name] for name in names) not in committed_rows:
            yield _row_problem(INDEX_FILE, row, f"not in the commit record of {row['file']}")
        seen.add(row["segment_id"])
        segments[(row["media_id"], row["num_segments"])] += 1
    for (media_id, num_segments), count in segments.items():
        if count != num_segments:
            yield Problem(file=INDEX_FILE, what=f"medium {media_id} has {count} of {num_segments} segments")
    for media_id in sorted(set(committed["media_id"].to_pylist()) - {media_id for media_id, _ in segments}):
        yield Problem(file=INDEX_FILE, what=f"medium {media_id} is committed but not indexed")


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
