"""Compacting, verifying and inspecting a store."""

from __future__ import annotations

import itertools
import runpy
import shutil
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from reference.synthetic_store import RECIPE, error_row, read_committed, segment_row, write_files
from timeviper_platform.common import storage
from timeviper_platform.data.store.commits import CommitLog
from timeviper_platform.data.store.compact import compact
from timeviper_platform.data.store.inspect import inspect_store
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.data.store.sorted_runs import SortedRuns
from timeviper_platform.data.store.verify import verify_store
from timeviper_platform.data.store.writer import StoreWriter, write_store

ROOT = Path(__file__).parents[4]
FILE_BYTES = 4096


def synthetic_rows(media_id: str, num_segments: int = 1, **changes: Any) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(sum(media_id.encode()))
    features = torch.randn(num_segments, 16, 2, 8, generator=generator).bfloat16()  # 512 bytes a segment
    return [segment_row(media_id, index, num_segments, piece, **changes) for index, piece in enumerate(features)]


@pytest.fixture
def store(tmp_path: Path) -> str:
    return make_store(str(tmp_path / "store"), 20)


def make_store(uri: str, num_small: int) -> str:
    """A store of small files, a large file, a superseded row and an error."""
    old = [row | {"segment_id": "old", "source_version": "v0"} for row in synthetic_rows("m00")]
    files = {"old": old, "large": synthetic_rows("large", 6), "failed": [error_row("bad")]}
    files |= {f"f{number:02d}": synthetic_rows(f"m{number:02d}", 1 + number % 2) for number in range(num_small)}
    write_files(uri, files)
    return uri


def contents(uri: str) -> dict[str, bytes]:
    opened = FeatureStore.open(uri, cache_bytes=1)
    return {m: opened.read(m).features.view(torch.int16).numpy().tobytes() for m in opened.media_ids}


def statuses(uri: str) -> list[tuple[str, str]]:
    rows = pq.ParquetFile(f"{uri}/index.parquet").read(columns=["segment_id", "status"]).to_pylist()
    return [(row["segment_id"], row["status"]) for row in rows]


def test_small_files_become_few_of_the_configured_size(store: str) -> None:
    before, rows = contents(store), statuses(store)
    report = compact(store, file_bytes=FILE_BYTES)
    assert (report.files_before, report.rows_dropped) == (23, 1)
    assert report.rows_copied == 31  # 10 media of one segment, 10 of two, one error
    assert report.files_after == len(list(Path(store, "data").iterdir())) == report.files_written + 1 < 8
    assert contents(store) == before
    assert statuses(store) == rows
    sizes = [
        sum(len(value) for value in pq.ParquetFile(path).read()["features"].to_pylist() if value)
        for path in Path(store, "data").glob("*.parquet")
        if path.name != "large.parquet"
    ]
    assert max(sizes) <= FILE_BYTES
    assert sum(2 * size >= FILE_BYTES for size in sizes) >= len(sizes) - 1
    assert Path(store, "data", "large.parquet").exists()  # 3072 bytes of 4096: large enough
    assert verify_store(store).problems == []
    again = compact(store, file_bytes=FILE_BYTES)
    assert (again.files_written, again.rows_copied) == (0, 0)


