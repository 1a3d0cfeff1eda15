"""The Ray graph: the same bytes as without Ray, fused and split, and configurations that are refused."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest

from reference.media_corpus import BAD, contents, make_config, no_runner
from timeviper_platform.benchmarks.preprocess.driver import DriverSizes, SleepStep, sleep_tasks
from timeviper_platform.common import ray_cluster as session
from timeviper_platform.common import storage
from timeviper_platform.data.plan.segments import Segment
from timeviper_platform.data.preprocess import ray_graph
from timeviper_platform.data.preprocess.calibrate import Calibration
from timeviper_platform.data.preprocess.config import ExecutionConfig
from timeviper_platform.data.preprocess.ray_graph import (
    DecodeStep,
    EncodeStep,
    FusedStep,
    Nodes,
    from_block,
    fused_cpus,
    pool_sizes,
    rounds,
    tasks_per_row,
    to_block,
)
from timeviper_platform.data.preprocess.run import run_preprocess
from timeviper_platform.data.preprocess.segment_rows import SegmentDecoder
from timeviper_platform.data.preprocess.tasks import TaskResult, WriteTask, cut_tasks
from timeviper_platform.data.preprocess.worker import WorkerSpec
from timeviper_platform.data.store.commits import CommitLog
from timeviper_platform.data.video.frames import FrameBatch
from timeviper_platform.data.video_worker.frame_source import DecodeResult


def exported(port: int, name: str, store: str) -> float:
    """Sum of a metric's samples of this store."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(
        float(x.rpartition(" ")[2])
        for x in lines
        if x.startswith((name + "{", name + "_total{")) and f'store="{store}"' in x
    )


def exported_once_it_is(expected: float, port: int, name: str, store: str) -> float:
    """Waits, because Ray exports every few seconds."""
    deadline = time.monotonic() + 60
    while (total := exported(port, name, store)) != expected and time.monotonic() < deadline:
        time.sleep(0.5)
    return total


@pytest.mark.cluster
def test_a_run_on_ray_gives_the_same_bytes_and_a_second_run_does_nothing(
    corpus: Path, finished: Path, tmp_path: Path, ray_address: str
) -> None:
    config = make_config(corpus, tmp_path / "store", num_workers=2, min_workers=1)
    report = run_preprocess(config)
    assert report.share_of_ideal > 0
    assert report.workers["decode"] in (1, 2)  # so few tasks may be done before the second worker has started
    assert (report.segments.ok, report.segments.rejected, report.media.rejected) == (14, 1, len(BAD))
    assert report.segments.missing == report.segments.duplicate == 0
    assert contents(config.feature_store) == contents(str(finished))
    assert run_preprocess(config, run=no_runner).segments_encoded == 0


@pytest.mark.cluster
@pytest.mark.slow
def test_the_exported_counter_of_frames_is_the_reports(corpus: Path, tmp_path: Path, ray_address: str) -> None:
    """In a process of its own, as the counters of one that has connected often are multiplied."""
    import ray

    store = str(tmp_path / "store")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool, session.connect():
        config = make_config(corpus, store, num_workers=2)
        encoded = pool.submit(run_preprocess, config).result().frames_encoded
        port = ray.nodes()[0]["MetricsExportPort"]
        assert encoded > 0
        assert exported_once_it_is(encoded, port, "ray_timeviper_preprocess_frames", store) == encoded
        by_headers = len(BAD) - 1  # the other one when it is decoded
        assert exported_once_it_is(by_headers, port, "ray_timeviper_plan_rejected_media", store) == by_headers


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["split", "auto"])
def test_split_steps_on_ray_give_the_same_bytes(
    corpus: Path, finished: Path, tmp_path: Path, ray_address: str, mode: str
) -> None:
    config = make_config(corpus, tmp_path / "store", mode=mode, num_workers=1, num_decode_workers=1)
    assert run_preprocess(config).segments.ok == 14
    assert contents(config.feature_store) == contents(str(finished))


def test_all_ray_clusters_started_by_a_process_share_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    started = []

    @contextlib.contextmanager
    def cluster(*, token_file: Path, **_: object) -> Iterator[dict[str, str]]:
        started.append(token_file.read_text())
        yield {}

    monkeypatch.setattr(session, "has_cluster", lambda: False)
    monkeypatch.setattr(session, "local_cluster", cluster)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    for _ in range(2):
        with session.connect():
            pass
    assert len(started) == 2
    assert len(set(started)) == 1


