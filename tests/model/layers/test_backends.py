from __future__ import annotations

import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reference.small_models import make_model, make_sample, pack
from timeviper_model.inference.prefill import prefill
from timeviper_model.layers.backends import KERNELS, TORCH, Operations, choose_operations, set_backend, use_operations
from timeviper_model.layers.mamba2 import Mamba2Mixer

CUDA = torch.device("cuda")


def chunk_scan(x: Any, initial_states: Any = None, seq_idx: Any = None) -> None: ...


def conv1d(x: Any, seq_idx: Any = None) -> None: ...


def state_update(state: Any, dt_bias: Any = None) -> None: ...


def conv1d_update(x: Any, cache_seqlens: Any = None) -> None: ...


def varlen(query: Any, window_size: Any = None, enable_gqa: bool = False) -> None: ...


@pytest.fixture
def all_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every package is installed and the device is new."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    scan = SimpleNamespace(mamba_chunk_scan_combined=chunk_scan)
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.triton.ssd_combined", scan)  # type: ignore[arg-type]
    step = SimpleNamespace(selective_state_update=state_update)
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.triton.selective_state_update", step)  # type: ignore[arg-type]
    convolutions = SimpleNamespace(causal_conv1d_fn=conv1d, causal_conv1d_update=conv1d_update)
    monkeypatch.setitem(sys.modules, "causal_conv1d", convolutions)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=varlen))  # type: ignore[arg-type]


def test_auto_uses_every_available_kernel(all_kernels: None) -> None:
    assert choose_operations("auto", device=CUDA, dtype=torch.bfloat16) == KERNELS
    assert choose_operations("kernels", device=CUDA, dtype=torch.float16) == KERNELS


def test_torch_uses_no_kernel(all_kernels: None) -> None:
    assert choose_operations("torch", device=CUDA, dtype=torch.bfloat16) == TORCH


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        (torch.device("cpu"), torch.bfloat16, "need CUDA, not cpu"),
        (CUDA, torch.float32, "need bf16 or fp16, not torch.float32"),
    ],
)
def test_without_kernels_auto_is_torch_and_kernels_is_an_error(
    all_kernels: None, device: torch.device, dtype: torch.dtype, reason: str
) -> None:
    assert choose_operations("auto", device=device, dtype=dtype) == TORCH
    with pytest.raises(RuntimeError, match=f"{reason}.*set backend to auto or torch"):
        choose_operations("kernels", device=device, dtype=dtype)


def test_a_missing_package_disables_only_its_kernels(all_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)  # type: ignore[arg-type]
    chosen = choose_operations("auto", device=CUDA, dtype=torch.bfloat16)
    missing = {"convolution": TORCH.convolution, "convolution_step": TORCH.convolution_step}
    assert chosen == KERNELS._replace(**missing)
    with pytest.raises(RuntimeError, match=r"\(convolution: causal_conv1d.*install the extra \[cuda\]"):
        choose_operations("kernels", device=CUDA, dtype=torch.bfloat16)


def test_a_package_too_old_for_packs_is_not_used(all_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    old = SimpleNamespace(mamba_chunk_scan_combined=lambda x, initial_states=None: None)
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.triton.ssd_combined", old)  # type: ignore[arg-type]
    assert choose_operations("auto", device=CUDA, dtype=torch.bfloat16) == KERNELS._replace(scan=TORCH.scan)
    with pytest.raises(RuntimeError, match="lacks parameter seq_idx; install a newer one"):
        choose_operations("kernels", device=CUDA, dtype=torch.bfloat16)


def test_a_gpu_without_flash_attention_uses_torch_attention(all_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    chosen = choose_operations("auto", device=CUDA, dtype=torch.float16)
    assert chosen == KERNELS._replace(attention=TORCH.attention)
    with pytest.raises(RuntimeError, match=r"needs compute capability 8.0, the device has 7.5"):
        choose_operations("kernels", device=CUDA, dtype=torch.float16)


def test_the_choice_is_logged_once_with_its_reasons(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="timeviper_model.layers.backends"):
        set_backend(make_model(), "auto", device="cpu", dtype=torch.float32)
    (record,) = caplog.records
    assert "scan by ssd_scan (the kernels need CUDA, not cpu)" in record.getMessage()


def test_every_mixer_of_the_model_runs_what_was_chosen(all_kernels: None) -> None:
    calls: list[str] = []

    def spy(name: str) -> Any:
        def call(*operands: Any, **options: Any) -> Any:
            calls.append(name)
            return getattr(TORCH, name)(*operands, **options)

        call.__name__ = name
        return call

    model, batch = make_model(), pack([make_sample("ssvvvviirr")])
    expected = model(batch).loss_sum
    use_operations(model, Operations(*(spy(name) for name in Operations._fields)))  # M-*M*-
    assert torch.equal(model(batch).loss_sum, expected)
    assert calls == ["convolution", "scan", "attention", "convolution", "scan", "attention"]
    calls.clear()
    cache = model.new_cache(1, device="cpu", dtype=torch.float64)
    prefill(model, pack([make_sample("i")]), cache, 0)
    calls.clear()
    model.decode_step(torch.tensor([1]), cache, torch.tensor([0]))
    assert calls == ["convolution_step", "scan_step", "convolution_step", "scan_step"]
    set_backend(model, "auto", device="cuda", dtype=torch.bfloat16)
    assert all(module.scan is KERNELS.scan for module in model.modules() if isinstance(module, Mamba2Mixer))
    set_backend(model, "torch", device="cuda", dtype=torch.bfloat16)
    assert all(module.scan is TORCH.scan for module in model.modules() if isinstance(module, Mamba2Mixer))