def test_a_compaction_killed_at_any_write_or_removal_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(str(tmp_path / "store"), 3)
    expected, rows = contents(store), statuses(store)
    write_bytes, remove = storage.write_atomic, storage.remove
    for moment in itertools.count():
        copy = str(tmp_path / f"copy{moment}")
        shutil.copytree(store, copy)
        left = iter(range(moment))

        def dies_in_time(action: Any, left: Any = left) -> Any:
            def act(*arguments: Any) -> None:
                if next(left, None) is None:
                    raise KeyboardInterrupt
                action(*arguments)

            return act

        monkeypatch.setattr(storage, "write_atomic", dies_in_time(write_bytes))
        monkeypatch.setattr(storage, "remove", dies_in_time(remove))
        try:
            compact(copy, file_bytes=FILE_BYTES)
            killed = False
        except KeyboardInterrupt:
            killed = True
        monkeypatch.setattr(storage, "write_atomic", write_bytes)
        monkeypatch.setattr(storage, "remove", remove)
        assert contents(copy) == expected  # what a reader sees that opens the store now
        committed = read_committed(copy)["segment_id"].to_pylist()
        assert len(committed) == len(set(committed))
        assert set(committed) - {"old"} == {segment_id for segment_id, _ in rows}
        if moment % 2:
            StoreWriter.open(copy).remove_uncommitted()  # as the next run does
        else:
            compact(copy, file_bytes=FILE_BYTES)
        assert contents(copy) == expected
        assert statuses(copy) == rows
        assert verify_store(copy).problems == []
        compact(copy, file_bytes=FILE_BYTES)
        assert len(list(Path(copy, "data").iterdir())) == len(list(Path(copy, "commits").iterdir())) <= 3
        if not killed:
            break
    # the lease, data and commit, index, removals, the last record, the lease's removal
    assert moment == 1 + 2 + 1 + 2 * 5 + 1 + 1


def test_a_reader_that_opened_the_store_before_reads_on(store: str) -> None:
    before = contents(store)
    opened = FeatureStore.open(store, cache_bytes=1)
    half = opened.read("m03", [20])  # an open file whose name goes away
    compact(store, file_bytes=FILE_BYTES)
    for media_id, expected in before.items():
        assert opened.read(media_id).features.view(torch.int16).numpy().tobytes() == expected
    assert torch.equal(opened.read("m03", [20]).features, half.features)


def test_a_reader_whose_version_is_gone_gets_an_error(store: str) -> None:
    opened = FeatureStore.open(store, cache_bytes=1)
    new = [row | {"segment_id": "new", "source_version": "v2"} for row in synthetic_rows("m02")]
    writer = StoreWriter.open(store)
    writer.write_file("new", new)
    writer.write_index({"m02": "v2"})
    assert compact(store, file_bytes=FILE_BYTES).rows_dropped == 2
    with pytest.raises(RuntimeError, match=r"m02: the store at .* now holds another version; open it again"):
        opened.read("m02")
    assert opened.read("m04").features.shape[0] == 16


def test_rows_that_are_not_indexed_yet_survive_and_names_can_be_used_again(store: str) -> None:
    repaired = synthetic_rows("bad")[0] | {"segment_id": "bad-0"}
    writer = StoreWriter.open(store)
    writer.write_file("later", [repaired, *synthetic_rows("next")])
    compact(store, file_bytes=FILE_BYTES)  # the job was killed before it wrote the index
    committed = read_committed(store)
    assert {"old", "next-0", "bad-0"} <= set(committed["segment_id"].to_pylist())
    writer.write_file("f00", synthetic_rows("again"))  # a name that was replaced
    writer.write_index()
    assert {"again", "bad", "next"} <= set(FeatureStore.open(store).media_ids)


def test_files_with_nothing_but_superseded_rows_disappear(tmp_path: Path) -> None:
    uri = str(tmp_path)
    write_files(uri, {"a": synthetic_rows("m"), "b": synthetic_rows("m", source_version="v2", segment_id="m-new")})
    report = compact(uri, file_bytes=600)  # the new row's file is large enough, the old one's holds nothing
    assert (report.rows_dropped, report.files_after) == (1, 1)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["b.parquet"]
    assert verify_store(uri).problems == []


def test_row_groups_of_merged_files_are_as_large_as_configured(store: str) -> None:
    before = contents(store)
    compact(store, row_group_bytes=1024)
    (path,) = Path(store, "data").iterdir()
    file = pq.ParquetFile(path)
    sizes = [file.read_row_group(number)["features"].nbytes for number in range(file.num_row_groups)]
    assert min(sizes[:-1]) >= 1024
    assert len(sizes) == 18  # 36 rows of 512 bytes
    assert contents(store) == before
    with pytest.raises(ValueError, match="row_group_bytes = 0"):
        compact(store, row_group_bytes=0)


