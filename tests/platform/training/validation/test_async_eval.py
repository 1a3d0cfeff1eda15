"""Looks at the held-out samples in processes beside the training: what they find, and that no step waits for them."""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from reference.training_corpus import Corpus, make_corpus, train_values, write_validation_samples
from timeviper_platform.common.config import parse_config
from timeviper_platform.training.checkpoint.manager import Checkpoints
from timeviper_platform.training.config import TrainConfig
from timeviper_platform.training.eval_worker import EvalProcess, evaluate_checkpoint
from timeviper_platform.training.interrupts import Interrupt, StoppedError
from timeviper_platform.training.metrics.writer import read_metrics
from timeviper_platform.training.run import RunFolder, run_training
from timeviper_platform.training.validation.async_eval import AsyncEvaluator, EvalHandle, EvalTask, StartEval

pytestmark = pytest.mark.usefixtures("group_of_one")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    corpus = make_corpus(tmp_path_factory.mktemp("corpus"))
    write_validation_samples(corpus)
    return corpus


def looked_at(corpus: Corpus, name: str, *, keep: int = 9, **held_out: Any) -> TrainConfig:
    """Six steps with looks behind the second, the fourth and the last; of its own accord it saves the last alone."""
    values = train_values(corpus, name=name, checkpoint={"every_steps": 100, "keep": keep})
    init = values["phases"].pop("align")["init"]
    looks = {"samples": [{"uri": str(corpus.folder / "held-out.parquet")}], "every_steps": 2, "num_answers": 3}
    values["phases"]["instruct"] |= {"init": init, "validation": looks | held_out}
    return parse_config(TrainConfig, values)


def rows_of(config: TrainConfig) -> list[dict[str, Any]]:
    return read_metrics(RunFolder.of(config).uri)


def losses(config: TrainConfig) -> list[float]:
    return [row["loss"] for row in rows_of(config)]


def told(config: TrainConfig, name: str = "validation_loss") -> dict[int, float]:
    return {row["step"]: row[name] for row in rows_of(config) if name in row}


class MadeLook:
    """A look whose end is the test's to say."""

    def __init__(self, task: EvalTask, answer: Callable[[], dict[str, float] | None]) -> None:
        self.task, self._answer, self.is_closed = task, answer, False

    def metrics(self) -> dict[str, float] | None:
        return self._answer()

    def close(self) -> None:
        self.is_closed = True


class Made:
    """Starts looks of which each gives `answer`."""

    def __init__(self, answer: Callable[[], dict[str, float] | None]) -> None:
        self._answer = answer
        self.looks: list[MadeLook] = []

    def __call__(self, task: EvalTask) -> EvalHandle:
        assert (Path(task.checkpoint) / "COMMIT").exists()
        self.looks.append(MadeLook(task, self._answer))
        return self.looks[-1]

    def steps(self) -> list[int]:
        return [look.task.step for look in self.looks]


class Steps:
    """A tracker that knows how far the ranks are."""

    def __init__(self) -> None:
        self.newest = 0

    def log(self, scalars: Mapping[str, float], global_step: int) -> None:
        self.newest = max(self.newest, global_step)

    def close(self) -> None:
        pass


def train(config: TrainConfig, start: StartEval = EvalProcess, **keywords: Any) -> dict[str, Any]:
    newest = Checkpoints(RunFolder.of(config).checkpoints).newest()
    return run_training(config, resume_from=newest, device=CPU, start_eval=start, **keywords)


@pytest.fixture(scope="module")
def by_ranks(corpus: Corpus, group_of_one: None) -> TrainConfig:
    config = looked_at(corpus, "by-ranks", where="ranks")
    train(config)
    return config


@pytest.mark.timeout(300)
def test_a_process_finds_what_the_ranks_find_and_training_does_not_feel_it(
    corpus: Corpus, by_ranks: TrainConfig
) -> None:
    config = looked_at(corpus, "by-processes")
    report = train(config)
    assert losses(config) == losses(by_ranks)
    assert list(told(config)) == [2, 4, 6]
    assert told(config) == pytest.approx(told(by_ranks), rel=1e-6)
    assert told(config, "validation_exact_match") == told(by_ranks, "validation_exact_match")
    assert report["instruct"]["validation_loss"] == told(config)[6]
    tags = [uri[-1] for uri in Checkpoints(RunFolder.of(config).checkpoints).committed()]
    assert tags == ["2", "4", "6"]  # a look beside saves what it looks at


def test_no_step_waits_for_a_look(corpus: Corpus, by_ranks: TrainConfig) -> None:
    config, steps = looked_at(corpus, "unhurried"), Steps()
    start = Made(lambda: {"validation_loss": 1.5} if steps.newest == 6 else None)
    train(config, start, trackers=[steps])
    assert start.steps() == [2, 4]  # in turn, the second one after the last step
    assert told(config) == {2: 1.5, 4: 1.5, 6: pytest.approx(told(by_ranks)[6], rel=1e-6)}
    assert losses(config) == losses(by_ranks)


