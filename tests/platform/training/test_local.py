"""local: training in this process, without Ray."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from timeviper_platform.common.config import parse_config
from timeviper_platform.training import local, ray_trainer
from timeviper_platform.training.checkpoint.manager import Checkpoints, Snapshot
from timeviper_platform.training.config import HANG_TIMEOUT_S, TrainConfig
from timeviper_platform.training.local import process_group
from timeviper_platform.training.run import RunFolder

TWO_GROUPS = """
import os
import torch
from timeviper_platform.training.config import ZeroConfig
from timeviper_platform.training.local import process_group
from timeviper_platform.training.optim.deepspeed_engine import build_ds_engine
from timeviper_platform.training.optim.parameter_groups import ParameterGroup

for stage in (2, 3):
    with process_group(use_gpu=False):
        names = ("weight", "bias")
        groups = [ParameterGroup(name="all", lr=0.1, weight_decay=0.0, parameter_names=names, num_parameters=20)]
        config = ZeroConfig(stage=stage)
        engine = build_ds_engine(torch.nn.Linear(4, 4), groups, config, dtype="float32", num_micro_steps=1)
        engine.backward(engine(torch.ones(1, 4)).sum())
        engine.step()
    assert not torch.distributed.is_initialized()
    assert "LOCAL_RANK" not in os.environ
"""


def test_a_process_trains_again_in_another_group() -> None:
    """Before, DeepSpeed used the first group in the second one, and failed."""
    own = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}  # of a process group here
    subprocess.run([sys.executable, "-c", TWO_GROUPS], env=own, check=True, timeout=300)


def _config(folder: Path, **workers: float) -> TrainConfig:
    phase = {
        "samples": [{"uri": "samples.parquet"}],
        "trainable": [{"match": ".*", "lr": 0.1}],
        "packing": {"max_tokens": 8},
        "packs_per_step": 1,
        "steps": 1,
        "init": {"preset": "tiny"},
    }
    values = {"name": "run", "runs": str(folder), "feature_store": "features", "tokenizer": "tokenizer"}
    return parse_config(TrainConfig, values | {"phases": {"align": phase}, "workers": workers})


def _timeout_of(group: Any) -> timedelta:
    timeout: timedelta = group._get_backend(torch.device("cpu")).options._timeout  # what a collective gets
    return timeout


@pytest.mark.parametrize(("hang_s", "expected_s"), [(60.0, HANG_TIMEOUT_S + 300), (7200.0, 7500.0)])
def test_collectives_outlast_the_watchdog(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hang_s: float, expected_s: float
) -> None:
    """torch ended NCCL's after 10 minutes, gloo's and Ray's after 30, whatever workers.hang_timeout_s."""
    config = _config(tmp_path, hang_timeout_s=hang_s)
    seen: list[float] = []

    @contextlib.contextmanager
    def group(*, use_gpu: bool, timeout_s: float) -> Iterator[None]:
        seen.append(timeout_s)
        raise InterruptedError
        yield

    class Trainer:
        def __init__(self, _: object, *, torch_config: Any, **options: object) -> None:
            seen.append(torch_config.timeout_s)

        def fit(self) -> SimpleNamespace:
            return SimpleNamespace(return_value={})

    monkeypatch.setattr(local, "process_group", group)
    with pytest.raises(InterruptedError):
        local.train_local(config)
    monkeypatch.setattr(ray_trainer, "TorchTrainer", Trainer)
    assert ray_trainer._fit(config, RunFolder.of(config), None) == {}
    assert seen == [expected_s, expected_s]


def test_the_groups_have_their_timeouts(tmp_path: Path) -> None:
    if not torch.distributed.is_initialized():
        with process_group(use_gpu=False, timeout_s=77.0):
            assert _timeout_of(torch.distributed.distributed_c10d._get_default_group()) == timedelta(seconds=77)
    with process_group(use_gpu=False):
        checkpoints = Checkpoints(str(tmp_path))
        checkpoints.write(Snapshot(tag="step-00000001", global_step=1, files={"a.pt": {}}, documents={}))
        assert checkpoints.wait() is not None
        assert _timeout_of(checkpoints._group) == timedelta(days=1), "a slow upload ends no run"


def test_an_error_of_the_storage_is_no_traceback(tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("s3://bucket/runs: Access Denied; give the job credentials")

    file = tmp_path / "train.yaml"
    file.write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "load_config", refuse)
        assert local.main(["--config", str(file)]) == 1