def test_damage_is_not_copied(store: str) -> None:
    corrupt(Path(store, "data", "f07.parquet"), 1)
    before = sorted(path.name for path in Path(store, "data").iterdir())
    with pytest.raises(RuntimeError, match=r"segment m07-1 of medium m07: the xxh64 of the features is not"):
        compact(store, file_bytes=1 << 20)
    assert sorted(path.name for path in Path(store, "data").iterdir()) == before
    with pytest.raises(ValueError, match="no feature store"):
        compact(store + "-none")
    with pytest.raises(ValueError, match="file_bytes"):
        compact(store, file_bytes=0)


def corrupt(path: Path, row: int) -> None:
    """Flips one bit in the features of a row."""
    features = pq.ParquetFile(path).read()["features"][row].as_py()
    data = bytearray(path.read_bytes())
    data[bytes(data).index(features) + 100] ^= 1
    path.write_bytes(data)


def test_every_bad_row_is_named(store: str) -> None:
    assert verify_store(store).problems == []
    corrupt(Path(store, "data", "f07.parquet"), 1)
    Path(store, "data", "f08.parquet").unlink()
    Path(store, "data", "f10.parquet").write_bytes(b"nothing")
    Path(store, "data", "left.parquet").write_bytes(b"half")
    writer = StoreWriter.create(store, RECIPE)
    longer = [row | {"duration_seconds": 1.0} for row in synthetic_rows("m12")]
    record = Path(store, "commits", "f12.parquet").read_bytes()
    for name in ("f12", "f14"):
        Path(store, "commits", f"{name}.parquet").unlink()
    writer.write_file("f12", longer)
    Path(store, "commits", "f12.parquet").write_bytes(record)
    writer.write_file("f14", [row | {"features": b"short"} for row in synthetic_rows("m14")])
    report = verify_store(store)
    found = {(problem.file, problem.segment_id): problem.what for problem in report.problems}
    assert len(report.problems) == len(found) == 5
    assert found["data/f07.parquet", "m07-1"] == "the xxh64 of the features is not the stored one"
    assert "cannot be opened" in found["data/f08.parquet", "m08-0"]
    assert "cannot be opened" in found["data/f10.parquet", "m10-0"]
    assert found["data/f12.parquet", "m12-0"] == "duration_seconds differ from the commit record"
    assert found["data/f14.parquet", "m14-0"] == "5 bytes of features instead of 512"
    assert report.leftovers == 1
    assert "row group 0 row 1 segment m07-1 of medium m07" in "\n".join(report.lines())


def test_more_problems_than_a_report_lists_are_counted(store: str) -> None:
    for path in Path(store, "data").iterdir():
        path.write_bytes(b"gone")
    whole = verify_store(store)
    assert len(whole.problems) == whole.num_problems == whole.rows > 4
    report = verify_store(store, max_problems=4)
    assert (report.problems, report.num_problems) == (whole.problems[:4], whole.num_problems)
    assert f"BAD        and {whole.num_problems - 4} more" in report.lines()
    assert report.lines()[-1].startswith(f"result     {whole.num_problems} problems.")


def test_index_rows_without_a_commit_are_found(store: str) -> None:
    index = pq.ParquetFile(f"{store}/index.parquet").read()
    doubled = index.take([0, 0, *range(2, index.num_rows)])
    pq.write_table(doubled.replace_schema_metadata(index.schema.metadata), f"{store}/index.parquet")
    problems = "\n".join(str(problem) for problem in verify_store(store).problems)
    assert "duplicate segment" in problems
    Path(store, "commits", "f02.parquet").unlink()
    assert "built from other data files" in str(verify_store(store).problems[0])
    Path(store, "index.parquet").unlink()
    assert "the job has not finished" in str(verify_store(store).problems[0])