def test_a_look_that_fails_costs_a_warning(
    corpus: Corpus, by_ranks: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> dict[str, float]:
        raise RuntimeError("a traceback\nno room on the device")

    config = looked_at(corpus, "failing")
    start = Made(fail)
    train(config, start)
    assert start.steps() == [2, 4]
    assert all(look.is_closed for look in start.looks)
    assert list(told(config)) == [6]
    assert losses(config) == losses(by_ranks)
    assert "instruct step 2: the look at the held-out samples failed: no room on the device" in caplog.text


def test_looks_that_do_not_end_are_left_out_after_a_while(corpus: Corpus, caplog: pytest.LogCaptureFixture) -> None:
    config = looked_at(corpus, "endless", max_wait_s=0.5)
    start = Made(lambda: None)
    train(config, start)
    assert start.steps() == [2]
    assert start.looks[0].is_closed
    assert list(told(config)) == [6]
    assert "instruct: the looks at the held-out samples after step 2, 4 are not done" in caplog.text


def test_a_run_that_ends_early_makes_up_for_its_looks(corpus: Corpus, by_ranks: TrainConfig) -> None:
    config = looked_at(corpus, "stopped")
    interrupts = iter([Interrupt.NONE] * 5 + [Interrupt.STOP])
    start = Made(lambda: None)
    with pytest.raises(StoppedError, match="after step 5"):
        train(config, start, interrupts=lambda: next(interrupts))
    assert start.looks[0].is_closed
    again = Made(lambda: {"validation_loss": 2.5})
    train(config, again)
    assert again.steps() == [2, 4]
    assert told(config) == {2: 2.5, 4: 2.5, 6: pytest.approx(told(by_ranks)[6], rel=1e-6)}
    assert losses(config) == losses(by_ranks)
    never = Made(lambda: None)
    train(config, never)  # there is nothing left to do
    assert not never.looks


def test_a_stop_is_heard_while_looks_are_waited_for(corpus: Corpus) -> None:
    config, steps = looked_at(corpus, "stopped-late"), Steps()
    interrupts: list[Interrupt] = []

    def interrupt() -> Interrupt:
        interrupts.append(Interrupt.STOP if steps.newest == 6 and len(interrupts) > 20 else Interrupt.NONE)
        return interrupts[-1]

    with pytest.raises(StoppedError, match="after step 6"):
        train(config, Made(lambda: None), interrupts=interrupt, trackers=[steps])
    assert train(config, Made(lambda: {"validation_loss": 0.5}))["instruct"]["steps"] == 6


def test_looks_wait_for_their_checkpoint_and_for_each_other(corpus: Corpus) -> None:
    config = looked_at(corpus, "queue")
    started: list[int] = []
    answers: list[dict[str, float] | None] = [None, {"validation_loss": 1.0}]
    written: list[dict[str, Any]] = []

    def start(task: EvalTask) -> EvalHandle:
        started.append(task.step)
        return MadeLook(task, lambda: answers.pop(0))

    looks = AsyncEvaluator(start, written.append)
    for step in (2, 4):
        looks.want(EvalTask(config, "instruct", f"step-{step}", step, 100 + step))
    assert looks.advance(101)
    assert started == []
    assert looks.advance(104)
    assert looks.advance(104)
    assert started == [2]  # the first goes on
    assert looks.advance(104)
    assert started == [2, 4]
    assert written == [{"phase": "instruct", "step": 2, "global_step": 102, "validation_loss": 1.0}]
    answers.append({})
    assert not looks.advance(104)


def test_a_checkpoint_that_is_gone_is_explained(corpus: Corpus, by_ranks: TrainConfig) -> None:
    task = EvalTask(by_ranks, "instruct", str(corpus.folder / "step-00000009"), 9, 9)
    with pytest.raises(ValueError, match=r"step-00000009 is gone: .* raise validation.every_steps or checkpoint.keep"):
        evaluate_checkpoint(task)
    look = EvalProcess(task)
    with pytest.raises(RuntimeError, match="step-00000009 is gone"):
        wait_for(look.metrics)
    look.close()


def test_a_look_ends_with_the_process_that_wanted_it(corpus: Corpus, by_ranks: TrainConfig) -> None:
    """Of which nothing is left but the end of a pipe."""
    task = EvalTask(by_ranks, "instruct", Checkpoints(RunFolder.of(by_ranks).checkpoints).committed()[-1], 6, 6)
    command = [sys.executable, "-c", "import time; from timeviper_platform.training import eval_worker as own;"]
    command[-1] += "own.evaluate_checkpoint = lambda task: time.sleep(600); own.main()"
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        process.stdin.write(pickle.dumps(task))
        process.stdin.close()
        assert process.wait(60) == 1


@pytest.mark.parametrize("bad", [{"where": "elsewhere"}, {"max_wait_s": -1}, {"resources": {"CPU": -1}}])
def test_wrong_places_are_refused(corpus: Corpus, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"validation.*{next(iter(bad))}"):
        looked_at(corpus, "bad", **bad)


def wait_for(figures: Callable[[], dict[str, float] | None]) -> dict[str, float]:
    for _ in range(600):
        if (found := figures()) is not None:
            return found
        time.sleep(0.1)
    raise AssertionError("the look does not end")


def test_the_queue_says_nothing_when_nothing_is_left(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        AsyncEvaluator(Made(lambda: None), lambda row: None).close()
    assert not caplog.text
