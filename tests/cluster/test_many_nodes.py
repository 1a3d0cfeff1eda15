"""Every phase on nodes that are as apart as machines, with all data in S3, and one of the nodes lost."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import s3fs
import yaml

from reference.isolated_nodes import ROOT, Nodes, can_isolate, isolated_nodes
from reference.synthetic_media import make_encoder, make_video
from reference.synthetic_store import read_committed
from reference.tiny_serving import make_serving_folders
from reference.training_corpus import make_corpus, train_values
from reference.training_ranks import start_ranks
from timeviper_platform.benchmarks.training.s3_server import BUCKET, s3_server
from timeviper_platform.common.job import job_command
from timeviper_platform.common.ray_cluster import free_port
from timeviper_platform.data.store.verify import verify_store
from timeviper_platform.training.metrics.writer import read_metrics

RAY = str(Path(sys.executable).parent / "ray")
NUM_CLIPS = 30
NUM_STEPS = 16
WORKERS = {"num_workers": 2, "resources_per_worker": {"CPU": 0.9}, "max_failures": 3}

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not can_isolate(), reason="nodes with a /tmp of their own need root and `unshare`"),
]


@pytest.fixture(scope="module")
def bucket() -> Iterator[dict[str, str]]:
    """The environment of an S3 server, which this process has, too."""
    with s3_server() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield environment
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def nodes(bucket: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Two nodes of one CPU. A test that kills a node replaces it."""
    with isolated_nodes(tmp_path_factory.mktemp("nodes"), environment=bucket) as started:
        yield started


def upload(folder: Path, name: str) -> str:
    """Returns the URI."""
    s3fs.S3FileSystem().put(str(folder), f"{BUCKET}/{name}", recursive=True)
    return f"s3://{BUCKET}/{name}"


def submit(nodes: Nodes, log: Path, *command: str) -> subprocess.Popen[bytes]:
    """Starts `ray job submit` of a job."""
    with log.open("wb") as output:
        return subprocess.Popen(
            [RAY, "job", "submit", "--runtime-env", "ray_configs/runtime_env.yaml", "--", "python", *command],
            cwd=ROOT,
            env={**os.environ, **nodes.environment},
            stdout=output,
            stderr=output,
        )


def wait_until(is_due: Callable[[], bool], job: subprocess.Popen[bytes], log: Path, timeout_s: float = 600) -> None:
    """Fails if the job ends before. A busy machine takes minutes to start workers."""
    deadline = time.monotonic() + timeout_s
    while not is_due():
        if job.poll() is not None or time.monotonic() > deadline:
            job.kill()
            pytest.fail(f"the job has ended too early or hangs ({job.returncode = }):\n{log.read_text()[-4000:]}")
        time.sleep(0.1)


def expect_success(job: subprocess.Popen[bytes], log: Path, timeout_s: float = 600) -> str:
    """Returns the job's output."""
    try:
        job.wait(timeout_s)
    finally:
        job.kill()
    assert job.returncode == 0, log.read_text()[-4000:]
    return log.read_text()


