"""What the Ray Train adapter does with what Ray tells a worker, without a cluster."""

from __future__ import annotations

import itertools
import logging
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from ray import train

from reference.training_corpus import make_corpus, train_values
from timeviper_platform.common.config import parse_config
from timeviper_platform.training import distributed as ranks
from timeviper_platform.training import ray_trainer as trainer
from timeviper_platform.training.checkpoint.manager import Checkpoints
from timeviper_platform.training.config import TrainConfig, WorkersConfig
from timeviper_platform.training.distributed import all_ranks_end
from timeviper_platform.training.interrupts import Interrupt
from timeviper_platform.training.ray_trainer import PreemptionWatch
from timeviper_platform.training.run import RunFolder, run_training

pytestmark = pytest.mark.usefixtures("group_of_one")


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds

    time = monotonic


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[train.PreemptionInfo | None]:
    """What Ray answers from now on, the last answer for good; `None` = no node goes away."""
    answers: list[train.PreemptionInfo | None] = [None]
    monkeypatch.setattr(train, "get_preemption_info", lambda: answers.pop(0) if len(answers) > 1 else answers[0])
    return answers


def test_a_warning_makes_one_checkpoint_at_once_and_training_goes_on(
    told: list[train.PreemptionInfo | None],
    tmp_path_factory: pytest.TempPathFactory,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trainer, "PREEMPTION_CHECK_S", 0.0)  # before every step
    deadline_ms = int((time.time() + 90_000) * 1000)
    told[:] = [None, None, train.PreemptionInfo(deadline_ms, {"node-b": [1, 3], "node-a": [2]})]
    values = train_values(make_corpus(tmp_path_factory.mktemp("corpus")), checkpoint={"every_steps": 0, "keep": 9})
    init = values["phases"].pop("align")["init"]
    values["phases"]["instruct"] |= {"init": init, "steps": 5}
    config = parse_config(TrainConfig, values)
    with caplog.at_level(logging.WARNING):
        run_training(config, resume_from=None, device=torch.device("cpu"), interrupts=PreemptionWatch())
    committed = Checkpoints(RunFolder.of(config).checkpoints).committed()
    assert [uri[-1] for uri in committed] == ["2", "5"]
    (said,) = re.findall(r"ranks .*", caplog.text)
    assert re.fullmatch(r"ranks \[1, 2, 3\] lose their nodes \['node-a', 'node-b'\] in \d+ s: saving now", said)


def test_later_warnings_and_the_last_minutes_are_worth_a_save_each(
    monkeypatch: pytest.MonkeyPatch, told: list[train.PreemptionInfo | None]
) -> None:
    clock = Clock()
    monkeypatch.setattr(trainer, "time", clock)
    early = train.PreemptionInfo(7200_000, {"node-a": [1]})  # in two hours
    both = train.PreemptionInfo(7200_000, {"node-a": [1], "node-b": [0]})
    late = train.PreemptionInfo(None, {"node-c": [0]})  # nobody says when
    told[:] = [None, early, early, both, both, both, both, late, late]
    watch, interrupts = PreemptionWatch(), []
    for clock.seconds in (10.0, 20.0, 30.0, 40.0, 5000.0, 7100.0, 7110.0, 7120.0, 7130.0):
        interrupts.append(watch())
    assert [item is Interrupt.SAVE for item in interrupts] == [
        False,
        True,
        False,
        True,
        False,
        True,
        False,
        True,
        False,
    ]


def test_workers_are_a_number_or_a_range() -> None:
    assert parse_config(WorkersConfig, {"num_workers": [1, 4]}) == WorkersConfig(num_workers=(1, 4))
    assert [WorkersConfig(num_workers=number).max_workers for number in (3, (1, 4))] == [3, 4]
    for wrong in (0, (3, 2), (0, 2)):
        with pytest.raises(ValueError, match=r"num_workers = .* must be at least 1, or \[least, most\]"):
            WorkersConfig(num_workers=wrong)


@pytest.mark.parametrize(("step_seconds", "num_steps"), [(20.0, 1), (2.0, 2), (0.125, 40)])
def test_ray_is_asked_every_few_seconds_whatever_a_step_takes(
    monkeypatch: pytest.MonkeyPatch, step_seconds: float, num_steps: int
) -> None:
    clock, asked = Clock(), list[float]()
    monkeypatch.setattr(trainer, "time", clock)
    monkeypatch.setattr(train, "get_preemption_info", lambda: asked.append(clock.seconds))
    watch = PreemptionWatch()
    for _ in range(200):
        clock.seconds += step_seconds
        assert watch() is Interrupt.NONE
    gaps = {round((after - before) / step_seconds) for before, after in itertools.pairwise(asked)}
    assert gaps == {num_steps}
    assert asked[0] == step_seconds  # before the first step


def test_sigterm_to_the_driver_is_a_wish_of_the_workers_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[train.PreemptionInfo | None]
) -> None:
    monkeypatch.setattr(trainer, "PREEMPTION_CHECK_S", 0.0)
    stop = tmp_path / "ray" / "run-1" / trainer.STOP_FILE
    watch = PreemptionWatch(lambda: trainer._is_there(str(stop)))
    before = signal.getsignal(signal.SIGTERM)
    with trainer._passing_on_sigterm(str(stop)):
        assert watch() is Interrupt.NONE
        os.kill(os.getpid(), signal.SIGTERM)
        while not stop.exists():
            time.sleep(0.01)
        assert watch() is Interrupt.STOP
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_mistake_that_one_rank_alone_finds_is_no_common_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all_ranks_end(1.0)
    monkeypatch.setattr(ranks.dist, "get_world_size", lambda: 2)  # the other waits in a collective
    assert not all_ranks_end(0.1)
