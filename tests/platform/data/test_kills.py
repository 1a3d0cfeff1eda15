"""SIGKILL at any moment, then the same command: nothing missing, nothing twice, the same bytes."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from reference.killable import kill_after, start
from reference.made_media import make_encoder, make_video
from timeviper_platform.data.commits import read_committed
from timeviper_platform.data.encode import EncoderConfig
from timeviper_platform.data.features import FeatureStore
from timeviper_platform.data.graph import ExecutionConfig
from timeviper_platform.data.pipeline import PreprocessConfig, run_in_process, run_preprocess
from timeviper_platform.data.store_check import verify_store

ROOT = Path(__file__).resolve().parents[3]
NUM_CLIPS = 24
NUM_KILLS = 20


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_encoder(folder / "encoder")
    (folder / "media").mkdir()
    for number in range(NUM_CLIPS):
        make_video(folder / "media" / f"clip{number:02d}.mp4", range(8 * (1 + number % 3)))
    make_video(folder / "media" / "film.mp4", range(8 * 70), gop=64)
    return folder


def make_config(corpus: Path, output: Path) -> PreprocessConfig:
    return PreprocessConfig(
        input=str(corpus / "media"),
        output=str(output),
        encoder=EncoderConfig(
            encoder=str(corpus / "encoder"), num_tokens_per_frame=4, merge_heads=4, encode_batch_frames=8
        ),
        execution=ExecutionConfig(frames_per_file=4),
    )


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    config = make_config(corpus, tmp_path_factory.mktemp("unkilled") / "store")
    run_preprocess(config, run=run_in_process)
    return contents(config.output)


def contents(uri: str) -> dict[str, bytes]:
    store = FeatureStore.open(uri)
    return {m: store.read(m).features.view(torch.int16).numpy().tobytes() for m in store.media_ids}


def check(uri: str, expected: dict[str, bytes]) -> None:
    assert contents(uri) == expected
    ids = read_committed(uri)["segment_id"].to_pylist()
    assert len(ids) == len(set(ids)) == NUM_CLIPS + 2
    assert verify_store(uri).problems == []


def test_a_run_killed_again_and_again_ends_with_the_same_bytes(
    corpus: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    moments = random.Random(0)
    config = make_config(corpus, tmp_path / "store")

    def num_files() -> int:
        folders = (
            tmp_path / "store" / name for name in ("data", "commits")
        )  # that of the plan is made anew by each run
        return sum(1 for folder in folders for _ in folder.glob("*"))

    num_killed = 0
    for _ in range(4):
        due = num_files() + moments.randint(1, 9)  # half-written, written and committed files: two or three a unit
        num_killed += kill_after(start(config), lambda due=due: num_files() >= due, moments.uniform(0.0, 0.02))
    assert num_killed >= 3
    last = start(config)
    last.join()
    assert last.exitcode == 0
    check(config.output, expected)


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killing_driver_decoders_and_encoders_on_ray_loses_nothing(
    corpus: Path, expected: dict[str, bytes], tmp_path: Path, ray_cluster: dict[str, str]
) -> None:
    moments = random.Random(0)
    num_killed = dict.fromkeys(("driver", "DecodeStep", "EncodeStep"), 0)
    for attempt in range(12):
        if sum(num_killed.values()) >= NUM_KILLS and min(num_killed.values()) >= NUM_KILLS // 5:
            break
        config = write_config(corpus, tmp_path / f"store{attempt}")
        for victim in ("DecodeStep", "EncodeStep", "driver", ""):
            driver = start_job(config, ray_cluster)
            if victim == "driver":
                wait_for_actors(ray_cluster, "EncodeStep", driver)
                time.sleep(moments.uniform(0.0, 3.0))
                num_killed["driver"] += driver.poll() is None
                driver.kill()
            elif victim:
                for process in wait_for_actors(ray_cluster, victim, driver):
                    time.sleep(moments.uniform(0.0, 2.0))
                    num_killed[victim] += kill(process)
            output = wait_for(driver, victim)
            if victim != "driver":  # Ray starts a dead actor again: the run goes on
                assert driver.returncode == 0, output
        check(str(tmp_path / f"store{attempt}"), expected)
    assert sum(num_killed.values()) >= NUM_KILLS, num_killed


def write_config(corpus: Path, output: Path) -> Path:
    values = {
        "input": str(corpus / "media"),
        "output": str(output),
        "encoder": {
            "encoder": str(corpus / "encoder"), "num_tokens_per_frame": 4, "merge_heads": 4, "encode_batch_frames": 8
        },
        "execution": {
            "mode": "split", "num_workers": 1, "num_decode_workers": 1, "frames_per_file": 4, "progress_seconds": 0.5
        },
    }  # fmt: skip
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values))
    return path


def start_job(config: Path, cluster: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "preprocess.py"), "--config", str(config)],
        env={**os.environ, **cluster},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(driver: subprocess.Popen[str], victim: str, timeout_s: float = 400.0) -> str:
    """What the driver printed until it ended."""
    try:
        return driver.communicate(timeout=timeout_s)[0]
    except subprocess.TimeoutExpired:
        driver.kill()
        pytest.fail(f"the job hangs after {victim or 'nothing'} was killed:\n{driver.communicate()[0][-3000:]}")


def kill(process: psutil.Process) -> bool:
    """True when it was alive."""
    try:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    except psutil.NoSuchProcess:
        return False
    return True


def wait_for_actors(cluster: dict[str, str], step: str, driver: subprocess.Popen[str]) -> list[psutil.Process]:
    """Processes of the test's own cluster that run the step; none when the job ends before there are any."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and driver.poll() is None:
        found = [process for process in workers_of(cluster) if step in title(process)]
        if found:
            return found
        time.sleep(0.1)
    return []


def workers_of(cluster: dict[str, str]) -> Iterator[psutil.Process]:
    for process in psutil.process_iter(["name", "cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if process.info["name"] == "raylet" and cluster["RAY_ADDRESS"] in command:
            with contextlib.suppress(psutil.NoSuchProcess):  # one that ends while its children are listed
                yield from process.children(recursive=True)


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""
