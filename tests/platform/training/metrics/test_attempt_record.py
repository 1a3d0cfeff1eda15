"""attempt_record: how a run was started."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from timeviper_platform.training.metrics.attempt_record import describe_environment, write_attempt
from timeviper_platform.training.metrics.trackers import MlflowConfig


def test_an_attempt_keeps_configuration_and_command_without_passwords(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "runs=sftp://wilma:secret@nas/runs"])
    config = MlflowConfig(tracking_uri="https://wilma:secret@mlflow/")
    write_attempt(str(tmp_path), 2, config, describe_environment())
    folder = tmp_path / "attempts" / "attempt-0002"
    assert json.loads((folder / "environment.json").read_text())["command"] == "train.py runs=sftp://nas/runs"
    values = yaml.safe_load((folder / "config.yaml").read_text())
    assert values == {"tracking_uri": "https://mlflow/", "experiment": "timeviper"}
