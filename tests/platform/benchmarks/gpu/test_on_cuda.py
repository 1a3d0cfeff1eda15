"""The groups of the gpu suite at toy sizes on a simulated CUDA device."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import pytest
import torch

from reference import kernel_contracts
from reference.simulated_cuda import simulated_cuda
from timeviper_model.config import HybridConfig, Qwen2Config, TransVSite
from timeviper_platform.benchmarks.gpu import film, kernels, prefill, training, vision, vllm
from timeviper_platform.benchmarks.gpu import token_decode as decode
from timeviper_platform.benchmarks.gpu.suite import require_cuda
from timeviper_platform.benchmarks.model.models import narrow_config
from timeviper_platform.benchmarks.video.clips import ClipSpec

TOWER = vision.TowerSize(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=70, patch_size=14
)
TRANSFORMER = Qwen2Config(
    vocab_size=1024,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
)
SITES = (TransVSite(layer=1, select="uniform", keep=0.5), TransVSite(layer=2, select="attention", keep=0.1))
OURS = narrow_config(16, plan=SITES, pattern="MM*-")
PACKAGES = ("mamba_ssm.ops.triton.ssd_combined", "causal_conv1d")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A simulated device with PyTorch's own kernel but no kernel packages."""
    for name in PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", kernel_contracts)
    gc.freeze()  # collections between measurements would take half a second each
    with simulated_cuda():
        yield require_cuda()
    gc.unfreeze()


@pytest.fixture
def packages(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds stand-ins for the kernel packages."""
    for name in PACKAGES:
        monkeypatch.setitem(sys.modules, name, kernel_contracts)


def test_kernels(packages: None, device: torch.device) -> None:
    text = OURS.text
    assert isinstance(text, HybridConfig)
    rows = kernels.kernel_rows(device, text=text, num_tokens=8, repeats=1)
    assert [row.holds for row in rows if row.bar is not None] == [True] * 3


@pytest.mark.slow
def test_prefill_by_kernels(packages: None, device: torch.device) -> None:
    rows = prefill.prefill_rows(device, config=OURS, frames=(1,), repeats=1)
    assert len(rows) == 2 * 2 * 2 + 1
    assert "(kernels)" in rows[0].name


@pytest.mark.slow
def test_training(device: torch.device) -> None:
    rows = training.training_rows(device, config=OURS, num_tokens=(256,), repeats=1, peak=1e12)
    assert [row.holds for row in rows[:2]] == [True] * 2
    assert sum(row.name.endswith("MFU") for row in rows) == 2


@pytest.mark.slow
def test_decode_and_vllm(device: torch.device) -> None:
    sizes = {"num_frames": 1, "num_new": 2, "batch": 2, "num_steps": 1, "repeats": 1}
    rows = decode.decode_rows(device, ours=OURS, transformer=TRANSFORMER, **sizes)
    assert sum("(a CUDA graph)" in row.name for row in rows) == 6
    assert vllm.vllm_rows(device, ours=OURS, other=lambda *_: 1.0, **sizes)


def test_vision_and_film(device: torch.device) -> None:
    rows = vision.vision_rows(device, size=TOWER, batch_frames=2, num_batches=1, peak=1e12, repeats=1)
    clip = ClipSpec(seconds=3, fps=10, width=64, height=48)
    rows += film.film_rows(
        device, size=TOWER, backends=("pyav",), num_decoders=1, batch_frames=2, clip=clip, repetitions=1, repeats=1
    )
    assert len(rows) == 8
