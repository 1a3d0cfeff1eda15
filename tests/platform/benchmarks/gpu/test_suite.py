"""The gpu suite at toy sizes on the CPU, and the formulas of its rows."""

from __future__ import annotations

import json
import logging
import runpy
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from reference import kernel_contracts
from timeviper_model.config import (
    NEMOTRON_NANO_9B_V2,
    PAPER_PLAN,
    PRESETS,
    HybridConfig,
    Qwen2Config,
    TimeViperConfig,
    TransVSite,
)
from timeviper_model.timeviper import TimeViper
from timeviper_platform.benchmarks.gpu import device, film, kernels, prefill, training, vision, vllm
from timeviper_platform.benchmarks.gpu import token_decode as decode
from timeviper_platform.benchmarks.gpu.suite import gpu_groups
from timeviper_platform.benchmarks.measure import Row
from timeviper_platform.benchmarks.model.models import narrow_config, video_question
from timeviper_platform.benchmarks.video.clips import ClipSpec, make_clip
from timeviper_platform.common.devices import peak_flops
from timeviper_platform.data.media.container import DecodeError
from timeviper_platform.data.video.reader import Backend, open_video, read_frames

ROOT = Path(__file__).parents[4]
CPU = torch.device("cpu")
TINY_TOWER = vision.TowerSize(
    hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=70, patch_size=14
)


def check(rows: list[Row], group: str) -> None:
    assert {row.command for row in rows} == {f"python jobs/benchmark.py gpu --only {group}"}
    assert len({row.name for row in rows}) == len(rows)
    json.dumps([row.as_dict() for row in rows], allow_nan=False)


def toy_text() -> HybridConfig:
    text = narrow_config(16, plan=(), pattern="M*").text
    assert isinstance(text, HybridConfig)
    return text


def test_the_suite_lists_its_groups() -> None:
    assert list(gpu_groups(CPU)) == ["kernels", "vision", "prefill", "decode", "training", "vllm", "film"]


@pytest.mark.slow
def test_correct_kernels_have_small_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mamba_ssm.ops.triton.ssd_combined", "causal_conv1d", "torch.nn.attention.varlen"):
        monkeypatch.setitem(sys.modules, name, kernel_contracts)
    rows = kernels.kernel_rows(CPU, text=toy_text(), num_tokens=16, repeats=1)
    check(rows, "kernels")
    errors = [row for row in rows if row.bar is not None]
    assert [row.name.split(" (")[0] for row in errors] == ["scan", "convolution", "attention"]
    assert all(row.holds for row in errors)
    assert any(row.value > 0 for row in errors)


def test_a_wrong_kernel_has_a_large_error() -> None:
    for pair in kernels.pairs(toy_text(), 16, CPU):
        wrong = pair._replace(kernel=lambda *x, run=pair.torch: [1.5 * out for out in run(*x)])
        assert kernels.largest_error(wrong) == pytest.approx(0.5, rel=0.1)


@pytest.mark.slow
def test_a_failing_kernel_gives_a_row_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("no kernel image is available\nfor execution")

    for name in ("mamba_ssm.ops.triton.ssd_combined", "causal_conv1d", "torch.nn.attention.varlen"):
        monkeypatch.setitem(sys.modules, name, kernel_contracts)
    broken_scan = SimpleNamespace(mamba_chunk_scan_combined=broken)
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.triton.ssd_combined", broken_scan)
    rows = kernels.kernel_rows(CPU, text=toy_text(), num_tokens=16, repeats=1)
    check(rows, "kernels")
    (failed,) = (row for row in rows if not row.holds and row.bar is not None)
    assert failed.name.endswith("RuntimeError: no kernel image is available")
    assert [row.name.split(" (")[0] for row in rows if row.bar is not None] == ["scan", "convolution", "attention"]


