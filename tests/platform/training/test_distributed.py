"""Runs of several processes under gloo, as a launcher starts them, with kills in between."""

from __future__ import annotations

import random
import re
import shutil
import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from reference.counted_files import LOG_VARIABLE, reads
from reference.training_corpus import Corpus, make_corpus, train_config, train_values
from reference.training_ranks import start_ranks
from timeviper_model.config import PRESETS
from timeviper_model.timeviper import TimeViper
from timeviper_model.weights.weights_folder import load_tokenizer, save_pretrained
from timeviper_platform.common.config import parse_config
from timeviper_platform.training.config import TrainConfig
from timeviper_platform.training.local import train_local
from timeviper_platform.training.metrics.writer import read_metrics
from timeviper_platform.training.run import RunFolder

UNEQUAL_CASES = [(1, 3, "float32"), (2, 2, "float32"), (3, 2, "bfloat16")]
"""(stage, world_size, dtype) of `make test-slow`."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def curve(run: str) -> list[tuple[float, float, list[int]]]:
    return [(row["loss"], row["grad_norm"], row["num_vision_tokens"]) for row in read_metrics(run)]


def expect_same(one: list[Any], other: list[Any], rel: float) -> None:
    for (loss, norm, tokens), (expected_loss, expected_norm, expected_tokens) in zip(one, other, strict=True):
        assert loss == pytest.approx(expected_loss, rel=rel)
        assert norm == pytest.approx(expected_norm, rel=10 * rel)
        assert tokens == expected_tokens


@pytest.mark.slow
def test_two_ranks_killed_and_restarted_have_the_curve_of_one_rank(
    corpus: Corpus, tmp_path: Path, group_of_one: None
) -> None:
    values = train_values(corpus, name="ranks", checkpoint={"every_steps": 12, "keep": 9})
    init = values["phases"].pop("align")["init"]
    values["phases"]["instruct"] |= {"init": init, "steps": 30}  # three packs per step: one rank gets a dummy
    run = str(Path(values["runs"]) / "ranks")
    ranks = start_ranks(values, tmp_path)
    ranks.wait_until(lambda: len(read_metrics(run)) >= 14)
    ranks.kill()
    ranks.wait()
    first = {row["global_step"]: row for row in read_metrics(run)}
    assert 14 <= len(first) < 24  # past the checkpoint after step 12, before the one after step 24

    start_ranks(values, tmp_path).finish()
    again = [row for row in read_metrics(run) if row["attempt"] == 2]
    repeated = [row for row in again if row["global_step"] in first]
    assert repeated  # steps between the last checkpoint and the kill
    assert all(row["loss"] == first[row["global_step"]]["loss"] for row in repeated)

    alone = train_config(corpus, **{**values, "name": "alone"})
    train_local(alone)
    expect_same(curve(run), curve(RunFolder.of(alone).uri), rel=1e-6)


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)  # 21 starts of two processes
@pytest.mark.parametrize("stage", [2, 3])
def test_twenty_kills_at_random_moments_leave_no_trace_in_the_curve(corpus: Corpus, tmp_path: Path, stage: int) -> None:
    changes = {"dtype": "bfloat16", "checkpoint": {"every_steps": 2, "keep": 2}}
    values = one_phase(corpus, f"killed-{stage}", steps=200, stage=stage) | changes
    run, moments = str(Path(values["runs"]) / values["name"]), random.Random(stage)
    for _ in range(20):
        ranks, done = start_ranks(values, tmp_path), len(read_metrics(run))
        more = moments.randint(1, 5)
        ranks.wait_until(lambda done=done, more=more: len(read_metrics(run)) >= done + more)  # type: ignore[misc]
        time.sleep(moments.uniform(0.0, 0.3))
        ranks.kill()
        ranks.wait()
    start_ranks(values, tmp_path).finish()
    whole = values | {"name": f"whole-{stage}"}
    start_ranks(whole, tmp_path).finish()
    assert curve(run) == curve(str(Path(whole["runs"]) / whole["name"]))
    assert len({row["attempt"] for row in read_metrics(run)}) > 10


def keep_up_to(run: str, step: int) -> None:
    """Removes the checkpoints after `step`, as if the run had been killed there."""
    for folder in Path(run, "checkpoints").glob("step-*"):
        if int(folder.name[-8:]) > step:
            shutil.rmtree(folder)


def samples_of(run: str) -> list[tuple[int, int, int]]:
    """The batch sizes of each step, equal for the same packs in the same order."""
    return [(row["num_samples"], row["num_tokens"], row["num_targets"]) for row in read_metrics(run)]


def one_phase(corpus: Corpus, name: str, steps: int, stage: int = 2) -> dict[str, Any]:
    values = train_values(corpus, name=name, zero={"stage": stage}, checkpoint={"every_steps": steps // 3, "keep": 99})
    init = values["phases"].pop("align")["init"]
    values["phases"]["instruct"] |= {"init": init, "steps": steps}  # three packs per step: two ranks get a dummy
    return values


@pytest.mark.slow
def test_a_run_of_two_ranks_resumes_on_one(corpus: Corpus, tmp_path: Path, group_of_one: None) -> None:
    values = one_phase(corpus, "two-one", steps=9)
    run = str(Path(values["runs"]) / "two-one")
    start_ranks(values, tmp_path).finish()
    whole, given = curve(run), samples_of(run)
    keep_up_to(run, 3)
    train_local(parse_config(TrainConfig, values))
    assert [row["attempt"] for row in read_metrics(run)] == [1] * 3 + [2] * 6
    assert samples_of(run) == given
    expect_same(curve(run), whole, rel=1e-5)


@pytest.mark.slow
def test_a_folder_that_only_one_rank_sees_is_refused_before_the_first_step(corpus: Corpus, tmp_path: Path) -> None:
    """Before, such a run trained up to its first save and committed one rank's files."""
    values = one_phase(corpus, "private", steps=3) | {"runs": "~/runs"}
    homes = [tmp_path / "home-0", tmp_path / "home-1"]
    for home in homes:
        home.mkdir()
    ranks = start_ranks(values, tmp_path, homes=homes)
    assert ranks.wait() == [1, 1]
    message = (
        r"rank 1 on \S+ cannot see the files that rank 0 on \S+ writes into ~/runs/private/checkpoints.*set `runs`"
    )
    assert re.search(message, ranks.log.read_text())
    assert read_metrics(str(homes[0] / "runs" / "private")) == []