def test_an_index_that_lacks_a_segment_is_found(store: str) -> None:
    index = pq.ParquetFile(f"{store}/index.parquet").read()
    pq.write_table(index.slice(1), f"{store}/index.parquet")
    assert [str(p) for p in verify_store(store).problems] == ["index.parquet: medium bad is committed but not indexed"]
    pq.write_table(index.slice(2), f"{store}/index.parquet")
    assert [str(p) for p in verify_store(store).problems] == [
        "index.parquet: medium large has 5 of 6 segments",
        "index.parquet: medium bad is committed but not indexed",
    ]


def test_inspect_counts_media_segments_frames_and_bytes(store: str) -> None:
    summary = inspect_store(store)
    assert (summary.media.parts(), summary.segments.parts()) == (
        "21 ok + 0 partial + 1 rejected",
        "36 ok + 0 partial + 1 rejected",
    )
    assert summary.segments_superseded == 1
    assert (summary.frames, summary.bytes, summary.files) == (36 * 16, 36 * 512, 23)
    assert summary.file_bytes == sum(path.stat().st_size for path in Path(store, "data").iterdir())
    assert summary.is_indexed
    assert summary.recipe == RECIPE
    StoreWriter.open(store).write_file("new", synthetic_rows("new"))
    assert not inspect_store(store).is_indexed
    assert "run the job again" in "\n".join(inspect_store(store).lines())


@pytest.mark.parametrize(
    "action",
    [
        inspect_store,
        # with more threads the peak varies
        pytest.param(partial(verify_store, num_threads=1), marks=pytest.mark.slow),
        pytest.param(partial(compact, file_bytes=12_000, index_row_group_rows=16), marks=pytest.mark.slow),
    ],
)
def test_three_times_the_files_take_no_more_memory(
    action: Callable[[str], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for owner, name, value in (
        (SortedRuns, "run_bytes", 200_000),
        (SortedRuns, "batch_rows", 2),
        (CommitLog, "read_ahead", 2),
    ):
        monkeypatch.setattr(owner, name, value)
    peaks = []
    for num_files in (7, 8, 24):  # the first: what only a first time takes
        uri = str(tmp_path / str(num_files))
        message = {"error_message": "long " * 2000}  # 10 KB per row
        write_files(uri, {f"f{n:03d}": synthetic_rows(f"m{n:03d}", 8, **message) for n in range(num_files)})
        pool = pa.proxy_memory_pool(pa.system_memory_pool())  # counts from here
        before = pa.default_memory_pool()
        pa.set_memory_pool(pool)
        tracemalloc.start()
        action(uri)
        peaks.append(pool.max_memory() + tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        pa.set_memory_pool(before)
    assert peaks[2] < 1.5 * peaks[1] + 100_000  # 1.9 MB of rows are in the larger one


def test_the_job_prints_a_report_and_fails_if_verification_finds_a_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(ROOT / "jobs" / "store.py"))["main"]
    uri = str(tmp_path / "store")
    write_store(uri, {f"m{number}": torch.randn(4, 2, 8) for number in range(3)}, recipe=RECIPE)
    assert main(["inspect", uri]) == 0
    assert "frames     12" in capsys.readouterr().out
    assert main(["verify", uri]) == 0
    assert "nothing wrong" in capsys.readouterr().out
    assert main(["compact", uri, "--file-mb", "1"]) == 0
    assert "files      1 before, 1 after; written: 0" in capsys.readouterr().out
    (path,) = Path(uri, "data").iterdir()
    corrupt(path, 2)
    assert main(["verify", uri]) == 1
    assert "BAD        data/" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "none")]) == 1
    assert "no feature store" in capsys.readouterr().err