def process_blocks(steps: Sequence[Callable[[pa.Table], pa.Table]], tasks: Iterable[WriteTask]) -> Iterator[TaskResult]:
    """Calls the steps as Ray does: two blocks at a time, one task per block."""
    blocks: Iterable[pa.Table] = [to_block([task]) for task in tasks]
    with ThreadPoolExecutor(2) as pool:
        for step in steps:
            blocks = pool.map(step, blocks)
        for block in blocks:
            yield from from_block(block)


def test_split_steps_hand_over_frames_errors_and_rows_unchanged(corpus: Path, finished: Path, tmp_path: Path) -> None:
    def run_split(missing: Sequence[Segment], spec: WorkerSpec, execution: ExecutionConfig) -> Iterator[TaskResult]:
        tasks = cut_tasks(missing, execution.frames_per_file, num_workers=1)
        yield from process_blocks([DecodeStep(spec), EncodeStep(spec)], tasks)

    config = make_config(corpus, tmp_path / "store")
    report = run_preprocess(config, run=run_split)
    assert (report.segments.ok, report.segments.rejected, report.media.rejected) == (14, 1, len(BAD))
    assert contents(config.feature_store) == contents(str(finished))


def test_arrays_in_a_block_are_read_without_a_copy() -> None:
    frames = FrameBatch(np.ones((2, 4, 4, 3), np.uint8), np.zeros(2), np.zeros(2), 0)
    task = WriteTask("name", (), (DecodeResult(frames, 1.0),))
    block = to_block([task])
    (found,) = from_block(block)
    array = found.decoded[0].frames.frames
    assert np.array_equal(array, frames.frames)
    memory = block["arrays"][0].values.buffers()[2]
    assert memory.address <= array.ctypes.data < memory.address + memory.size
    assert (found.name, found.decoded[0].seconds) == ("name", 1.0)


def test_results_of_a_fast_worker_reach_the_driver_together() -> None:
    assert tasks_per_row(ExecutionConfig(mode="fused", gpus_per_worker=1, frames_per_file=512)) == 8
    assert tasks_per_row(ExecutionConfig(mode="fused", gpus_per_worker=1, frames_per_file=8192)) == 1
    assert tasks_per_row(ExecutionConfig(mode="fused")) == 1
    assert tasks_per_row(ExecutionConfig(mode="split", gpus_per_worker=1)) == 1
    tasks = list(sleep_tasks(DriverSizes(num_units=20, segments_per_unit=1)))
    (block,) = next(rounds(tasks, num_tasks=20 * ray_graph.BLOCKS_PER_ROUND, num_workers=1, tasks_per_row=8))
    assert block.num_rows == 3
    rows = [SleepStep(0.0)(block.slice(row, 1)) for row in range(3)]  # Ray Data calls a step with a row
    assert [row.num_rows for row in rows] == [1, 1, 1]
    assert [[result.task for result in from_block(row)] for row in rows] == [
        [task.name for task in tasks[start : start + 8]] for start in (0, 8, 16)
    ]