def test_preprocessing_on_two_nodes_loses_and_doubles_nothing_when_one_is_killed(nodes: Nodes, tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    for number in range(NUM_CLIPS):
        make_video(tmp_path / "media" / f"clip{number:02d}.mp4", range(8 * (2 + number % 3)))
    media = upload(tmp_path / "media", "media")
    encoder = upload(make_encoder(tmp_path / "encoder"), "encoder")
    store, log = f"s3://{BUCKET}/features", tmp_path / "preprocess.log"
    values = {
        "input": media,
        "feature_store": store,
        "encoder": {"model": encoder, "num_tokens_per_frame": 4, "merge_heads": 4, "encode_batch_frames": 8},
        "execution": {"num_workers": 2, "cpus_per_worker": 0.9, "frames_per_file": 1, "progress_seconds": 1},
    }
    job = submit(nodes, log, "jobs/preprocess.py", "--config", write_yaml(values, tmp_path / "preprocess.yaml"))

    def num_commits() -> int:
        filesystem = s3fs.S3FileSystem()
        filesystem.invalidate_cache()
        folder = f"{BUCKET}/features/commits"
        return len(filesystem.ls(folder)) if filesystem.exists(folder) else 0

    wait_until(lambda: num_commits() >= 4, job, log)
    nodes.kill_one()
    assert num_commits() < NUM_CLIPS, "the run was over before the node was killed"
    nodes.add()
    printed = expect_success(job, log)
    assert re.search(rf"media\s+{NUM_CLIPS} planned = {NUM_CLIPS} ok", printed), printed[-3000:]
    ids = read_committed(store)["segment_id"].to_pylist()
    assert len(ids) == len(set(ids)) == NUM_CLIPS
    assert verify_store(store).problems == []


def write_yaml(values: dict[str, Any], path: Path) -> str:
    """Writes a configuration where the head, and no other node, reads it."""
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return str(path)


def uploaded_training(folder: Path, **changes: Any) -> dict[str, Any]:
    """Values of a training run of one phase whose inputs and outputs are in the bucket."""
    folder.mkdir()
    corpus = make_corpus(folder)
    data = upload(folder, "training")
    values = train_values(corpus, checkpoint={"every_steps": 4, "keep": 9}, **changes)
    init = values["phases"].pop("align")["init"]
    values["phases"]["instruct"] |= {"init": init, "steps": NUM_STEPS, "samples": [{"uri": f"{data}/samples.parquet"}]}
    return values | {
        "feature_store": f"{data}/features",
        "tokenizer": f"{data}/tokenizer",
        "runs": f"s3://{BUCKET}/runs",
    }


def test_training_on_two_nodes_has_the_losses_of_an_undisturbed_run_when_one_is_killed(
    nodes: Nodes, bucket: dict[str, str], tmp_path: Path
) -> None:
    values = uploaded_training(tmp_path / "corpus", workers=WORKERS)
    log = tmp_path / "train.log"
    job = submit(
        nodes, log, "jobs/train.py", "--config", write_yaml(values | {"name": "killed"}, tmp_path / "train.yaml")
    )
    run = f"s3://{BUCKET}/runs/killed"
    wait_until(lambda: len(read_metrics(run)) >= 5, job, log)
    nodes.kill_one()
    nodes.add()
    expect_success(job, log)
    rows = read_metrics(run)
    assert {row["attempt"] for row in rows} == {1, 2}
    start_ranks(values | {"name": "whole"}, tmp_path, environment=bucket).finish()
    whole = read_metrics(f"s3://{BUCKET}/runs/whole")
    assert [row["global_step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole]


def test_checkpoints_on_the_disk_of_one_node_are_refused(nodes: Nodes, tmp_path: Path) -> None:
    """The head, where the driver runs, sees the folder; the nodes have a /tmp of their own."""
    values = uploaded_training(tmp_path / "corpus", workers=WORKERS) | {"runs": str(tmp_path / "runs")}
    log = tmp_path / "train.log"
    job = submit(nodes, log, "jobs/train.py", "--config", write_yaml(values, tmp_path / "train.yaml"))
    assert job.wait(300) == 1
    message = r"^error: nodes lack storage of the run: .*runs .* is not the folder that the driver writes to"
    assert re.search(message, log.read_text(), re.MULTILINE), log.read_text()[-3000:]


def serve_file(folder: Path) -> Path:
    """A file with two replicas of every deployment; those of the engine cannot share a node."""
    folders = make_serving_folders(folder)
    values = yaml.safe_load((ROOT / "ray_configs" / "tiny" / "serve.yaml").read_text())
    args = values["applications"][0]["args"]
    args["weights"] = upload(Path(folders.weights), "weights")
    args["gateway"]["media_root"] = f"s3://{BUCKET}/uploads"
    args["features"] |= {"feature_store": upload(Path(folders.store), "store")}
    args["features"]["encoder"]["model"] = upload(Path(folders.encoder.model), "serving-encoder")
    args["features"]["encoder"]["encode_batch_frames"] = 4
    two = {"min_replicas": 2, "max_replicas": 2}
    args["deployments"] = {
        name: {"num_cpus": num_cpus, "autoscaling": two}
        for name, num_cpus in {"gateway": 0.1, "features": 0.1, "engine": 0.6}.items()
    }
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def serve_status(nodes: Nodes, *arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        job_command("serve", "status", *arguments),
        env={**os.environ, **nodes.environment},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def test_serving_on_two_nodes_loses_no_question_beyond_a_retry_when_one_is_killed(nodes: Nodes, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "serve.log"
    with log.open("wb") as output:
        job = subprocess.Popen(
            [sys.executable, "jobs/serve.py", "--config", str(serve_file(tmp_path)), "--port", str(port)],
            cwd=ROOT,
            env={**os.environ, **nodes.environment},
            stdout=output,
            stderr=output,
        )
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=60)  # retries twice
    content: Any = [
        {"type": "video_url", "video_url": {"url": "feature://film"}},
        {"type": "text", "text": "What is it?"},
    ]
    is_over = threading.Event()

    def ask_until_over() -> list[str | None]:
        answers = []
        while not is_over.is_set():
            answer = client.chat.completions.create(
                model="timeviper-tiny", messages=[{"role": "user", "content": content}], max_tokens=6
            )
            answers.append(answer.choices[0].message.content)
        return answers

    try:
        wait_until(lambda: "ready: " in log.read_text(), job, log)
        assert serve_status(nodes, "--wait") == (0, "RUNNING\n")
        assert serve_status(nodes, "--name=other")[0] == 1
        with ThreadPoolExecutor(4) as pool:
            try:
                asking = [pool.submit(ask_until_over) for _ in range(4)]
                time.sleep(4)
                nodes.kill_one()
                time.sleep(10)
            finally:
                is_over.set()
            answers = [answer for asked in asking for answer in asked.result()]
        assert len(answers) > 8
        assert len(set(answers)) == 1
        nodes.add()
    finally:
        job.send_signal(signal.SIGTERM)
        job.wait(120)
