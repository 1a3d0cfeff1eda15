"""The training suite at toy sizes: both sides of a ratio do the same work, and each group returns its rows."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from timeviper_platform.benchmarks.measure import Row
from timeviper_platform.benchmarks.training import packing, recovery, stalls, step
from timeviper_platform.benchmarks.training.suite import TRAINING_GROUPS
from timeviper_platform.benchmarks.training.synthetic_corpus import TOY, make_films, make_mixture, run_values
from timeviper_platform.common.config import load_config, parse_config
from timeviper_platform.training.batches.packing import PackingConfig
from timeviper_platform.training.config import TrainConfig
from timeviper_platform.training.local import process_group, train_local

JOB = """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
attempt = len(list(folder.iterdir())) + 1
first = 10 * (attempt - 1)  # a checkpoint every 10 steps
with open(folder / f"attempt-{attempt:04d}.jsonl", "w") as file:
    for step in range(first + 1, first + 1000):
        file.write(json.dumps({"global_step": step, "attempt": attempt, "loss": 1.0}) + "\\n")
        file.flush()
        time.sleep(0.01)
"""


@pytest.fixture(scope="session")
def group_of_one() -> Iterator[None]:
    """torch.distributed with this process as its only rank. DeepSpeed needs one group for the whole session."""
    with process_group(use_gpu=False):
        yield


def check(rows: list[Row], group: str, bars: list[str | None]) -> None:
    assert [row.bar for row in rows] == bars
    assert {row.command for row in rows} == {f"python jobs/benchmark.py training --only {group}"}
    assert len({row.name for row in rows}) == len(rows)
    assert all(math.isfinite(row.value) and row.value >= 0 for row in rows)


def run_here(config: Path, environment: Mapping[str, str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        train_local(load_config(TrainConfig, config))


def test_the_suite_lists_its_groups() -> None:
    assert list(TRAINING_GROUPS) == ["packing", "step", "checkpoint", "data", "recovery"]


def test_packs_are_fuller_than_padded_batches() -> None:
    rows = packing.packing_rows(TOY, PackingConfig(max_tokens=600, max_frames=120))
    check(rows, "packing", [">= 98", None, None])
    packed, padded, grouped = (row.value for row in rows)
    assert padded < grouped < 100
    assert padded < packed <= 100


def test_fill_counts_padded_positions() -> None:
    lengths = np.array([1, 3, 2, 2])
    assert packing.padded_fill(lengths, 2) == 8 / 10
    assert packing.grouped_fill(lengths, 2) == 8 / 10  # 3 2 | 2 1
    assert packing.grouped_fill(np.array([5, 1, 5, 1]), 2, megabatch=1) == 12 / 20  # nothing moves between batches


@pytest.mark.slow
@pytest.mark.usefixtures("group_of_one")
def test_the_bare_loop_has_the_same_losses(tmp_path: Path) -> None:
    phase = {"steps": 4, "packing": {"max_tokens": 300}}
    values = run_values(make_mixture(tmp_path, TOY), phase, zero={"stage": 2, "bucket_size": 2_000_000})
    turns = step.run_in_turn(parse_config(TrainConfig, values), 2)
    assert turns.bare.losses == pytest.approx(turns.losses, rel=1e-5)
    assert len(turns.own_blocks) == len(turns.bare_blocks) == 1  # the first is not timed


def test_step_ratios_are_medians_over_blocks_then_processes() -> None:
    def run(values: Mapping[str, object], steps_per_block: int) -> step.Pairs:
        names.append(values["name"])
        slower = (1.0, 3.0, 1.2)[len(names) - 1]
        own = [(2.0, 1.0), (9.0, 3.0), (2.2, 1.0)]
        bare = [(2.0, 1.0), (3.0, 2.0), (2.0, 1.0)]
        return step.Pairs([step.Clock(slower * wall, cpu) for wall, cpu in own], [step.Clock(*block) for block in bare])

    names: list[object] = []
    rows = step.step_rows(TOY, num_processes=3, num_blocks=3, steps_per_block=2, run=run)
    check(rows, "step", ["<= 1.03", None, ">= 100"])
    assert [row.value for row in rows] == pytest.approx([1.2 * 1.1, 1.0, 1000.0])
    assert len(set(names)) == 3  # a finished run would be resumed


@pytest.mark.slow
def test_a_run_in_its_own_process_returns_its_pairs(tmp_path: Path) -> None:
    phase = {"steps": 3, "packing": {"max_tokens": 300}}
    pairs = step.run_apart(run_values(make_mixture(tmp_path, TOY), phase), 1)
    assert len(pairs.own) == len(pairs.bare) == 2
    assert pairs.wall_ratio > 0
    assert pairs.cpu_ratio > 0


def test_checkpoint_stalls_are_shares_of_the_intervals_between_saves() -> None:
    intervals = [(1.0, 0.0), (1.0, 2.0), (1.0, 0.0), (1.0, 0.5)]  # seconds and stall per step; a save every 2 steps
    metrics = [{"seconds": seconds, "checkpoint_stall_s": stall} for seconds, stall in intervals]
    rows = stalls.checkpoint_stall_rows(metrics, 2)
    check(rows, "checkpoint", ["<= 2", None])
    share, stall = rows
    assert share.value == pytest.approx(100 * (2.0 / 4.0 + 0.5 / 2.5) / 2)
    assert stall.value == 1.25


@pytest.mark.slow
@pytest.mark.usefixtures("group_of_one")
def test_long_films_train_with_checkpoints(tmp_path: Path) -> None:
    corpus = make_films(tmp_path, num_films=3, num_frames=4, dim=32)
    phase = {"steps": 2, "packing": {"max_tokens": 200}, "packs_per_step": 1}
    rows = stalls.run_and_read(corpus, run_values(corpus, phase, checkpoint={"every_steps": 1}), run_here)
    assert all(row["checkpoint_stall_s"] > 0 for row in rows)
    assert [row["num_vision_tokens"][0] for row in rows] == [64 * row["num_samples"] for row in rows]


def test_data_stalls_exclude_the_first_step() -> None:
    rows = [{"data_wait_share": 0.9, "seconds": 10.0}] + [{"data_wait_share": 0.1, "seconds": 1.0}] * 3
    share, first = stalls.data_stall_rows(rows, "from a disk, 1 MB", "<= 2")
    assert (share.value, share.bar, first.value) == (pytest.approx(10), "<= 2", pytest.approx(9))


def test_recovery_is_timed_to_the_next_finished_and_the_next_new_step(tmp_path: Path) -> None:
    job = tmp_path / "job.py"
    job.write_text(JOB)
    found = recovery.kill_and_measure([sys.executable, str(job), str(tmp_path / "metrics")], str(tmp_path), (13, 3))
    assert len(found) == 2
    assert all(0 < item.finished_s <= item.new_s for item in found)
    files = sorted((tmp_path / "metrics").iterdir())
    assert len(files) == 3  # the first attempt, and one after each kill
    last = [json.loads(line) for line in files[0].read_text().splitlines()][-1]["global_step"]
    assert last >= 13
    assert recovery.newest_step(str(tmp_path)) > last


def test_a_job_that_exits_before_the_kill_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended with 3 before its next step"):
        recovery.kill_and_measure([sys.executable, "-c", "raise SystemExit(3)"], str(tmp_path), (5,))
