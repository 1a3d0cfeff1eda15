"""SIGKILL at the worst moments of a save on two ranks, timed by the object store that receives the checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import IO, Any, Literal

import pytest
import s3fs

from reference.faulty_s3 import Faults, s3_server
from reference.training_corpus import Corpus, make_corpus, train_values
from reference.training_ranks import Ranks, start_ranks
from timeviper_platform.training.metrics.writer import read_metrics

Moment = Literal["upload", "before_commit", "after_commit"]
NUM_STEPS = 10
KILL_CASES = [(2, "float32"), (3, "bfloat16")]
"""(stage, dtype) of `make test-slow`."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@dataclass
class Killer:
    """Kills ranks from outside, at an exact request to the store."""

    moment: Moment
    step: int
    ranks: Ranks | None = None
    has_struck: bool = False
    _is_committed: bool = field(default=False)

    def __call__(self, method: str, path: str, body: IO[bytes]) -> bool:
        """True if the request must be dropped, because its process is dead."""
        is_commit = method == "PUT" and path.endswith(f"step-{self.step:08d}/COMMIT")
        is_shard = method == "PUT" and f"step-{self.step:08d}/" in path and "zero_pp_rank_1" in path
        if self.moment == "upload" and is_shard:
            body.read(1000)  # half of the file has arrived
            return self._strike(1)  # the other rank must notice
        if self.moment == "before_commit" and is_commit:
            return self._strike()
        if self.moment == "after_commit" and self._is_committed and not self.has_struck:
            return self._strike()
        self._is_committed |= is_commit
        return False

    def _strike(self, *ranks: int) -> bool:
        assert self.ranks is not None
        self.ranks.kill(*ranks)
        self.has_struck = True
        return True


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """An S3 server with an empty bucket named `bucket` and configurable faults."""
    with s3_server() as (url, faults):
        for name, value in environment_of(url).items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")
        yield faults
        s3fs.S3FileSystem.clear_instance_cache()


def environment_of(url: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    }


def one_phase(corpus: Corpus, **changes: Any) -> dict[str, Any]:
    values = train_values(corpus, checkpoint={"every_steps": 2, "keep": 9}, **changes)
    init = values["phases"].pop("align")["init"]
    values["phases"]["instruct"] |= {"init": init, "steps": NUM_STEPS}  # three packs per step: one rank gets a dummy
    return values


def curve(run: str) -> list[tuple[int, float, float, int, int, int]]:
    """Step, loss, gradient norm and the sizes of the global batch."""
    names = ("global_step", "loss", "grad_norm", "num_samples", "num_tokens", "num_targets")
    return [tuple(row[name] for name in names) for row in read_metrics(run)]  # type: ignore[misc]


def expect_kills_leave_no_trace(
    corpus: Corpus, folder: Path, store: Faults, kills: dict[Moment, int], **changes: Any
) -> None:
    environment = {name: os.environ[name] for name in environment_of("")}
    whole = one_phase(corpus, name="whole", runs=str(folder), **changes)
    start_ranks(whole, folder).finish()
    expected = curve(str(folder / "whole"))
    assert [row[0] for row in expected] == list(range(1, NUM_STEPS + 1))

    killed = one_phase(corpus, name="killed", runs="s3://bucket/runs", **changes)
    attempts, first = [], 1
    for number, (moment, step) in enumerate(kills.items(), start=1):
        store.drops = killer = Killer(moment, step)
        killer.ranks = ranks = start_ranks(killed, folder, environment=environment)
        assert 0 not in ranks.wait(), ranks.tail()
        assert killer.has_struck
        last = step if moment == "after_commit" else step - 2
        attempts += [number] * (last + 1 - first)
        first = last + 1
    store.drops = None
    start_ranks(killed, folder, environment=environment).finish()
    rows = read_metrics("s3://bucket/runs/killed")
    attempts += [len(kills) + 1] * (NUM_STEPS + 1 - first)
    assert [row["attempt"] for row in rows] == attempts  # each attempt resumes from the newest committed checkpoint
    assert curve("s3://bucket/runs/killed") == expected


@pytest.mark.slow
def test_kills_while_a_checkpoint_is_written_leave_no_trace_in_the_curve(
    corpus: Corpus, tmp_path: Path, store: Faults
) -> None:
    expect_kills_leave_no_trace(corpus, tmp_path, store, {"upload": 4, "before_commit": 6})


@pytest.mark.slow
@pytest.mark.timeout(1800)  # ten processes on two cores
@pytest.mark.parametrize(
    ("stage", "dtype"),
    [
        pytest.param(*case, marks=[] if case in KILL_CASES else pytest.mark.exhaustive)
        for case in product([1, 2, 3], ["float32", "bfloat16"])
    ],
)
def test_kills_leave_no_trace_under_every_zero_stage_and_precision(
    corpus: Corpus, tmp_path: Path, store: Faults, stage: int, dtype: str
) -> None:
    kills: dict[Moment, int] = {"upload": 4, "before_commit": 6, "after_commit": 8}
    expect_kills_leave_no_trace(corpus, tmp_path, store, kills, zero={"stage": stage}, dtype=dtype)


def expect_each_file_is_read_once(
    corpus: Corpus, folder: Path, store: Faults, *, world_size: int, **changes: Any
) -> None:
    """Two ranks save; `world_size` resume, whose reads are counted."""
    environment = {name: os.environ[name] for name in environment_of("")}
    values = one_phase(corpus, name=f"bytes-{world_size}", runs="s3://bucket/runs", **changes)
    start_ranks(values, folder, environment=environment).finish()
    s3 = s3fs.S3FileSystem()
    *_, before, last = sorted(s3.ls(f"bucket/runs/{values['name']}/checkpoints"))
    s3.rm(last, recursive=True)
    s3.invalidate_cache()
    sizes = {f"/{file}": s3.size(file) for file in s3.ls(before)}
    store.bytes_read.clear()
    store.fail_first_of = 5  # every fifth new request fails once
    start_ranks(values, folder, world_size=world_size, environment=environment).finish()
    store.fail_first_of = None
    read = {path: store.bytes_read.get(path, 0) for path in sizes}
    assert sum(read.values()) <= 1.2 * sum(sizes.values()), (read, sizes)
    assert all(read[path] == sizes[path] for path in sizes if path.endswith("_states.pt")), (read, sizes)


@pytest.mark.slow
def test_two_ranks_of_a_machine_read_each_file_of_a_checkpoint_once(
    corpus: Corpus, tmp_path: Path, store: Faults
) -> None:
    """Before, each rank copied every file: 2.0 times the checkpoint for two ranks, 8 times for eight."""
    expect_each_file_is_read_once(corpus, tmp_path, store, world_size=2)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "world_size"), [(3, 2), (2, 3), (3, 1)])
def test_resuming_on_another_number_of_ranks_reads_each_file_once_too(
    corpus: Corpus, tmp_path: Path, store: Faults, stage: int, world_size: int
) -> None:
    expect_each_file_is_read_once(corpus, tmp_path, store, world_size=world_size, zero={"stage": stage})
