"""Checkpoints that cannot be written, or not be removed, in whole runs on one rank in this process."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from reference.training_corpus import Corpus, make_corpus, train_values
from timeviper_platform.common import storage
from timeviper_platform.common.config import parse_config
from timeviper_platform.training.checkpoint import manager as checkpoint
from timeviper_platform.training.checkpoint import save_policy as saving
from timeviper_platform.training.checkpoint.manager import COMMIT_FILE, Checkpoints
from timeviper_platform.training.config import TrainConfig
from timeviper_platform.training.local import train_local
from timeviper_platform.training.metrics.writer import read_metrics
from timeviper_platform.training.run import RunFolder

pytestmark = pytest.mark.usefixtures("group_of_one")

NUM_STEPS = 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "FIRST_WAIT_S", 0.0)


def every_step(corpus: Corpus, name: str, **checkpoints: int) -> TrainConfig:
    """A run of NUM_STEPS steps, each with its checkpoint."""
    values = train_values(corpus, name=name, checkpoint={"every_steps": 1, "keep": 9, **checkpoints})
    del values["phases"]["instruct"]
    values["phases"]["align"]["steps"] = NUM_STEPS
    return parse_config(TrainConfig, values)


def fail_writes(monkeypatch: pytest.MonkeyPatch, numbers: Collection[int]) -> None:
    """Writes of a checkpoint's files fail where their number, counted from 1, is one of these."""
    write, made = checkpoint._write_files, []

    def write_or_fail(target: str, files: dict[str, Any], documents: dict[str, Any]) -> None:
        made.append(target)
        if len(made) in numbers:
            storage.write_bytes(storage.join_uri(target, "rng-00000.pt"), b"half")
            raise RuntimeError(f"cannot write {target}: no space left")
        write(target, files, documents)

    monkeypatch.setattr(checkpoint, "_write_files", write_or_fail)


def steps_of(config: TrainConfig) -> list[int]:
    return [int(uri[-8:]) for uri in Checkpoints(RunFolder.of(config).checkpoints).committed()]


def test_a_failed_save_is_told_and_counted_and_the_next_one_goes_on(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = every_step(corpus, "one-fails")
    fail_writes(monkeypatch, {2})
    train_local(config)
    assert steps_of(config) == [1, 3, 4]
    assert [row["num_failed_saves"] for row in read_metrics(RunFolder.of(config).uri)] == [0, 0, 1, 1]
    assert "step-00000002: no space left; training goes on: 1 of 3 saves in a row" in caplog.text
    assert not Path(RunFolder.of(config).checkpoints, "step-00000002").exists()  # its half goes with the next commit


def test_a_phases_last_checkpoint_is_made_again_until_it_is_there(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = every_step(corpus, "last-fails")
    fail_writes(monkeypatch, {4, 5})
    train_local(config)
    assert steps_of(config) == [1, 2, 3, 4]


def test_saves_that_keep_failing_end_the_run_which_then_goes_on_from_the_last_good_one(
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


def test_old_checkpoints_that_cannot_be_removed_stay_until_they_can(
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
    assert "stay, until one can be removed" in caplog.text
    assert steps_of(config) == [4]
