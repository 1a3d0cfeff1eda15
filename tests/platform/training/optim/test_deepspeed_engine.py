from __future__ import annotations

import os
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from timeviper_platform.training.optim.deepspeed_engine import import_deepspeed


def library(version: str) -> ModuleType:
    module = ModuleType("deepspeed")
    module.__dict__.update(__version__=version, ops=SimpleNamespace(__compatible_ops__={}))
    return module


def test_another_version_of_deepspeed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setitem(sys.modules, "deepspeed", library("0.20.1"))
    with pytest.raises(RuntimeError, match=r"deepspeed 0.20.1 is installed.*pip install deepspeed==0\.19\.\*"):
        import_deepspeed()


@pytest.mark.parametrize(("backend", "accelerator"), [("gloo", "cpu"), ("nccl", None)])
def test_a_cpu_run_stays_on_the_cpu_of_a_machine_with_a_gpu(
    monkeypatch: pytest.MonkeyPatch, backend: str, accelerator: str | None
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", library("0.19.8"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    monkeypatch.setenv("DS_ACCELERATOR", "whatever it was")
    monkeypatch.delenv("DS_ACCELERATOR")
    import_deepspeed()
    assert os.environ.pop("DS_ACCELERATOR", None) == accelerator