def test_a_missing_kernel_is_logged_and_has_no_row(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("mamba_ssm.ops.triton.ssd_combined", "causal_conv1d", "torch.nn.attention.varlen"):
        monkeypatch.setitem(sys.modules, name, None)
    with caplog.at_level(logging.WARNING):
        assert kernels.kernel_rows(CPU, text=toy_text(), num_tokens=16, repeats=1) == []
    assert [record.message.split(" (")[0] for record in caplog.records] == [
        "no row for scan",
        "no row for convolution",
        "no row for attention",
    ]


def test_the_vision_group_returns_its_rows() -> None:
    rows = vision.vision_rows(CPU, size=TINY_TOWER, batch_frames=2, num_batches=1, peak=1e12, repeats=1)
    check(rows, "vision")
    rate, _, operations, _, utilisation = rows
    assert operations.value == pytest.approx(rate.value * vision.tower_flops(TINY_TOWER) / 1e12)
    assert utilisation.value == pytest.approx(operations.value)
    assert utilisation.bar == ">= 0.45"


@pytest.mark.slow
def test_a_device_of_unknown_peak_has_no_mfu_row() -> None:
    rows = vision.vision_rows(CPU, size=TINY_TOWER, batch_frames=1, num_batches=1, repeats=1)
    assert not any(row.name.endswith("MFU") for row in rows)


def test_boards_of_one_name_have_peaks_of_their_own() -> None:
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H100 NVL") == peak_flops("NVIDIA H200 NVL") == 836e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989e12


def test_counted_tower_flops_equal_those_of_torch() -> None:
    encoder = vision.make_tower(TINY_TOWER, CPU)
    plain = sdpa_kernel(SDPBackend.MATH)  # the counter lacks the fused attention of the CPU
    with plain, FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(encoder.preprocess(torch.zeros(1, 70, 70, 3, dtype=torch.uint8)))
    assert vision.tower_flops(TINY_TOWER) == counter.get_total_flops()


def test_45_percent_mfu_on_an_h200_is_about_690_frames_per_second() -> None:
    so400m = vision.TowerSize()
    assert so400m.num_patches == 729
    assert vision.tower_flops(so400m) == pytest.approx(0.642e12, rel=1e-3)
    assert vision.mfu(693, so400m, 989e12) == pytest.approx(0.45, rel=1e-3)


@pytest.mark.slow
def test_prefill_has_seconds_and_memory_by_plan_and_logits() -> None:
    rows = prefill.prefill_rows(CPU, config=narrow_config(16), frames=(2, 4), repeats=1)
    check(rows, "prefill")
    assert len(rows) == 2 * (2 * 2 * 2 + 1)


@pytest.mark.slow
def test_the_last_of_all_logits_equals_the_single_one() -> None:
    model, _ = device.make_model(narrow_config(16), CPU, dtype=torch.float32)
    prompt = video_question(3)
    last = prefill.read_prompt(model, prompt, 3, CPU)
    every = prefill.read_prompt(model, prompt, 3, CPU, all_logits=True)
    assert every.shape == (len(prompt) - 48 + 5, last.shape[0])  # a tenth of 48 vision tokens reach the end
    torch.testing.assert_close(every[-1], last)


@pytest.mark.slow
def test_a_prefill_that_runs_out_of_memory_gives_a_row() -> None:
    def read(*_: object, all_logits: bool) -> None:
        if all_logits:
            raise torch.OutOfMemoryError("CUDA out of memory")

    rows = prefill.prefill_rows(CPU, config=narrow_config(16), frames=(2,), repeats=1, read=read)
    check(rows, "prefill")
    assert sum("OUT OF MEMORY" in row.name for row in rows) == 2
    assert sum("times faster" in row.name for row in rows) == 1


@pytest.mark.slow
def test_the_decode_group_returns_its_rows() -> None:
    transformer = Qwen2Config(
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    rows = decode.decode_rows(
        CPU, ours=narrow_config(16), transformer=transformer, num_frames=2, num_new=4, batch=2, num_steps=2, repeats=1
    )
    check(rows, "decode")
    assert len(rows) == 3 * 4 + 4


TOY_TRAINED = narrow_config(16, plan=(TransVSite(layer=1, select="uniform", keep=0.5),), pattern="MM*-")


@pytest.mark.slow
def test_the_training_group_returns_its_rows_and_packing_changes_nothing() -> None:
    rows = training.training_rows(CPU, config=TOY_TRAINED, num_tokens=(256, 512), repeats=1, peak=1e9)
    check(rows, "training")
    assert len(rows) == 2 + 2 * 5  # no memory on a CPU
    assert all(row.holds for row in rows[:2])
    assert [row.bar for row in rows if "packed" in row.name and row.name.endswith("MFU")] == [">= 0.4"] * 2


def test_synthetic_samples_fill_their_pack() -> None:
    samples = training.synthetic_samples(4096)
    assert sum(map(len, samples)) == 4096
    assert {len(sample) for sample in training.padded(samples)} == {2048}
    weights = sum(parameter.numel() for parameter in meta_model(training.HYBRID_3B).parameters())
    assert 2e9 < weights < 4e9


def meta_model(config: TimeViperConfig) -> TimeViper:
    with torch.device("meta"):
        return TimeViper(config)


def test_a_missing_vllm_is_logged_and_has_no_rows(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with caplog.at_level(logging.WARNING):
        assert vllm.vllm_rows(CPU, ours=narrow_config(16)) == []
    assert "not installed" in caplog.text


@pytest.mark.slow
def test_vllm_generates_equally_many_tokens_for_as_many_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[tuple[int, int, int]] = []

    class LLM:
        def __init__(self, *, model: str, load_format: str, max_model_len: int, **_: object) -> None:
            values = json.loads(Path(model, "config.json").read_text())
            assert (load_format, values["architectures"]) == ("dummy", ["NemotronHForCausalLM"])
            self.max_tokens = max_model_len

        def generate(self, prompts: list[dict[str, list[int]]], sampling: SimpleNamespace) -> None:
            assert sampling.ignore_eos
            (length,) = {len(prompt["prompt_token_ids"]) for prompt in prompts}
            assert length + sampling.max_tokens <= self.max_tokens
            requests.append((len(prompts), length, sampling.max_tokens))

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=SimpleNamespace))
    rows = vllm.vllm_rows(
        CPU, ours=narrow_config(16), num_frames=2, num_new=4, batch=2, num_steps=2, repeats=1, other=vllm.run_vllm
    )
    check(rows, "vllm")
    assert requests == [(2, 64, 2), (2, 64, 4)]
    assert rows[-1].bar == ">= 0.9"


TINY_CLIP = ClipSpec(seconds=3, fps=10, width=64, height=48)


@pytest.mark.slow
def test_the_film_group_returns_its_rows_and_logs_a_missing_backend(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with caplog.at_level(logging.WARNING):
        rows = film.film_rows(
            CPU, size=TINY_TOWER, num_decoders=2, batch_frames=4, clip=TINY_CLIP, repetitions=3, peak=1e12, repeats=1
        )
    check(rows, "film")
    rate, encoder_stalls, decoder_stalls, utilisation = rows
    assert "synthetic clip of 9 s.mp4, 9 frames at 1 fps, pyav in 2 threads" in rate.name
    assert 0 <= encoder_stalls.value <= 1
    assert 0 <= decoder_stalls.value <= 1
    assert utilisation.value == pytest.approx(vision.mfu(rate.value, TINY_TOWER, 1e12))
    assert [record.message.split(":")[0] for record in caplog.records] == ["no rows with nvdec"]


def test_each_frame_is_encoded_once_with_any_number_of_decoders(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    make_clip(path, replace(TINY_CLIP, seconds=11))
    expected = read_frames(str(path), 32).frames
    for num_decoders in (1, 2, 9):
        seen: list[np.ndarray] = []
        found = film.encode_film(path, seen.append, "pyav", 32, 2, num_decoders)
        assert found.num_frames == len(expected) == 11
        frames = np.concatenate(seen)
        assert sorted(map(bytes, frames)) == sorted(map(bytes, expected))


def test_stalls_name_the_slower_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "film.mp4"
    make_clip(path, replace(TINY_CLIP, seconds=24))
    slow = film.encode_film(path, lambda frames: time.sleep(0.1), "pyav", 32, 2, 1)
    assert slow.decoder_stalls > 0.3
    assert slow.encoder_stalls < 0.3

    def open_slowly(uri: str, image_size: int, *, backend: Backend) -> SimpleNamespace:
        reader = open_video(uri, image_size, backend=backend)

        def sample(times: Sequence[Fraction]) -> object:
            time.sleep(0.1)
            return reader.sample(times)

        return SimpleNamespace(sample=sample, close=reader.close)

    # decoding alone is so short that a late wake-up of the encoder's thread counts as its work
    monkeypatch.setattr(film, "open_video", open_slowly)
    quick = film.encode_film(path, lambda frames: None, "pyav", 32, 2, 1)
    assert quick.encoder_stalls > 0.5
    assert quick.decoder_stalls < 0.3


def test_a_failing_encoder_or_decoder_ends_the_pass(tmp_path: Path) -> None:
    def fail(_: np.ndarray) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    make_clip(tmp_path / "film.mp4", replace(TINY_CLIP, seconds=24))
    with pytest.raises(torch.OutOfMemoryError):
        film.encode_film(tmp_path / "film.mp4", fail, "pyav", 32, 2, 2)
    with pytest.raises(DecodeError, match="not_found"):
        film.encode_film(tmp_path / "none.mp4", fail, "pyav", 32, 2, 2)


def test_a_missing_video_decoder_is_logged_and_has_no_film_rows(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(sys.modules, "timeviper_platform.benchmarks.gpu.film")
    monkeypatch.setitem(sys.modules, "timeviper_platform.data.video.reader", None)
    with caplog.at_level(logging.WARNING):
        assert gpu_groups(CPU)["film"](None) == []
    assert "not installed" in caplog.text


def test_slot_bytes_equal_those_of_a_filled_cache() -> None:
    for plan in (PAPER_PLAN, ()):
        config = narrow_config(16, plan=plan)
        cache = device.make_model(config, CPU)[0].new_cache(2, device=CPU, dtype=torch.bfloat16)
        decode.fill_cache(cache, config, 1280, 24, 8)
        assert 1 <= cache.num_bytes / (2 * decode.slot_bytes(config, 1280, 32)) <= 1.125  # capacities are rounded
        assert set(cache.num_tokens) == {1304}


def test_an_h200_fits_32_sequences_of_32k_of_the_9b_and_fewer_of_the_transformer() -> None:
    free_bytes = (141e9 - 17.9e9) * decode.MEMORY_SHARE
    ours, vision_config = PRESETS["9b"], PRESETS["9b"].vision
    assert isinstance(ours.text, HybridConfig)
    plain = replace(ours, transv=())
    assert decode.slot_bytes(ours, 32768, 1056) == pytest.approx(0.376e9, rel=0.01)
    assert decode.slot_bytes(plain, 32768, 1056) == pytest.approx(0.698e9, rel=0.01)
    assert decode.fitting_batch(plain, 32768, 1056, free_bytes) >= 32
    transformer = TimeViperConfig(text=decode.QWEN3_8B_SHAPE, vision=vision_config)
    assert 16 <= decode.fitting_batch(transformer, 32768, 1056, free_bytes) < 32


def test_models_are_bf16_without_changing_the_default_dtype() -> None:
    model, words = device.make_model(narrow_config(16), CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert "PyTorch" in words
    assert torch.get_default_dtype() == torch.float32
    assert NEMOTRON_NANO_9B_V2.hidden_size == 4480


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_cuda_the_command_fails_with_one_error(capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(ROOT / "jobs" / "benchmark.py"))["main"]
    assert main(["gpu", "--only", "kernels"]) == 1
    assert "needs a CUDA device" in capsys.readouterr().err


@pytest.mark.slow
def test_the_gpu_suite_imports_neither_ray_nor_decoders() -> None:
    script = (
        "import sys, runpy\n"
        "for name in ('ray', 'av', 'decord', 'deepspeed', 'fastapi', 'pydantic', 's3fs'): sys.modules[name] = None\n"
        f"runpy.run_path({str(ROOT / 'jobs' / 'benchmark.py')!r})\n"
        "import timeviper_platform.benchmarks.gpu.suite\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
