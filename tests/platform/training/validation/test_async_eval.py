"""Asynchronous validation: its metrics, its failures, and that no step waits for it."""

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
from timeviper_platform.training.hooks import RunHooks
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


def with_validation(corpus: Corpus, name: str, *, keep: int = 9, **changes: Any) -> TrainConfig:
    """Six steps, validated after the second, the fourth and the last; only the last step has a regular checkpoint."""
    values = train_values(corpus, name=name, checkpoint={"every_steps": 100, "keep": keep})
    init = values["phases"].pop("align")["init"]
    validation = {"samples": [{"uri": str(corpus.folder / "held-out.parquet")}], "every_steps": 2, "num_answers": 3}
    values["phases"]["instruct"] |= {"init": init, "validation": validation | changes}
    return parse_config(TrainConfig, values)


def rows_of(config: TrainConfig) -> list[dict[str, Any]]:
    return read_metrics(RunFolder.of(config).uri)


def losses(config: TrainConfig) -> list[float]:
    return [row["loss"] for row in rows_of(config)]


def metric(config: TrainConfig, name: str = "validation_loss") -> dict[int, float]:
    return {row["step"]: row[name] for row in rows_of(config) if name in row}


class FakeHandle:
    """An evaluation that ends when the test decides."""

    def __init__(self, task: EvalTask, answer: Callable[[], dict[str, float] | None]) -> None:
        self.task, self._answer, self.is_closed = task, answer, False

    def metrics(self) -> dict[str, float] | None:
        return self._answer()

    def close(self) -> None:
        self.is_closed = True


class FakeStart:
    """Starts evaluations that return the result of `answer`."""

    def __init__(self, answer: Callable[[], dict[str, float] | None]) -> None:
        self._answer = answer
        self.handles: list[FakeHandle] = []

    def __call__(self, task: EvalTask) -> EvalHandle:
        assert (Path(task.checkpoint) / "COMMIT").exists()
        self.handles.append(FakeHandle(task, self._answer))
        return self.handles[-1]

    def steps(self) -> list[int]:
        return [handle.task.step for handle in self.handles]


class Steps:
    """A tracker of the newest step."""

    def __init__(self) -> None:
        self.newest = 0

    def log(self, scalars: Mapping[str, float], global_step: int) -> None:
        self.newest = max(self.newest, global_step)

    def close(self) -> None:
        pass


def train(config: TrainConfig, start: StartEval = EvalProcess, **hooks: Any) -> dict[str, Any]:
    newest = Checkpoints(RunFolder.of(config).checkpoints).newest()
    return run_training(config, resume_from=newest, device=CPU, hooks=RunHooks(start_eval=start, **hooks))


@pytest.fixture(scope="module")
def by_ranks(corpus: Corpus, group_of_one: None) -> TrainConfig:
    config = with_validation(corpus, "by-ranks", where="ranks")
    train(config)
    return config


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_a_process_computes_the_same_metrics_as_the_ranks_and_leaves_the_losses_unchanged(
    corpus: Corpus, by_ranks: TrainConfig
) -> None:
    config = with_validation(corpus, "by-processes")
    report = train(config)
    assert losses(config) == losses(by_ranks)
    assert list(metric(config)) == [2, 4, 6]
    assert metric(config) == pytest.approx(metric(by_ranks), rel=1e-6)
    assert metric(config, "validation_exact_match") == metric(by_ranks, "validation_exact_match")
    assert report["instruct"]["validation_loss"] == metric(config)[6]
    tags = [uri[-1] for uri in Checkpoints(RunFolder.of(config).checkpoints).committed()]
    assert tags == ["2", "4", "6"]  # asynchronous validation saves the checkpoint it evaluates


def test_no_step_waits_for_an_evaluation(corpus: Corpus, by_ranks: TrainConfig) -> None:
    config, steps = with_validation(corpus, "unhurried"), Steps()
    start = FakeStart(lambda: {"validation_loss": 1.5} if steps.newest == 6 else None)
    train(config, start, trackers=(steps,))
    assert start.steps() == [2, 4]  # one after another, the second after the last step
    assert metric(config) == {2: 1.5, 4: 1.5, 6: pytest.approx(metric(by_ranks)[6], rel=1e-6)}
    assert losses(config) == losses(by_ranks)


