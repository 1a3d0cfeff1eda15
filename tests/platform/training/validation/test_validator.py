"""Validation on the ranks, in whole runs on one rank in this process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from reference.training_corpus import Corpus, make_corpus, train_values, write_validation_samples
from timeviper_platform.common.config import parse_config
from timeviper_platform.training.checkpoint.manager import Checkpoints
from timeviper_platform.training.config import TrainConfig
from timeviper_platform.training.hooks import RunHooks
from timeviper_platform.training.interrupts import Interrupt, StoppedError
from timeviper_platform.training.local import train_local
from timeviper_platform.training.metrics.writer import read_metrics
from timeviper_platform.training.run import RunFolder, run_training
from timeviper_platform.training.watchdog import Watchdog

pytestmark = pytest.mark.usefixtures("group_of_one")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    corpus = make_corpus(tmp_path_factory.mktemp("corpus"))
    write_validation_samples(corpus)
    return corpus


def with_validation(corpus: Corpus, name: str, *, save_every: int) -> TrainConfig:
    """Four steps, validated after the second and the last."""
    values = train_values(corpus, name=name, checkpoint={"every_steps": save_every, "keep": 9})
    init = values["phases"].pop("align")["init"]
    validation = {
        "samples": [{"uri": str(corpus.folder / "held-out.parquet")}],
        "every_steps": 2,
        "num_answers": 3,
        "where": "ranks",
    }
    values["phases"]["instruct"] |= {"init": init, "steps": 4, "validation": validation}
    return parse_config(TrainConfig, values)


@pytest.fixture(scope="module")
def whole(corpus: Corpus, group_of_one: None) -> list[tuple[float, ...]]:
    """The curve of an uninterrupted run."""
    config = with_validation(corpus, "whole", save_every=2)
    train_local(config)
    return curve(config)


def curve(config: TrainConfig) -> list[tuple[float, ...]]:
    names = ("loss", "validation_loss", "validation_exact_match")
    return [tuple(row.get(name, -1.0) for name in names) for row in read_metrics(RunFolder.of(config).uri)]


def newest_step(config: TrainConfig) -> int:
    uri = Checkpoints(RunFolder.of(config).checkpoints).newest()
    return 0 if uri is None else int(uri[-8:])


class FailAfter:
    """A tracker, and a source of interrupts that fails once `step` is logged: inside the validation that follows."""

    def __init__(self, step: int) -> None:
        self._step = step
        self._newest = 0

    def log(self, scalars: Mapping[str, float], global_step: int) -> None:
        self._newest = global_step

    def close(self) -> None:
        pass

    def __call__(self) -> Interrupt:
        if self._newest == self._step:
            raise RuntimeError("validation failed")
        return Interrupt.NONE


@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_failed_validation_costs_no_step_and_is_repeated(
    corpus: Corpus, whole: list[tuple[float, ...]], step: int
) -> None:
    config = with_validation(corpus, f"failing-{step}", save_every=2)
    fail = FailAfter(step)
    with pytest.raises(RuntimeError, match="validation failed"):
        run_training(config, resume_from=None, device=CPU, hooks=RunHooks(interrupts=fail, trackers=(fail,)))
    assert newest_step(config) == step
    report = train_local(config)
    assert curve(config) == whole
    assert report["instruct"]["validation_loss"] == whole[-1][1]


@pytest.mark.parametrize(
    "num_checks",  # before the first batch, after one, between answers
    [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow), 3],
)
def test_a_stop_request_during_validation_saves_first(
    corpus: Corpus, whole: list[tuple[float, ...]], num_checks: int
) -> None:
    config = with_validation(corpus, f"stopped-{num_checks}", save_every=100)
    interrupts = iter([Interrupt.NONE] * (2 + num_checks) + [Interrupt.STOP])
    with pytest.raises(StoppedError, match=r"after step 2 of phase instruct; .*00000002"):
        run_training(config, resume_from=None, device=CPU, hooks=RunHooks(interrupts=lambda: next(interrupts)))
    assert newest_step(config) == 2
    train_local(config)
    assert curve(config) == whole
    attempts = [row["attempt"] for row in read_metrics(RunFolder.of(config).uri)]
    assert attempts == [1, 1, 2, 2]  # the second step is not repeated


def test_every_validation_batch_and_answer_resets_the_watchdog(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_validation(corpus, "watchdog", save_every=100)
    marks: list[int] = []
    mark = Watchdog.mark

    def note(watchdog: Watchdog, step: int, place: str) -> None:
        if place == "evaluating":
            marks.append(step)
        mark(watchdog, step, place)

    monkeypatch.setattr(Watchdog, "mark", note)
    train_local(config)
    assert marks.count(2) == marks.count(4) == len(marks) // 2
    assert marks.count(2) >= 2 + 3  # around the batches, and before each of three answers
    assert not Path(RunFolder.of(config).checkpoints, "step-00000002").exists()  # validation alone saves nothing