def test_a_fused_worker_decodes_the_next_task_while_a_commit_waits(
    corpus: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, commit = SegmentDecoder.decode, CommitLog.write
    started: list[str] = []
    results: list[TaskResult] = []
    overlaps: list[bool] = []
    num_tasks = 0

    def recorded_decode(self: SegmentDecoder, segments: Sequence[Segment]) -> Iterator[DecodeResult]:
        started.append(segments[0].segment_id)
        storage.add_retries(2)
        yield from decode(self, segments)

    def slow_commit(*args: Any, **options: Any) -> None:
        storage.add_retries(1)
        num_expected, deadline = min(num_tasks, len(overlaps) + 2), time.monotonic() + 30
        while len(started) < num_expected and time.monotonic() < deadline:
            time.sleep(0.01)
        overlaps.append(len(started) >= num_expected)
        commit(*args, **options)

    def run_fused(missing: Sequence[Segment], spec: WorkerSpec, execution: ExecutionConfig) -> Iterator[TaskResult]:
        nonlocal num_tasks
        tasks = list(cut_tasks(missing, execution.frames_per_file, num_workers=1))
        num_tasks = len(tasks)
        results.extend(process_blocks([FusedStep(spec)], tasks))
        yield from results

    monkeypatch.setattr(SegmentDecoder, "decode", recorded_decode)
    monkeypatch.setattr(CommitLog, "write", slow_commit)
    config = make_config(corpus, tmp_path / "store")
    report = run_preprocess(config, run=run_fused)
    assert num_tasks > 2
    assert all(overlaps)
    assert len(overlaps) == num_tasks
    assert (report.segments.ok, report.segments.rejected, report.media.rejected) == (14, 1, len(BAD))
    assert contents(config.feature_store) == contents(str(finished))
    assert sum(result.retries for result in results) == 3 * num_tasks
    assert all(result.decode_cpu_seconds > 0 and result.encode_cpu_seconds > 0 for result in results)


@pytest.mark.parametrize("mode", ["split", "auto"])
def test_a_file_with_too_many_frames_for_one_block_is_refused(
    corpus: Path, tmp_path: Path, mode: Literal["split", "auto"]
) -> None:
    config = make_config(corpus, tmp_path / "large")
    config = dataclasses.replace(config, execution=ExecutionConfig(mode=mode, frames_per_file=10**7))
    with pytest.raises(ValueError, match="in modes split and auto use at most"):
        run_preprocess(config)


@pytest.mark.parametrize(
    "bounds", [(0, None, None), (None, None, 0), (3, None, 2), (None, 3, 2), (2, 1, None), (1, 2, 1)]
)
def test_contradictory_pool_sizes_are_refused(bounds: tuple[int | None, int | None, int | None]) -> None:
    min_workers, initial_workers, num_workers = bounds
    with pytest.raises(ValueError, match=r"<= self\.num_workers = .* must hold"):
        ExecutionConfig(min_workers=min_workers, initial_workers=initial_workers, num_workers=num_workers)
    assert ExecutionConfig(min_workers=1, initial_workers=2, num_workers=2).num_workers == 2


CPU_NODE, GPU_NODE = {"CPU": 16.0}, {"CPU": 16.0, "GPU": 8.0}


@pytest.mark.parametrize(
    ("nodes", "options", "expected"),
    [
        ([CPU_NODE], {}, (0, 16)),
        ([CPU_NODE, CPU_NODE, {"CPU": 0.5}], {}, (0, 32)),
        ([CPU_NODE], {"num_workers": 4}, (0, 4)),
        ([], {}, (0, 1)),
        ([], {"min_workers": 3}, (0, 3)),
        ([GPU_NODE, CPU_NODE], {"gpus_per_worker": 1}, (0, 8)),
        ([GPU_NODE], {"gpus_per_worker": 0.25}, (0, 32)),
        # 3 times as long to decode as to encode: 3 decoders an encoder, and a tenth more
        ([GPU_NODE, CPU_NODE, CPU_NODE], {"gpus_per_worker": 1, "mode": "split"}, (27, 8)),
        ([GPU_NODE], {"gpus_per_worker": 1, "mode": "split"}, (13, 8)),  # the CPUs that the encoders leave
        ([GPU_NODE], {"gpus_per_worker": 1, "mode": "split", "num_decode_workers": 5}, (5, 8)),
        ([CPU_NODE], {"mode": "split"}, (16, 5)),
    ],
)
def test_pools_begin_with_what_nodes_and_measured_costs_ask_for(
    nodes: list[dict[str, float]], options: dict[str, Any], expected: tuple[int, int]
) -> None:
    cost = Calibration(segments=1, frames=100, decode_seconds=3.0, encode_seconds=1.0)
    assert pool_sizes(Nodes(nodes), ExecutionConfig(**options), cost) == expected


def test_a_node_holds_one_fused_worker_per_cpu() -> None:
    for num_cpus in (1, 2, 3, 4, 16, 192):
        reserved = fused_cpus(ExecutionConfig(), Nodes([{"CPU": num_cpus}]))
        assert int(num_cpus / reserved) == num_cpus
    assert fused_cpus(ExecutionConfig(cpus_per_worker=3), Nodes([CPU_NODE])) == 3
    assert fused_cpus(ExecutionConfig(num_workers=2), Nodes([CPU_NODE])) == 0.75


def test_a_round_is_bounded_in_tasks_blocks_and_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TASKS_PER_ROUND": 64, "SEGMENTS_PER_ROUND": 100, "BLOCKS_PER_ROUND": 8}.items():
        monkeypatch.setattr(ray_graph, name, value)

    def sizes(num_tasks: int, num_segments: int = 1, num_workers: int = 0) -> list[list[int]]:
        tasks = [WriteTask(str(n), (n,) * num_segments) for n in range(num_tasks)]  # type: ignore[arg-type]
        found = list(rounds(iter(tasks), num_tasks, num_workers))
        names = [task.name for blocks in found for block in blocks for task in from_block(block)]
        assert names == [task.name for task in tasks]
        return [[len(block) for block in blocks] for blocks in found]

    assert sizes(0) == []
    assert sizes(8) == [[1] * 8]
    assert sizes(15) == [[2] * 7 + [1]]
    assert sizes(8 * 8 + 9) == [[8] * 8, [2] * 4 + [1]]
    assert sizes(16, num_workers=1) == [[1] * 16]
    assert sizes(8, num_segments=50) == [[1] * 2] * 4
