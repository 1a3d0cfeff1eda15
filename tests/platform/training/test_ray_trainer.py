"""Ray Train's side of a run, without a cluster: preemption, the driver's stop request, and ends that ranks share."""

from __future__ import annotations

import itertools
import logging
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ray.train import PreemptionInfo

from reference.training_corpus import make_corpus, train_values
from timeviper_platform.common.config import parse_config
from timeviper_platform.training import ray_interrupts
from timeviper_platform.training.checkpoint.manager import Checkpoints
from timeviper_platform.training.config import TrainConfig, WorkersConfig
from timeviper_platform.training.distributed import all_ranks_end
from timeviper_platform.training.hooks import RunHooks
from timeviper_platform.training.interrupts import Interrupt, StoppedError
from timeviper_platform.training.ray_interrupts import PreemptionWatch, StopFile
from timeviper_platform.training.run import RunFolder, run_training

pytestmark = pytest.mark.usefixtures("group_of_one")


class Clock:
    """Seconds that the test sets."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def ray_answers(*answers: PreemptionInfo | None) -> Callable[[], PreemptionInfo | None]:
    """A stand-in for Ray's query: these answers, the last one for good."""
    left = list(answers)
    return lambda: left.pop(0) if len(left) > 1 else left[0]


def test_a_preemption_warning_saves_once_and_training_continues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    deadline_ms = int((time.time() + 90_000) * 1000)
    query = ray_answers(None, None, PreemptionInfo(deadline_ms, {"node-b": [1, 3], "node-a": [2]}))
    values = train_values(make_corpus(tmp_path), checkpoint={"every_steps": 0, "keep": 9})
    init = values["phases"].pop("align")["init"]
    values["phases"]["instruct"] |= {"init": init, "steps": 5}
    config = parse_config(TrainConfig, values)
    watch = PreemptionWatch(query=query, interval_s=0.0)  # before every step
    with caplog.at_level(logging.WARNING):
        run_training(config, resume_from=None, device=torch.device("cpu"), hooks=RunHooks(interrupts=watch))
    committed = Checkpoints(RunFolder.of(config).checkpoints).committed()
    assert [uri[-1] for uri in committed] == ["2", "5"]
    (warning,) = re.findall(r"ranks .*", caplog.text)
    assert re.fullmatch(r"ranks \[1, 2, 3\] lose their nodes \['node-a', 'node-b'\] in \d+ s: saving now", warning)


def test_each_new_node_and_its_last_minutes_are_saved_once() -> None:
    clock = Clock()
    early = PreemptionInfo(7200_000, {"node-a": [1]})  # in two hours
    both = PreemptionInfo(7200_000, {"node-a": [1], "node-b": [0]})
    late = PreemptionInfo(None, {"node-c": [0]})  # without a deadline
    query = ray_answers(None, early, early, both, both, both, both, late, late)
    watch, interrupts = PreemptionWatch(query=query, clock=clock), []
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
        with pytest.raises(ValueError, match=r"num_workers = .* must be at least 1, or \[minimum, maximum\]"):
            WorkersConfig(num_workers=wrong)


@pytest.mark.parametrize(("step_seconds", "num_steps"), [(20.0, 1), (2.0, 2), (0.125, 40)])
def test_the_query_interval_does_not_depend_on_the_step_time(step_seconds: float, num_steps: int) -> None:
    clock, queries = Clock(), list[float]()
    watch = PreemptionWatch(query=lambda: queries.append(clock.seconds), clock=clock)
    for _ in range(200):
        clock.seconds += step_seconds
        assert watch() is Interrupt.NONE
    gaps = {round((after - before) / step_seconds) for before, after in itertools.pairwise(queries)}
    assert gaps == {num_steps}
    assert queries[0] == step_seconds  # before the first step


def test_sigterm_to_the_driver_stops_the_workers(tmp_path: Path) -> None:
    path = tmp_path / "ray" / "run-1" / "STOP"
    stop_file = StopFile(str(path))
    watch = PreemptionWatch(stop_file.exists, query=lambda: None, interval_s=0.0)
    before = signal.getsignal(signal.SIGTERM)
    with stop_file.created_on_sigterm():
        assert watch() is Interrupt.NONE
        os.kill(os.getpid(), signal.SIGTERM)
        while not path.exists():
            time.sleep(0.01)
        assert watch() is Interrupt.STOP
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_ends_a_run_that_still_waits_for_its_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, the driver waited for workers that could not be started to read the stop request."""
    monkeypatch.setattr(ray_interrupts, "NO_PULSE_S", 0.1)
    stop_file = StopFile(str(tmp_path / "STOP"))
    beats = itertools.chain(range(5), itertools.repeat(5))  # a worker runs, and is then lost
    stopped = pytest.raises(StoppedError, match="while no worker was running; start it again")
    with stopped, stop_file.created_on_sigterm(lambda: next(beats)):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
    assert next(beats) == 5
    assert (tmp_path / "STOP").exists()


def test_an_end_is_shared_only_if_every_rank_reaches_it() -> None:
    assert all_ranks_end(1.0)
    assert not all_ranks_end(0.1, world_size=2)  # the other rank waits in a collective
