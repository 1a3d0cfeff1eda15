from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest
import torch

from timeviper_platform.training.optim.deepspeed_engine import import_deepspeed


@pytest.mark.parametrize(("backend", "accelerator"), [("gloo", "cpu"), ("nccl", None)])
def test_a_run_on_cpus_stays_there_on_a_machine_with_a_gpu(
    monkeypatch: pytest.MonkeyPatch, backend: str, accelerator: str | None
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(ops=SimpleNamespace(__compatible_ops__={})))  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    monkeypatch.setenv("DS_ACCELERATOR", "whatever it was")
    monkeypatch.delenv("DS_ACCELERATOR")
    import_deepspeed()
    assert os.environ.pop("DS_ACCELERATOR", None) == accelerator
