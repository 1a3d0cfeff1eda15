from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from reference.training_corpus import make_corpus, train_values
from timeviper_platform.common.config import parse_config
from timeviper_platform.training.checkpoint.manager import Checkpoints
from timeviper_platform.training.config import TrainConfig
from timeviper_platform.training.local import train_local
from timeviper_platform.training.run import RunFolder

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.usefixtures("group_of_one")
def test_a_run_that_starts_at_anothers_end_is_reported_without_losses(
    tmp_path: Path,
) -> None:
    report_lines = runpy.run_path(str(ROOT / "jobs" / "train.py"))["report_lines"]
    values = train_values(make_corpus(tmp_path), name="first")
    values["phases"] = {"align": values["phases"]["align"] | {"steps": 1}}
    first = parse_config(TrainConfig, values)
    train_local(first)
    newest = Checkpoints(RunFolder.of(first).checkpoints).newest()
    assert newest is not None
    heading, row = report_lines(train_local(parse_config(TrainConfig, values | {"name": "second"}), resume=newest))
    assert heading.split() == ["phase", "steps", "first", "loss", "last", "loss", "samples", "rejects", "seconds"]
    assert row.split() == ["align", "0", "-", "-", "0", "3", "0.0"]