@pytest.mark.slow
def test_a_resume_fetches_its_checkpoint_once_a_machine_and_a_start_its_weights(corpus: Corpus, tmp_path: Path) -> None:
    """Before, every rank fetched the weights: 1.5 times the bytes with two ranks."""
    weights, log = corpus.folder / "weights", tmp_path / "log"
    model = TimeViper(PRESETS["tiny"])
    model.init_weights(torch.Generator().manual_seed(3))
    save_pretrained(model, weights, tokenizer=load_tokenizer(corpus.tokenizer))
    values = one_phase(corpus, "bytes", steps=3) | {"runs": f"counted://{corpus.folder}/counted"}
    values |= {"tokenizer": f"counted://{corpus.tokenizer}"}
    values["phases"]["instruct"] |= {"init": {"weights": f"counted://{weights}"}, "steps": 1}
    environment = {LOG_VARIABLE: str(log), "TMPDIR": str(tmp_path)}
    start_ranks(values, tmp_path, environment=environment).finish()
    run = corpus.folder / "counted" / "bytes"
    assert 1.0 <= fetched_share(log, weights) <= 1.2
    log.unlink()
    values["phases"]["instruct"]["steps"] = 2  # lengthened: goes on from the last checkpoint
    start_ranks(values, tmp_path, environment=environment).finish()
    assert [row["attempt"] for row in read_metrics(str(run))] == [1, 2]
    assert 1.0 <= fetched_share(log, run / "checkpoints" / "step-00000001") <= 1.2
    assert fetched_share(log, weights) < 0.01  # config.json alone


