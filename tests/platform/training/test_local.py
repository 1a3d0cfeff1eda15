"""local: training in this process, without Ray."""

from __future__ import annotations

import os
import subprocess
import sys

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