def test_a_failed_evaluation_logs_a_warning(
    corpus: Corpus, by_ranks: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> dict[str, float]:
        raise RuntimeError("a traceback\nno room on the device")

    config = with_validation(corpus, "failing")
    start = FakeStart(fail)
    train(config, start)
    assert start.steps() == [2, 4]
    assert all(handle.is_closed for handle in start.handles)
    assert list(metric(config)) == [6]
    assert losses(config) == losses(by_ranks)
    assert "instruct step 2: validation failed: no room on the device" in caplog.text


def test_unfinished_evaluations_are_dropped_after_max_wait_s(corpus: Corpus, caplog: pytest.LogCaptureFixture) -> None:
    config = with_validation(corpus, "endless", max_wait_s=0.5)
    start = FakeStart(lambda: None)
    train(config, start)
    assert start.steps() == [2]
    assert start.handles[0].is_closed
    assert list(metric(config)) == [6]
    assert "instruct: validation after step 2, 4 was not finished" in caplog.text


def test_a_resumed_run_repeats_unfinished_evaluations(corpus: Corpus, by_ranks: TrainConfig) -> None:
    config = with_validation(corpus, "stopped")
    interrupts = iter([Interrupt.NONE] * 5 + [Interrupt.STOP])
    start = FakeStart(lambda: None)
    with pytest.raises(StoppedError, match="after step 5"):
        train(config, start, interrupts=lambda: next(interrupts))
    assert start.handles[0].is_closed
    again = FakeStart(lambda: {"validation_loss": 2.5})
    train(config, again)
    assert again.steps() == [2, 4]
    assert metric(config) == {2: 2.5, 4: 2.5, 6: pytest.approx(metric(by_ranks)[6], rel=1e-6)}
    assert losses(config) == losses(by_ranks)
    never = FakeStart(lambda: None)
    train(config, never)  # nothing is left to evaluate
    assert not never.handles


def test_a_stop_request_ends_the_wait_for_evaluations(corpus: Corpus) -> None:
    config, steps = with_validation(corpus, "stopped-late"), Steps()
    interrupts: list[Interrupt] = []

    def interrupt() -> Interrupt:
        interrupts.append(Interrupt.STOP if steps.newest == 6 and len(interrupts) > 20 else Interrupt.NONE)
        return interrupts[-1]

    with pytest.raises(StoppedError, match="after step 6"):
        train(config, FakeStart(lambda: None), interrupts=interrupt, trackers=(steps,))
    assert train(config, FakeStart(lambda: {"validation_loss": 0.5}))["instruct"]["steps"] == 6


def test_an_evaluation_waits_for_its_checkpoint_and_the_previous_evaluation(corpus: Corpus) -> None:
    config = with_validation(corpus, "queue")
    started: list[int] = []
    answers: list[dict[str, float] | None] = [None, {"validation_loss": 1.0}]
    written: list[dict[str, Any]] = []

    def start(task: EvalTask) -> EvalHandle:
        started.append(task.step)
        return FakeHandle(task, lambda: answers.pop(0))

    evaluator = AsyncEvaluator(start, written.append)
    for step in (2, 4):
        evaluator.submit(EvalTask(config, "instruct", f"step-{step}", step, 100 + step))
    assert evaluator.poll(101)
    assert started == []
    assert evaluator.poll(104)
    assert evaluator.poll(104)
    assert started == [2]  # the first is still running
    assert evaluator.poll(104)
    assert started == [2, 4]
    assert written == [{"phase": "instruct", "step": 2, "global_step": 102, "validation_loss": 1.0}]
    answers.append({})
    assert not evaluator.poll(104)


def test_a_missing_checkpoint_is_an_error_with_advice(corpus: Corpus, by_ranks: TrainConfig) -> None:
    task = EvalTask(by_ranks, "instruct", str(corpus.folder / "step-00000009"), 9, 9)
    with pytest.raises(ValueError, match=r"step-00000009 is gone: .* raise validation.every_steps or checkpoint.keep"):
        evaluate_checkpoint(task)
    process = EvalProcess(task)
    with pytest.raises(RuntimeError, match="step-00000009 is gone"):
        wait_for(process.metrics)
    process.close()


def test_an_evaluation_process_exits_when_its_parent_closes_the_pipe(corpus: Corpus, by_ranks: TrainConfig) -> None:
    task = EvalTask(by_ranks, "instruct", Checkpoints(RunFolder.of(by_ranks).checkpoints).committed()[-1], 6, 6)
    command = [sys.executable, "-c", "import time; from timeviper_platform.training import eval_worker as worker;"]
    command[-1] += "worker.evaluate_checkpoint = lambda task: time.sleep(600); worker.main()"
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        process.stdin.write(pickle.dumps(task))
        process.stdin.close()
        assert process.wait(60) == 1


@pytest.mark.parametrize("bad", [{"where": "elsewhere"}, {"max_wait_s": -1}, {"resources": {"CPU": -1}}])
def test_invalid_settings_are_rejected(corpus: Corpus, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"validation.*{next(iter(bad))}"):
        with_validation(corpus, "bad", **bad)


def wait_for(metrics: Callable[[], dict[str, float] | None]) -> dict[str, float]:
    for _ in range(600):
        if (found := metrics()) is not None:
            return found
        time.sleep(0.1)
    raise AssertionError("the evaluation does not end")


def test_closing_an_idle_evaluator_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        AsyncEvaluator(FakeStart(lambda: None), lambda row: None).close()
    assert not caplog.text