def fetched_share(log: Path, folder: Path) -> float:
    """Bytes that were read of a folder over its size."""
    fetched = sum(num_bytes for path, num_bytes in reads(log) if Path(path).parent == folder)
    return fetched / sum(path.stat().st_size for path in folder.iterdir())


def test_all_ranks_fail_if_rank_0_cannot_open_its_files(corpus: Corpus, tmp_path: Path) -> None:
    values = one_phase(corpus, "no-metrics", steps=3)
    folder = Path(values["runs"]) / "no-metrics"
    folder.mkdir(parents=True)
    (folder / "metrics").write_text("a file where a folder should be")
    ranks = start_ranks(values, tmp_path)
    assert ranks.wait() == [1, 1]
    assert "rank 0: [Errno" in ranks.log.read_text()


@pytest.mark.slow
@pytest.mark.timeout(1200)  # six processes on two cores
@pytest.mark.parametrize("stage", [*(pytest.param(n, marks=pytest.mark.exhaustive) for n in (1, 2)), 3])
def test_sixty_steps_on_two_then_one_then_three_ranks_equal_those_of_one_rank(
    corpus: Corpus, tmp_path: Path, group_of_one: None, stage: int
) -> None:
    values = one_phase(corpus, f"two-one-three-{stage}", steps=60, stage=stage)
    run = str(Path(values["runs"]) / values["name"])
    for world_size, last in ((2, 20), (1, 40)):
        ranks = start_ranks(values, tmp_path, world_size=world_size)
        ranks.wait_until(Path(run, "checkpoints", f"step-{last:08d}", "COMMIT").exists)
        ranks.kill()
        ranks.wait()
    start_ranks(values, tmp_path, world_size=3).finish()
    assert [row["attempt"] for row in read_metrics(run)] == [1] * 20 + [2] * 20 + [3] * 20
    alone = parse_config(TrainConfig, values | {"name": f"alone-60-{stage}"})
    train_local(alone)
    assert samples_of(run) == samples_of(RunFolder.of(alone).uri)
    expect_same(curve(run), curve(RunFolder.of(alone).uri), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "world_size", "dtype"),
    [
        pytest.param(*case, marks=[] if case in UNEQUAL_CASES else pytest.mark.exhaustive)
        for case in product([1, 2, 3], [2, 3], ["float32", "bfloat16"])
    ],
)
def test_ranks_with_unequal_numbers_of_labels_have_the_curve_of_one_rank(
    corpus: Corpus, tmp_path: Path, group_of_one: None, stage: int, world_size: int, dtype: str
) -> None:
    """Ranks need other numbers of chunks of logits: 2 rows at a time, as a vocabulary of 131,072 has 512."""
    values = one_phase(corpus, f"labels-{stage}-{world_size}-{dtype}", steps=3, stage=stage) | {"dtype": dtype}
    ranks = start_ranks(values, tmp_path, world_size=world_size, logit_rows=2)
    ranks.finish()
    alone = parse_config(TrainConfig, values | {"name": f"alone-{values['name']}"})
    train_local(alone)
    own, expected = curve(str(Path(values["runs"]) / values["name"])), curve(RunFolder.of(alone).uri)
    expect_same(own, expected, rel=1e-6 if dtype == "float32" else 2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (1, 2, 3))])
def test_two_ranks_under_every_zero_stage_have_the_curve_of_one_rank(
    corpus: Corpus, tmp_path: Path, group_of_one: None, stage: int
) -> None:
    # stage 3 with recomputation: each gather of parameters must find its partner on the other rank
    values = train_values(corpus, name=f"zero-{stage}", zero={"stage": stage}, activation_checkpointing=stage == 3)
    start_ranks(values, tmp_path).finish()
    alone = train_config(corpus, name=f"alone-{stage}", zero={"stage": 0})
    train_local(alone)
    expect_same(curve(str(Path(values["runs"]) / values["name"])), curve(RunFolder.of(alone).uri), rel=1e-6)
