"""The job's graph: the same bytes on Ray, fused and split, and what a graph cannot be."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pytest

from reference.media_corpus import BAD, contents, make_config, no_runner
from timeviper_platform.common import ray_cluster as session
from timeviper_platform.common import storage
from timeviper_platform.data.plan.segments import Segment, cut_units
from timeviper_platform.data.preprocess.ray_graph import DecodeStep, EncodeStep, ExecutionConfig, FusedStep, units_table
from timeviper_platform.data.preprocess.run import run_preprocess
from timeviper_platform.data.preprocess.worker import DecodedSegment, SegmentDecoder, TaskResult, WorkerSpec
from timeviper_platform.data.store import writer as store_writer


def exported(port: int, name: str, expected: float) -> float:
    """Sum of a metric's samples, waited for: Ray exports every few seconds."""
    deadline = time.monotonic() + 60
    total = 0.0
    while time.monotonic() < deadline and total != expected:
        time.sleep(0.5)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        total = sum(float(x.rpartition(" ")[2]) for x in lines if x.startswith((name + "{", name + "_total{")))
    return total


@pytest.mark.cluster
def test_on_ray_the_same_bytes_and_nothing_the_second_time(
    corpus: Path, finished: Path, tmp_path: Path, ray_address: str
) -> None:
    import ray

    ray.init(log_to_driver=False)  # the run leaves a connection alone that was there before
    config = make_config(corpus, tmp_path / "store", num_workers=2, min_workers=1)
    report = run_preprocess(config)
    assert report.share_of_ideal > 0
    assert report.workers["decode"] in (1, 2)  # so little work may all be done before the second has started
    port = ray.nodes()[0]["MetricsExportPort"]
    assert exported(port, "ray_timeviper_preprocess_frames", report.frames_encoded) == report.frames_encoded
    assert (report.segments_done, report.segments_error, report.errors) == (14, 1, len(BAD))
    assert report.audit["missing"] == report.audit["duplicate"] == 0
    assert contents(config.feature_store) == contents(str(finished))
    assert run_preprocess(config, run=no_runner).segments_encoded == 0


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["split", "auto"])
def test_split_steps_on_ray_give_the_same_bytes(
    corpus: Path, finished: Path, tmp_path: Path, ray_address: str, mode: str
) -> None:
    config = make_config(corpus, tmp_path / "store", mode=mode, num_workers=1, num_decode_workers=1)
    assert run_preprocess(config).segments_done == 14
    assert contents(config.feature_store) == contents(str(finished))


def test_all_rays_that_a_process_starts_have_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    @contextlib.contextmanager
    def cluster(*, token_file: Path, **_: object) -> Iterator[dict[str, str]]:
        started.append(token_file.read_text())
        yield {}

    monkeypatch.setattr(session, "has_cluster", lambda: False)
    monkeypatch.setattr(session, "local_cluster", cluster)
    monkeypatch.setattr(session, "_connection", contextlib.nullcontext)
    for _ in range(2):
        with session.ray_session():
            pass
    assert len(started) == 2
    assert len(set(started)) == 1


def test_split_steps_hand_over_frames_errors_and_rows_unchanged(corpus: Path, finished: Path, tmp_path: Path) -> None:
    def run_split(missing: Sequence[Segment], spec: WorkerSpec, execution: ExecutionConfig) -> Iterator[TaskResult]:
        decode, encode = DecodeStep(spec), EncodeStep(spec)
        units = cut_units(missing, execution.frames_per_file, num_workers=1)
        with ThreadPoolExecutor(2) as pool:  # as Ray calls them
            for table in pool.map(encode, pool.map(decode, [units_table([unit]) for unit in units])):
                yield from (TaskResult(**row) for row in table.to_pylist())

    config = make_config(corpus, tmp_path / "store")
    report = run_preprocess(config, run=run_split)
    assert (report.segments_done, report.segments_error, report.errors) == (14, 1, len(BAD))
    assert contents(config.feature_store) == contents(str(finished))


def test_a_fused_worker_makes_the_next_units_rows_while_a_commit_waits(
    corpus: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, commit = SegmentDecoder.decode, store_writer.write_commit
    begun: list[str] = []
    outcomes: list[TaskResult] = []
    overlaps: list[bool] = []
    num_units = 0

    def noted_decode(self: SegmentDecoder, segments: Sequence[Segment]) -> Iterator[DecodedSegment]:
        begun.append(segments[0].segment_id)
        storage.add_retries(2)
        yield from decode(self, segments)

    def slow_commit(*args: Any, **options: Any) -> None:
        storage.add_retries(1)
        wanted, deadline = min(num_units, len(overlaps) + 2), time.monotonic() + 30
        while len(begun) < wanted and time.monotonic() < deadline:
            time.sleep(0.01)
        overlaps.append(len(begun) >= wanted)
        commit(*args, **options)

    def run_fused(missing: Sequence[Segment], spec: WorkerSpec, execution: ExecutionConfig) -> Iterator[TaskResult]:
        nonlocal num_units
        step = FusedStep(spec)
        units = cut_units(missing, execution.frames_per_file, num_workers=1)
        num_units = len(units)
        with ThreadPoolExecutor(2) as pool:  # as Ray calls it
            for table in pool.map(step, [units_table([unit]) for unit in units]):
                outcomes.extend(TaskResult(**row) for row in table.to_pylist())
        yield from outcomes

    monkeypatch.setattr(SegmentDecoder, "decode", noted_decode)
    monkeypatch.setattr(store_writer, "write_commit", slow_commit)
    config = make_config(corpus, tmp_path / "store")
    report = run_preprocess(config, run=run_fused)
    assert num_units > 2
    assert all(overlaps)
    assert len(overlaps) == num_units
    assert (report.segments_done, report.segments_error, report.errors) == (14, 1, len(BAD))
    assert contents(config.feature_store) == contents(str(finished))
    assert sum(outcome.retries for outcome in outcomes) == 3 * num_units
    assert all(outcome.decode_cpu_seconds > 0 and outcome.encode_cpu_seconds > 0 for outcome in outcomes)


@pytest.mark.parametrize("mode", ["split", "auto"])
def test_too_many_frames_for_a_split_block_are_refused(
    corpus: Path, tmp_path: Path, mode: Literal["split", "auto"]
) -> None:
    config = make_config(corpus, tmp_path / "large")
    config = dataclasses.replace(config, execution=ExecutionConfig(mode=mode, frames_per_file=10**7))
    with pytest.raises(ValueError, match="in modes split and auto at most"):
        run_preprocess(config)


@pytest.mark.parametrize(
    "bounds", [(0, None, None), (None, None, 0), (3, None, 2), (None, 3, 2), (2, 1, None), (1, 2, 1)]
)
def test_a_pool_that_cannot_be_is_refused(bounds: tuple[int | None, int | None, int | None]) -> None:
    fewest, first, most = bounds
    with pytest.raises(ValueError, match=r"<= self\.num_workers = .* must hold"):
        ExecutionConfig(min_workers=fewest, initial_workers=first, num_workers=most)
    assert ExecutionConfig(min_workers=1, initial_workers=2, num_workers=2).num_workers == 2
