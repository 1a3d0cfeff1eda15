"""Checkpoints that cannot be written or removed, in whole runs on one rank in this process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reference.training_corpus import Corpus, make_corpus, train_values
from timeviper_platform.common import machine_cache, storage
from timeviper_platform.common.config import parse_config
from timeviper_platform.training.checkpoint.commit import COMMIT_FILE
from timeviper_platform.training.checkpoint.manager import Checkpoints
from timeviper_platform.training.config import TrainConfig
from timeviper_platform.training.local import train_local
from timeviper_platform.training.metrics.writer import read_metrics
from timeviper_platform.training.run import RunFolder

pytestmark = pytest.mark.usefixtures("group_of_one")

NUM_STEPS = 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def every_step(corpus: Corpus, name: str, **checkpoints: float) -> TrainConfig:
    """A run of NUM_STEPS steps with a checkpoint after each."""
    values = train_values(
        corpus, name=name, checkpoint={"every_steps": 1, "keep": 9, "retry_wait_s": 0.0, **checkpoints}
    )
    del values["phases"]["instruct"]
    values["phases"]["align"]["steps"] = NUM_STEPS
    return parse_config(TrainConfig, values)


def fail_writes(monkeypatch: pytest.MonkeyPatch, numbers: Collection[int]) -> None:
    """Makes these saves fail, counted from 1, half-way through a file."""
    write, saves = storage.write_atomic, []

    def write_or_fail(uri: str, content: Callable[[Any], object]) -> None:
        target, _, name = uri.rpartition("/")
        if name == "rng-00000.pt":
            saves.append(target)
            if len(saves) in numbers:
                write(uri, lambda file: file.write(b"half"))
                raise RuntimeError(f"cannot write {target}: no space left")
        write(uri, content)

    monkeypatch.setattr(storage, "write_atomic", write_or_fail)


def steps_of(config: TrainConfig) -> list[int]:
    return [int(uri[-8:]) for uri in Checkpoints(RunFolder.of(config).checkpoints).committed()]


def test_a_failed_save_is_logged_and_counted_and_training_continues(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = every_step(corpus, "one-fails")
    fail_writes(monkeypatch, {2})
    train_local(config)
    assert steps_of(config) == [1, 3, 4]
    assert [row["num_failed_saves"] for row in read_metrics(RunFolder.of(config).uri)] == [0, 0, 1, 1]
    assert "step-00000002: no space left; training continues: 1 of 3 saves in a row" in caplog.text
    assert not Path(RunFolder.of(config).checkpoints, "step-00000002").exists()


def test_a_phases_last_checkpoint_is_repeated_until_it_succeeds(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = every_step(corpus, "last-fails")
    fail_writes(monkeypatch, {4, 5})
    train_local(config)
    assert steps_of(config) == [1, 2, 3, 4]


def test_repeated_save_failures_end_the_run_which_resumes_from_the_last_good_checkpoint(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = every_step(corpus, "all-fail", max_failed_saves=2)
    with monkeypatch.context() as patch:
        fail_writes(patch, range(2, 99))
        with pytest.raises(RuntimeError, match=r"could not be written: rank 0: .*step-00000004: no space left"):
            train_local(config)
    assert steps_of(config) == [1]
    train_local(config)
    assert steps_of(config) == [1, 2, 3, 4]
    assert [row["attempt"] for row in read_metrics(RunFolder.of(config).uri)] == [1, 2, 2, 2]


def test_old_checkpoints_are_removed_once_storage_allows_it(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = every_step(corpus, "not-pruned", keep=1)
    remove = storage.remove
    refused: list[str] = []

    def remove_later(uri: str) -> None:
        if uri.endswith(COMMIT_FILE) and len(refused) < 2:
            refused.append(uri)
            raise PermissionError(f"{uri} may not be removed")
        remove(uri)

    monkeypatch.setattr(storage, "remove", remove_later)
    with caplog.at_level(logging.WARNING):
        train_local(config)
    assert len(refused) == 2
    assert "cannot be removed and stay for now" in caplog.text
    assert steps_of(config) == [4]


def test_a_save_that_cannot_fit_fails_before_it_writes_and_leaves_nothing(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = every_step(corpus, "no-space", max_failed_saves=0)
    folder = Path(RunFolder.of(config).checkpoints)
    written: list[str] = []
    write = storage.write_atomic
    monkeypatch.setattr(storage, "write_atomic", lambda uri, content: (written.append(uri), write(uri, content)))
    monkeypatch.setattr(machine_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(
        RuntimeError, match=r"the save needs 0\.\d GB, and .* has 0\.0 GB; free space, or lower checkpoint"
    ):
        train_local(config)
    assert not [uri for uri in written if "step-" in uri]
    assert not list(folder.glob("step-*"))


def test_checkpoints_are_saved_by_the_clock_too(corpus: Corpus) -> None:
    config = every_step(corpus, "by-time", every_steps=0, interval_minutes=1e-9)
    train_local(config)
    assert steps_of(config) == [1, 2, 3, 4]
