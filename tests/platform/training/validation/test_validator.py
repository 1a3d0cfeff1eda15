"""Looks at the held-out samples, in whole runs on one rank in this process: what is saved before and ends them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from reference.training_corpus import Corpus, make_corpus, train_values, write_validation_samples
from timeviper_platform.common.config import parse_config
from timeviper_platform.training.checkpoint.manager import Checkpoints
from timeviper_platform.training.config import TrainConfig
from timeviper_platform.training.interrupts import Interrupt, StoppedError
from timeviper_platform.training.local import train_local
from timeviper_platform.training.metrics.writer import read_metrics
from timeviper_platform.training.run import RunFolder, run_training
from timeviper_platform.training.validation import exact_match as answers_module
from timeviper_platform.training.validation import validator as held_out
from timeviper_platform.training.watchdog import Watchdog

pytestmark = pytest.mark.usefixtures("group_of_one")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    corpus = make_corpus(tmp_path_factory.mktemp("corpus"))
    write_validation_samples(corpus)
    return corpus


def looked_at(corpus: Corpus, name: str, *, save_every: int) -> TrainConfig:
    """Four steps with looks behind the second and the last."""
    values = train_values(corpus, name=name, checkpoint={"every_steps": save_every, "keep": 9})
    init = values["phases"].pop("align")["init"]
    looks = {
        "samples": [{"uri": str(corpus.folder / "held-out.parquet")}],
        "every_steps": 2,
        "num_answers": 3,
        "where": "ranks",
    }
    values["phases"]["instruct"] |= {"init": init, "steps": 4, "validation": looks}
    return parse_config(TrainConfig, values)


@pytest.fixture(scope="module")
def whole(corpus: Corpus, group_of_one: None) -> list[tuple[float, ...]]:
    config = looked_at(corpus, "whole", save_every=2)
    train_local(config)
    return curve(config)


def curve(config: TrainConfig) -> list[tuple[float, ...]]:
    names = ("loss", "validation_loss", "validation_exact_match")
    return [tuple(row.get(name, -1.0) for name in names) for row in read_metrics(RunFolder.of(config).uri)]


def newest_step(config: TrainConfig) -> int:
    uri = Checkpoints(RunFolder.of(config).checkpoints).newest()
    return 0 if uri is None else int(uri[-8:])


def attempts(config: TrainConfig) -> list[int]:
    return [row["attempt"] for row in read_metrics(RunFolder.of(config).uri)]


@pytest.mark.parametrize("step", [2, 4])
def test_a_look_that_fails_costs_no_step_and_is_made_up_for(
    corpus: Corpus, whole: list[tuple[float, ...]], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    config = looked_at(corpus, f"failing-{step}", save_every=2)
    loss, looks = held_out.validation_loss, []

    def fail(*args: Any, **keywords: Any) -> float:
        looks.append(0)
        if len(looks) == step // 2:
            raise RuntimeError("the look failed")
        return loss(*args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(held_out, "validation_loss", fail)
        with pytest.raises(RuntimeError, match="the look failed"):
            train_local(config)
    assert newest_step(config) == step
    report = train_local(config)
    assert curve(config) == whole
    assert report["instruct"]["validation_loss"] == whole[-1][1]
    assert len(looks) == step // 2


@pytest.mark.parametrize("num_asked_before", [0, 1, 3])  # before the first batch, after one, between answers
def test_a_stop_is_heard_inside_a_look_and_saves_first(
    corpus: Corpus, whole: list[tuple[float, ...]], num_asked_before: int
) -> None:
    config = looked_at(corpus, f"stopped-{num_asked_before}", save_every=100)
    interrupts = iter([Interrupt.NONE] * (2 + num_asked_before) + [Interrupt.STOP])
    with pytest.raises(StoppedError, match=r"after step 2 of phase instruct; .*00000002"):
        run_training(config, resume_from=None, device=torch.device("cpu"), interrupts=lambda: next(interrupts))
    assert newest_step(config) == 2
    train_local(config)
    assert curve(config) == whole
    assert attempts(config) == [1, 1, 2, 2]  # the second step is not done again


def test_every_batch_and_answer_of_a_look_is_a_sign_of_life(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    config = looked_at(corpus, "signs", save_every=100)
    told: list[str] = []
    mark, answer = Watchdog.mark, answers_module._writes_answer

    def note(watchdog: Watchdog, step: int, place: str) -> None:
        told.append(place)
        mark(watchdog, step, place)

    def note_answer(*args: Any, **keywords: Any) -> bool:
        told.append("answer")
        return answer(*args, **keywords)

    monkeypatch.setattr(Watchdog, "mark", note)
    monkeypatch.setattr(answers_module, "_writes_answer", note_answer)
    train_local(config)
    places = [place for place in told if place in ("evaluating", "answer")]
    one_look = places[: len(places) // 2]
    assert places == one_look * 2
    assert one_look[-6:] == ["evaluating", "answer"] * 3
    assert one_look.count("evaluating") >= 2 + 3  # before and behind each step of batches, and before each answer
    assert not Path(RunFolder.of(config).checkpoints, "step-00000002").exists()  # a look alone saves nothing
