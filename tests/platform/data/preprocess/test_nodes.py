"""Preprocessing on nodes that come and go, and from a driver that has no GPU."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from reference.synthetic_media import make_encoder, make_video
from reference.two_nodes import start_node
from timeviper_platform.benchmarks.preprocess.driver import DriverSizes, SleepStep, sleep_tasks
from timeviper_platform.cluster.values import NODE_ENVIRONMENT
from timeviper_platform.common.ray_cluster import connect, local_cluster
from timeviper_platform.data.preprocess import node_log
from timeviper_platform.data.preprocess.config import ExecutionConfig
from timeviper_platform.data.preprocess.node_log import NodeLog
from timeviper_platform.data.preprocess.ray_graph import Nodes, pipeline_steps, rounds, run_round

ROOT = Path(__file__).resolve().parents[4]


def test_nodes_that_join_and_leave_are_a_line_each(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    nodes = {"a": "10.0.0.1"}
    monkeypatch.setattr(node_log, "_addresses", lambda: dict(nodes))
    with NodeLog(every_seconds=0.01):
        for change in ({"b": "10.0.0.2"}, {"a": None}):
            for node, address in change.items():
                nodes.pop(node) if address is None else nodes.update({node: address})
            deadline = time.monotonic() + 5
            while "10.0.0.2" not in caplog.text and time.monotonic() < deadline:
                time.sleep(0.01)
        while "lost" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
    assert [record.getMessage() for record in caplog.records] == [
        "node 10.0.0.2 joined: 2 nodes",
        "lost node 10.0.0.1: 1 node left; its unfinished work starts again",
    ]


@pytest.fixture
def growing() -> Iterator[tuple[dict[str, str], list[subprocess.Popen[bytes]]]]:
    """A node of one CPU, and the nodes that a test adds."""
    nodes: list[subprocess.Popen[bytes]] = []
    token_file = Path(os.environ["RAY_AUTH_TOKEN_PATH"])  # Ray reads it once in a process
    with local_cluster(
        num_cpus=1,
        object_store_bytes=200_000_000,
        with_dashboard=False,
        token_file=token_file,
        environment=NODE_ENVIRONMENT,
    ) as environment:
        try:
            yield environment, nodes
        finally:
            for node in nodes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(node.pid, signal.SIGKILL)
                node.wait()


@pytest.mark.cluster
@pytest.mark.slow
def test_a_node_that_joins_is_used_and_one_that_is_lost_loses_nothing(
    growing: tuple[dict[str, str], list[subprocess.Popen[bytes]]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import ray

    environment, nodes = growing
    caplog.set_level(logging.INFO)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ray.shutdown()
    sizes = DriverSizes(num_units=300, segments_per_unit=1)
    killed = False
    processed: Counter[str] = Counter()
    with connect(), NodeLog():
        (blocks,) = rounds(sleep_tasks(sizes), sizes.num_units, num_workers=1)
        steps = pipeline_steps(None, ExecutionConfig(), None, Nodes.now(), len(blocks))  # type: ignore[arg-type]
        steps = [{**step, "fn": SleepStep, "fn_constructor_args": (0.1,)} for step in steps]
        tasks = []
        for result in run_round(blocks, steps):
            processed[result.worker] += 1
            tasks.append(result.task)
            if not nodes:
                nodes.append(start_node(environment, num_cpus=1))
            if not killed and len(processed) == 2 and min(processed.values()) > 5:
                os.killpg(nodes[0].pid, signal.SIGKILL)
                killed = True
        assert killed, "the second node was not used"
        deadline = time.monotonic() + 60  # the first node may do the rest before Ray notices
        while "lost node" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.1)
    assert sorted(tasks) == [task.name for task in sleep_tasks(sizes)]
    assert "joined: 2 nodes" in caplog.text
    assert "lost node" in caplog.text


@pytest.mark.cluster
@pytest.mark.slow
def test_work_of_a_lost_node_is_taken_up_within_15_seconds_and_the_start_of_a_worker(
    growing: tuple[dict[str, str], list[subprocess.Popen[bytes]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker and two nodes, of which it takes one."""
    import ray

    environment, nodes = growing
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ray.shutdown()
    sizes = DriverSizes(num_units=30, segments_per_unit=1)
    killed_at = taken_up_seconds = start_seconds = None
    tasks = []
    with connect():
        for number in (2, 3):  # started at once, one of two nodes of a machine may fail
            nodes.append(start_node(environment, num_cpus=2))
            wait_for_nodes(number)
        (blocks,) = rounds(sleep_tasks(sizes), sizes.num_units, num_workers=1)
        config = ExecutionConfig(num_workers=1, cpus_per_worker=2)  # the head has one CPU
        steps = pipeline_steps(None, config, None, Nodes.now(), len(blocks))  # type: ignore[arg-type]
        began_at = time.monotonic()
        for result in run_round(blocks, [{**step, "fn": SleepStep, "fn_constructor_args": (0.1,)} for step in steps]):
            tasks.append(result.task)
            if start_seconds is None:
                start_seconds, first_worker = time.monotonic() - began_at, result.worker
                os.killpg(node_of(first_worker, nodes).pid, signal.SIGKILL)
                killed_at = time.monotonic()
            elif killed_at is not None and taken_up_seconds is None and result.worker != first_worker:
                taken_up_seconds = time.monotonic() - killed_at
    assert sorted(tasks) == [task.name for task in sleep_tasks(sizes)]
    assert start_seconds is not None
    assert taken_up_seconds is not None
    assert taken_up_seconds <= 15 + start_seconds, (taken_up_seconds, start_seconds)


def wait_for_nodes(num_nodes: int, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while len(Nodes.now().resources) < num_nodes:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def node_of(worker: str, nodes: list[subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    """The node among whose processes is the worker, named by host and process id."""
    above = {process.pid for process in psutil.Process(int(worker.rpartition("/")[2])).parents()}
    return next(node for node in nodes if node.pid in above)


@pytest.mark.cluster
@pytest.mark.slow
def test_a_driver_without_a_gpu_plans_and_waits_for_one_until_sigterm(ray_address: str, tmp_path: Path) -> None:
    make_encoder(tmp_path / "encoder")
    make_video(tmp_path / "clip.mp4", range(8))
    command = [sys.executable, str(ROOT / "jobs" / "preprocess.py")]
    command += [f"--config={ROOT}/ray_configs/tiny/preprocess.yaml", f"input={tmp_path}/clip.mp4"]
    command += [f"feature_store={tmp_path}/store", f"encoder.model={tmp_path}/encoder", "encoder.device=cuda"]
    command += ["execution.gpus_per_worker=1", "execution.mode=auto"]
    refused = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith(
        "error: 1 GPU wanted by each worker (execution.gpus_per_worker, execution.cpus_per_worker), largest node has 0"
    )
    log = tmp_path / "log"
    with log.open("w") as output:  # KUBERAY_CRD_VER: an autoscaler may add nodes
        driver = subprocess.Popen(command, stderr=output, env={**os.environ, "KUBERAY_CRD_VER": "1"})
    deadline = time.monotonic() + 120
    while "waiting for nodes: 1 GPU wanted" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(0.5)
    assert "1 media: 1 segments planned, 1 missing" in log.read_text()
    assert driver.poll() is None
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(timeout=10) == 143
    assert log.read_text().splitlines()[-1] == "error: stopped by SIGTERM"
