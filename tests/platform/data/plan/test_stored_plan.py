"""Stored plans: counts, plan files and comparison with committed segments, in bounded memory."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reference.synthetic_media import make_encoder
from timeviper_platform.common import storage
from timeviper_platform.common.hash_table import HashTable
from timeviper_platform.data.encode.frame_encoder import VisionTowerConfig
from timeviper_platform.data.inputs.readers import read_pages
from timeviper_platform.data.media.medium import Medium
from timeviper_platform.data.plan.segments import PlanSpec
from timeviper_platform.data.plan.stored_plan import finished_segments, plan_here, write_plan
from timeviper_platform.data.preprocess import ray_graph as graph
from timeviper_platform.data.preprocess.config import PreprocessConfig
from timeviper_platform.data.preprocess.estimate import estimate
from timeviper_platform.data.preprocess.tasks import cut_tasks
from timeviper_platform.data.store.writer import StoreWriter

ROOT = Path(__file__).resolve().parents[4]
SPEC = PlanSpec(fps=Fraction(1), recipe_hash="r")
WITH_PEAK = """
import runpy, sys
from timeviper_platform.benchmarks.measure import peak_resident_bytes
del sys.argv[0]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(peak_resident_bytes())
"""
"""Runs the program in its arguments, then prints its peak memory."""


def write_manifest(path: Path, num_rows: int, *, longest_seconds: float = 600.0) -> np.ndarray:
    """Writes rows that need no probing; returns their durations in seconds."""
    durations = np.random.default_rng(0).uniform(20, longest_seconds, num_rows).round(3)
    schema = pa.schema([("uri", pa.string()), ("size", pa.int64()), ("duration_seconds", pa.float64())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, num_rows, 100_000):
            part = durations[start : start + 100_000]
            names = [f"/nowhere/{start + number:09d}.mp4" for number in range(len(part))]
            writer.write_table(pa.table([names, [7] * len(part), part], schema=schema))
    return durations


def test_a_plan_is_stored_in_several_files_and_read_again(tmp_path: Path) -> None:
    durations = write_manifest(tmp_path / "m.parquet", 300)
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "plan.parquet").write_bytes(b"of an earlier run")
    pages = read_pages(str(tmp_path / "m.parquet"), page_rows=64)
    plan = write_plan(str(tmp_path), plan_here(pages, replace(SPEC, max_table_rows=100)), HashTable())
    frames = [math.ceil(seconds) for seconds in durations]
    counts = plan.counts
    assert (counts.media, counts.frames, counts.segments) == (300, sum(frames), sum(-(-n // 64) for n in frames))
    assert sorted(str(path) for path in (tmp_path / "plan").iterdir()) == plan.plan_files
    assert len(plan.plan_files) > 10
    assert max(pq.read_metadata(part).num_rows for part in plan.plan_files) < 100 + 10
    found = list(plan.segments)
    assert len(found) == len(plan.segments) == counts.segments
    assert plan.segments[7] == found[7]
    assert sum(segment.num_frames for segment in found) == counts.frames
    tasks = list(cut_tasks(plan.missing, 2048, num_workers=2))
    assert [segment for task in tasks for segment in task.segments] == found
    assert sum(table.num_rows for table in plan.tables()) == len(plan.segments)


def test_retries_of_pages_planned_on_ray_are_counted_in_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(items: list[Medium], spec: PlanSpec) -> Iterator[pa.Table]:
        storage.add_retries(2)
        yield pa.table({"uri": [item.uri for item in items]})

    monkeypatch.setattr(graph, "plan_page", twice)
    result = graph.plan_remotely([Medium("/a.mp4", "a")], SPEC)
    before = storage.num_retries()
    assert [table["uri"].to_pylist() for table in graph.tables_of(result)] == [["/a.mp4"]]
    assert storage.num_retries() - before == 2


def test_committed_segments_are_not_missing_unless_their_error_is_retryable(tmp_path: Path) -> None:
    write_manifest(tmp_path / "m.parquet", 40, longest_seconds=60.0)
    store = str(tmp_path / "store")

    def planned(*retry_errors: str) -> list[str]:
        tables = plan_here(read_pages(str(tmp_path / "m.parquet")), SPEC)
        finished = finished_segments(store, retry_errors)
        return [segment.media_id for segment in write_plan(store, tables, finished).missing]

    plan = write_plan(store, plan_here(read_pages(str(tmp_path / "m.parquet")), SPEC), HashTable())
    everything = list(plan.segments)
    assert planned() == [segment.media_id for segment in everything]
    results = [("ok", None), ("partial", "frames_missing"), ("error", "corrupt_file"), ("error", "read_failed")]
    rows = [
        {
            **{name: getattr(segment, name) for name in ("segment_id", "media_id", "source_version")},
            **{"status": status, "error_type": kind, "num_frames": 1, "frames_missing": 0, "features": b""},
        }
        for segment, (status, kind) in zip(everything, results, strict=False)
    ]
    StoreWriter(store, "r").write_file("one", rows)
    assert planned() == planned("frames_missing") == [segment.media_id for segment in everything[3:]]
    assert planned("corrupt_file") == [segment.media_id for segment in everything[2:]]
    StoreWriter(store, "r").write_file("two", [{**rows[3], "status": "ok", "error_type": None}])
    assert planned() == [segment.media_id for segment in everything[4:]]


def test_a_dry_run_counts_rows_that_need_no_probing(tmp_path: Path) -> None:
    make_encoder(tmp_path / "encoder")
    durations = write_manifest(tmp_path / "m.parquet", 2000)
    encoder = VisionTowerConfig(model=str(tmp_path / "encoder"), num_tokens_per_frame=4, merge_heads=4)
    config = PreprocessConfig(input=str(tmp_path / "m.parquet"), feature_store=str(tmp_path / "out"), encoder=encoder)
    found = estimate(config)
    frames = sum(math.ceil(seconds) for seconds in durations)
    assert (found.media, found.errors, found.frames_missing) == (2000, 0, frames)
    assert found.feature_bytes == frames * 4 * 16 * 2
    assert found.calibration is None  # no such files


@pytest.mark.parametrize(
    ("num_rows", "max_bytes"),
    [
        pytest.param(150_000, 720_000_000, marks=pytest.mark.slow),
        pytest.param(1_000_000, 2_000_000_000, marks=[pytest.mark.exhaustive, pytest.mark.timeout(1800)]),
    ],
)
def test_a_dry_run_fits_in_memory(tmp_path: Path, num_rows: int, max_bytes: int) -> None:
    make_encoder(tmp_path / "encoder")
    durations = write_manifest(tmp_path / "m.parquet", num_rows)
    # a child's ru_maxrss is at least what its parent held when it forked
    command = [sys.executable, "-c", WITH_PEAK, "jobs/preprocess.py", "--dry-run"]
    command += ["--config", "ray_configs/tiny/preprocess.yaml"]
    command += [f"input={tmp_path}/m.parquet", f"feature_store={tmp_path}/out", f"encoder.model={tmp_path}/encoder"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    text = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment, check=True).stdout
    assert f"frames     {sum(math.ceil(seconds) for seconds in durations)} to do" in text
    assert int(text.split()[-1]) < max_bytes
