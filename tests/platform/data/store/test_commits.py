"""Commit records: lost files, late workers and repairs."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from reference.synthetic_store import RECIPE, error_row, read_committed, segment_row, write_files
from timeviper_platform.common import storage
from timeviper_platform.common.schemas import PLAN
from timeviper_platform.data.plan.stored_plan import finished_segments
from timeviper_platform.data.preprocess.finalize import finalize_store
from timeviper_platform.data.store.audit import Outcomes
from timeviper_platform.data.store.commits import CommitLog
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.data.store.verify import verify_store
from timeviper_platform.data.store.writer import StoreWriter


@pytest.fixture(params=["local disk", "object store"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "store") if request.param == "local disk" else f"memory://{uuid.uuid4().hex}/store"


def synthetic_row(media_id: str, status: str = "ok", value: float = 1.0) -> dict:
    name = {"segment_id": uuid.uuid5(uuid.NAMESPACE_URL, media_id).hex}
    if status == "error":
        return error_row(media_id, "read_failed", **name)
    return segment_row(media_id, 0, 1, torch.full((4, 2, 4), value), **name) | {"status": status}


def plan_of(*media: str) -> pa.Table:
    rows = [{**synthetic_row(media_id), "status": "planned"} for media_id in media]
    return pa.Table.from_pylist([{name: row.get(name) for name in PLAN.names} for row in rows], schema=PLAN)


def test_a_worker_that_commits_after_the_next_run_has_begun_loses_no_rows(
    uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_files(uri, {"a": [synthetic_row("a")]})
    writer = StoreWriter.create(uri, RECIPE)
    removed = []

    class LateCommits(CommitLog):
        def write(self, name: str, rows: pa.Table, replaces: Sequence[str] = ()) -> None:
            removed.append(StoreWriter.open(uri).remove_uncommitted())  # the next run begins
            super().write(name, rows, replaces)

    late = StoreWriter.open(uri)
    late.commits = LateCommits(uri)
    late.write_file("b", [synthetic_row("b")])
    assert removed == [1]
    assert read_committed(uri).num_rows == 2
    assert len(finished_segments(uri)) == 1
    assert any("data/b.parquet" in str(problem) for problem in verify_store(uri).problems)
    totals = finalize_store(uri, [plan_of("a", "b")])
    assert totals.audit.segments == Outcomes(planned=2, ok=1, missing=1)
    assert "b.parquet is committed but has no data file" in caplog.text
    assert list(FeatureStore.open(uri).media_ids) == ["a"]
    assert writer.remove_uncommitted() == 0
    writer.write_file("b", [synthetic_row("b")])
    assert finalize_store(uri, [plan_of("a", "b")]).audit.segments == Outcomes(planned=2, ok=2)
    assert FeatureStore.open(uri).read("b").features.sum() == 32
    assert verify_store(uri).problems == []


def test_a_run_begins_without_the_records_of_lost_files(uri: str) -> None:
    write_files(uri, {name: [synthetic_row(name)] for name in "abcd"})
    for name in "bd":
        storage.remove(f"{uri}/data/{name}.parquet")
    assert StoreWriter.open(uri).remove_uncommitted() == 2
    assert read_committed(uri)["media_id"].to_pylist() == ["a", "c"]
    assert len(finished_segments(uri)) == 2


def test_a_record_that_replaces_others_does_so_with_its_data_file_alone(uri: str) -> None:
    write_files(uri, {"a": [synthetic_row("a")], "b": [synthetic_row("b")]})
    rows = [synthetic_row("a"), synthetic_row("b")]
    writer = StoreWriter.open(uri)
    writer.write_file("merged", rows, replaces=["a.parquet", "b.parquet"])
    storage.remove(f"{uri}/data/merged.parquet")
    assert writer.remove_uncommitted() == 1
    assert read_committed(uri)["file"].to_pylist() == ["a.parquet", "b.parquet"]


def test_a_late_worker_takes_nothing_from_a_newer_one_and_a_repair_replaces_an_error(uri: str) -> None:
    writer = StoreWriter.create(uri, RECIPE)

    def write(*statuses: str, value: float) -> list[str]:
        rows = [synthetic_row(f"m{number}", status, value) for number, status in enumerate(statuses)]
        return [row["status"] for row in writer.write_file("unit", rows)]

    def stored() -> list[float]:
        writer.write_index()
        store = FeatureStore.open(uri)
        return [store.read(media_id).features[0, 0, 0].item() for media_id in store.media_ids]

    assert write("ok", "error", value=1.0) == ["ok", "error"]
    assert write("error", "error", value=2.0) == write("ok", "error", value=2.0) == ["ok", "error"]
    assert stored() == [1.0]
    assert write("ok", "ok", value=3.0) == ["ok", "ok"]
    assert stored() == [3.0, 3.0]
    storage.remove(f"{uri}/data/unit.parquet")
    assert write("ok", "ok", value=4.0) == ["ok", "ok"]
    assert stored() == [4.0, 4.0]


def test_files_that_cannot_be_listed_are_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path / "store")
    write_files(uri, {"a": [synthetic_row("a")]})
    scandir = os.scandir

    def fail(path: str) -> object:
        if path.endswith("/data"):
            raise OSError(errno.EIO, "input/output error")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(OSError, match="input/output error"):
        StoreWriter.open(uri).remove_uncommitted()
    monkeypatch.undo()
    assert len(finished_segments(uri)) == 1
