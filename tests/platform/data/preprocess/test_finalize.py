"""Index, rejects and audit computed some media at a time, compared with a reference that holds everything in memory."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from reference.synthetic_store import RECIPE, error_row, read_committed, segment_row
from timeviper_platform.common.schemas import PLAN
from timeviper_platform.data.preprocess.finalize import finalize_store, reject_table
from timeviper_platform.data.store.audit import Audit, audit, count_reasons
from timeviper_platform.data.store.commits import best_rows, num_feature_bytes
from timeviper_platform.data.store.sorted_runs import SortedRuns
from timeviper_platform.data.store.verify import verify_store
from timeviper_platform.data.store.writer import StoreWriter

STATUSES = ("ok", "ok", "ok", "partial", "error")


def synthetic_row(media_id: str, segment_index: int, segments: int, version: str, status: str) -> dict[str, Any]:
    name = {
        "segment_id": f"{media_id}-{version}-{segment_index}",
        "source_version": version,
        "segment_index": segment_index,
    }
    if status == "error":
        return error_row(media_id, "corrupt_file", num_segments=segments, **name)
    changes = {"status": status, "frames_missing": 1, "error_stage": "decode_video", "error_type": "corrupt_frame"}
    row = segment_row(media_id, segment_index, segments, torch.ones(2 + segment_index, 2, 4), **name)
    return row if status == "ok" else row | changes


def planned_rows(media_id: str, segments: int, version: str) -> list[dict[str, Any]]:
    medium = {"media_id": media_id, "source_version": version, "status": "planned", "uri": f"/{media_id}.mp4"}
    return [
        {**medium, "segment_id": f"{media_id}-{version}-{segment_index}", "segment_index": segment_index}
        for segment_index in range(segments)
    ]


def write_synthetic_store(uri: str, seed: int) -> tuple[list[pa.Table], dict[str, str]]:
    """Writes a store with two versions of media, repaired errors, gaps, duplicates and unplanned media.

    Returns its plan and the versions of an older index.
    """
    random_ = random.Random(seed)
    planned: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    older: dict[str, str] = {}
    for number in random_.sample(range(50), 50):
        media_id, segments = f"m{number:02d}", random_.randint(1, 4)
        for version in random_.choice([["v1"], ["v2"], ["v1", "v2"], ["v2", "v1"]]):
            for segment_index in range(segments):
                times = random_.choice([0, 1, 1, 1, 1, 1, 2])  # missing, once, duplicated
                rows += [
                    synthetic_row(media_id, segment_index, segments, version, random_.choice(STATUSES))
                    for _ in range(times)
                ]
        if random_.random() < 0.4:
            older[media_id] = random_.choice(["v1", "v2"])
        if random_.random() < 0.7:
            for _ in range(random_.choice([1, 1, 1, 2])):  # a manifest may name a medium twice
                planned += planned_rows(media_id, segments, random_.choice(["v1", "v2"]))
        elif random_.random() < 0.5:
            failed = {"error_stage": "probe", "error_type": random_.choice(["not_found", "corrupt_file"])}
            planned += [{"media_id": media_id, "uri": "/x", "status": "error", "segment_id": "", **failed}]
    random_.shuffle(rows)
    writer = StoreWriter.create(uri, RECIPE)
    for start in range(0, len(rows), 25):
        writer.write_file(f"{random_.random():.9f}", rows[start : start + 25])
    names = [field.name for field in PLAN]
    table = pa.Table.from_pylist(
        [{"source_version": "", "error_message": "synthetic", **row} for row in planned], schema=PLAN.remove_metadata()
    ).select(names)
    return [table.slice(start, 11) for start in range(0, table.num_rows, 11)], older


def reference_index(committed: pa.Table, plan: pa.Table, older: dict[str, str]) -> pa.Table:
    versions = dict(older)
    for row in plan.to_pylist():
        if row["status"] == "planned":
            versions[row["media_id"]] = row["source_version"]
    rows = []
    for row in committed.to_pylist():
        if versions.setdefault(row["media_id"], row["source_version"]) == row["source_version"]:
            rows.append(row)
    best = best_rows(pa.Table.from_pylist(rows, schema=committed.schema))
    return best.sort_by([("media_id", "ascending"), ("segment_index", "ascending")])


@pytest.mark.parametrize("seed", range(3))
def test_a_store_finalized_in_parts_equals_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(SortedRuns, "run_bytes", 4000)
    monkeypatch.setattr(SortedRuns, "batch_rows", 3)
    uri = str(tmp_path)
    parts, older = write_synthetic_store(uri, seed)
    StoreWriter.open(uri, index_row_group_rows=8).write_index(older)
    committed, plan = read_committed(uri), pa.concat_tables(parts)
    indexed = pq.read_table(tmp_path / "index.parquet")
    assert indexed.to_pylist() == reference_index(committed, plan.slice(0, 0), older).to_pylist()
    previous = dict(zip(indexed["media_id"].to_pylist(), indexed["source_version"].to_pylist(), strict=True))
    totals = finalize_store(uri, parts, row_group_rows=8)
    expected = reference_index(committed, plan, previous)
    found = pq.read_table(tmp_path / "index.parquet")
    assert found.to_pylist() == expected.to_pylist()
    groups = pq.ParquetFile(tmp_path / "index.parquet").metadata
    assert {groups.row_group(number).num_rows for number in range(groups.num_row_groups - 1)} == {8}
    planned_ids = [row["segment_id"] for row in plan.to_pylist() if row["status"] == "planned"]
    counts = audit(plan, committed)
    assert totals.audit == counts
    assert counts.segments.planned == len(set(planned_ids))
    assert counts.media.planned == len(set(plan["media_id"].to_pylist()))
    for of in (counts.media, counts.segments):
        assert of.planned == of.ok + of.partial + of.rejected + of.missing
        assert min(of.ok, of.partial, of.rejected, of.missing) > 0
    assert counts.segments.duplicate > 0
    mine = expected.filter(pa.array([name in set(planned_ids) for name in expected["segment_id"].to_pylist()]))
    rejects = reject_table(plan, mine)
    assert (totals.frames, totals.bytes) == (sum(mine["num_frames"].to_pylist()), num_feature_bytes(mine))
    assert totals.errors_by_stage() == count_reasons(rejects)
    order = [(name, "ascending") for name in ("media_id", "status", "error_stage", "error_type")]
    assert pq.read_table(tmp_path / "rejects.parquet").sort_by(order).equals(rejects.sort_by(order))


def test_an_empty_plan_of_an_empty_store_gives_an_empty_index(tmp_path: Path) -> None:
    StoreWriter.create(str(tmp_path), RECIPE)
    totals = finalize_store(str(tmp_path), [])
    assert totals.audit == Audit()
    assert (
        pq.read_table(tmp_path / "index.parquet").num_rows == pq.read_table(tmp_path / "rejects.parquet").num_rows == 0
    )


def test_verification_compares_a_store_with_its_stored_plan(tmp_path: Path) -> None:
    uri = str(tmp_path)
    writer = StoreWriter.create(uri, RECIPE)
    writer.write_file("a", [synthetic_row("m", segment_index, 3, "v1", "ok") for segment_index in range(2)])
    (tmp_path / "plan").mkdir()
    rows = [{**row, "num_segments": 3} for row in planned_rows("m", 3, "v1")]
    pq.write_table(pa.Table.from_pylist(rows, schema=PLAN), tmp_path / "plan" / "part-000000.parquet")
    writer.write_index()
    report = verify_store(uri)
    assert report.audit is not None
    assert str(report.audit.segments) == "3 planned = 2 ok + 0 partial + 0 rejected + 1 missing"
    assert str(report.audit.media) == "1 planned = 0 ok + 0 partial + 0 rejected + 1 missing"
    assert any("planned is not ok + partial + rejected" in problem.what for problem in report.problems)
