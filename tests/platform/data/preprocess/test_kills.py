"""SIGKILL at random rng, then the same command: nothing missing, no duplicates, the same bytes."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import pytest
import yaml

from reference.killable import kill_after, start
from reference.media_corpus import contents
from reference.synthetic_media import make_encoder, make_video
from reference.synthetic_store import read_committed
from reference.two_nodes import TwoNodes, two_nodes
from timeviper_platform.data.encode.frame_encoder import VisionTowerConfig
from timeviper_platform.data.preprocess.config import ExecutionConfig, PreprocessConfig
from timeviper_platform.data.preprocess.run import run_in_process, run_preprocess
from timeviper_platform.data.store.verify import verify_store

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[4]
NUM_CLIPS = 24
NUM_KILLS = int(os.environ.get("TIMEVIPER_TEST_KILLS", "4"))
"""At least. Ray takes most of a minute to replace a dead worker."""


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
        feature_store=str(output),
        encoder=VisionTowerConfig(
            model=str(corpus / "encoder"), num_tokens_per_frame=4, merge_heads=4, encode_batch_frames=8
        ),
        execution=ExecutionConfig(frames_per_file=4),
    )


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    config = make_config(corpus, tmp_path_factory.mktemp("unkilled") / "store")
    run_preprocess(config, run=run_in_process)
    return contents(config.feature_store)


def check(uri: str, expected: dict[str, bytes]) -> None:
    assert contents(uri) == expected
    ids = read_committed(uri)["segment_id"].to_pylist()
    assert len(ids) == len(set(ids)) == NUM_CLIPS + 2
    assert verify_store(uri).problems == []


@pytest.mark.parametrize("kills", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_a_run_killed_repeatedly_ends_with_the_same_bytes(
    corpus: Path, expected: dict[str, bytes], tmp_path: Path, kills: int
) -> None:
    rng = random.Random(0)
    config = make_config(corpus, tmp_path / "store")

    def num_files() -> int:
        folders = (tmp_path / "store" / name for name in ("data", "commits"))  # every run replaces the plan
        return sum(1 for folder in folders for _ in folder.glob("*"))

    num_killed = 0
    for _ in range(kills):
        due = num_files() + rng.randint(1, 9)  # temporary, data and commit files: two or three per task
        num_killed += kill_after(start(config), lambda due=due: num_files() >= due, rng.uniform(0.0, 0.02))
    assert num_killed >= kills - 1
    last = start(config)
    last.join()
    assert last.exitcode == 0
    check(config.feature_store, expected)


KILLED = ("DecodeStep", "EncodeStep", "second node", "driver")


@pytest.fixture(scope="module")
def nodes() -> Iterator[TwoNodes]:
    with two_nodes() as found:
        yield found


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_kills_at_random_moments_on_ray_lose_nothing(
    corpus: Path, expected: dict[str, bytes], tmp_path: Path, nodes: TwoNodes
) -> None:
    """Kills each victim at least once; more often where a run ended before its kill."""
    rng, each = random.Random(1), max(1, NUM_KILLS // 8)
    killed: Counter[str] = Counter()
    for attempt in range(8):
        if killed.total() >= NUM_KILLS and all(killed[victim] >= each for victim in KILLED):
            break
        config = write_config(corpus, tmp_path / f"store{attempt}")
        steps = rng.sample(("DecodeStep", "EncodeStep"), 2)
        killed += run_killed(config, nodes, [*steps, "second node", "driver"], rng)
        killed += run_killed(config, nodes, [rng.choice(KILLED)], rng)
        finish(config, nodes)
        check(str(tmp_path / f"store{attempt}"), expected)
    assert killed.total() >= NUM_KILLS, killed
    assert all(killed[victim] >= each for victim in KILLED), killed


def run_killed(config: Path, nodes: TwoNodes, victims: Sequence[str], rng: random.Random) -> Counter[str]:
    """Starts the job and kills one victim after the other; returns what was killed during the run."""
    killed: Counter[str] = Counter()
    commits = config.with_suffix("") / "commits"
    with config.with_suffix(".log").open("a+") as log:
        driver = start_job(config, nodes.environment, log)
        for victim in victims:
            wait_until(due_moment(victim, nodes, commits, rng), driver, log)
            time.sleep(rng.uniform(0.0, 0.5))
            if driver.poll() is None:
                killed[victim] += kill(driver) if victim == "driver" else nodes.kill(victim)
                logger.info("killed %s: %s, after %d commits", victim, killed[victim], num_commits(commits))
        wait_until(lambda: False, driver, log)
        may_fail = {"driver", "second node"} & set(killed)  # Ray restarts a dead actor, and the run continues
        assert driver.returncode == 0 or may_fail, end_of(log)
    return killed


def due_moment(victim: str, nodes: TwoNodes, commits: Path, rng: random.Random) -> Callable[[], bool]:
    """Steps are killed as soon as they run (decoding ends long before the last commit), the rest some commits later."""
    if victim.endswith("Step"):
        return lambda: nodes.worker(victim) is not None
    due = num_commits(commits) + rng.randint(1, 3)
    return lambda: num_commits(commits) >= due


def finish(config: Path, nodes: TwoNodes) -> None:
    """Runs the same command to its end."""
    with config.with_suffix(".log").open("a+") as log:
        driver = start_job(config, nodes.environment, log)
        wait_until(lambda: False, driver, log)
        assert driver.returncode == 0, end_of(log)


def write_config(corpus: Path, output: Path) -> Path:
    values = {
        "input": str(corpus / "media"),
        "feature_store": str(output),
        "encoder": {
            "model": str(corpus / "encoder"), "num_tokens_per_frame": 4, "merge_heads": 4, "encode_batch_frames": 8
        },
        "execution": {
            "mode": "split", "num_workers": 1, "num_decode_workers": 1, "frames_per_file": 1, "progress_seconds": 0.5
        },
    }  # fmt: skip
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values))
    return path


def start_job(config: Path, environment: dict[str, str], log: IO[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "preprocess.py"), "--config", str(config)],
        env={**os.environ, **environment},
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
    )


def num_commits(folder: Path) -> int:
    return sum(1 for _ in folder.glob("*.parquet"))


def wait_until(is_due: Callable[[], bool], driver: subprocess.Popen[str], log: IO[str], timeout_s: float = 540) -> None:
    """Waits until `is_due` or the end of the job; kills a job that hangs and fails the test."""
    deadline = time.monotonic() + timeout_s
    while driver.poll() is None and not is_due():
        if time.monotonic() > deadline:
            driver.kill()
            pytest.fail(f"the job does not end:\n{end_of(log)}")
        time.sleep(0.01)


def end_of(log: IO[str]) -> str:
    log.seek(0)
    return log.read()[-3000:]


def kill(process: subprocess.Popen[str]) -> bool:
    """Returns True if the process was alive."""
    process.kill()
    return process.wait() == -signal.SIGKILL
