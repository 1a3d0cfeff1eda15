"""The run on paper: its formulas against counting, and the document against what the command prints."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import SiglipVisionConfig, SiglipVisionModel

from timeviper_platform.data.scale import ScaleConfig, VisionTower, compute_scale

ROOT = Path(__file__).resolve().parents[3]


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    spec = importlib.util.spec_from_file_location("store_job", ROOT / "jobs" / "store.py")
    assert spec is not None
    assert spec.loader is not None
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    assert job.main(arguments) == 0
    return capsys.readouterr().out.strip()


def test_the_document_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "scale.md").read_text()
    assert printed(["scale"], capsys) in text
    (command,) = (part for part in text.split("\n\n") if part.startswith("    python jobs/store.py scale"))
    assert printed(shlex.split(command.replace("\\\n", " "))[2:], capsys) in text


def test_totals_are_those_of_counting() -> None:
    scale = compute_scale(ScaleConfig(num_videos=3, seconds_per_video=130.5, frames_per_file=128, price_gpu_hour=2.0,
                                      encode_frames_per_second=100, decode_milliseconds=20, num_gpus=2,
                                      video_megabytes=5))  # fmt: skip
    assert (scale.frames, scale.segments, scale.files) == (3 * 131, 3 * 3, 5)
    assert scale.feature_bytes == 3 * 131 * 16 * 1152 * 2
    assert (scale.gpu_hours * 3600, scale.hours * 3600) == (pytest.approx(3.93), pytest.approx(1.965))
    assert (scale.core_hours * 3600, scale.cores_per_gpu) == (pytest.approx(7.86), 2.0)
    assert (scale.puts, scale.gets) == (5 * 2 + 1 + 4, 3 * 3 + 5)
    assert scale.money == pytest.approx(3.93 / 3600 * 2)
    with pytest.raises(ValueError, match=r"num_gpus = 0 must be above 0"):
        ScaleConfig(num_gpus=0)


def test_the_towers_flops_are_those_that_torch_counts() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
    shape = {"image_size": 48, "patch_size": 8, "vision_use_head": False}
    config = SiglipVisionConfig(**sizes, **shape, attn_implementation="eager")  # a fused kernel would go uncounted
    model = SiglipVisionModel(config).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 48, 48))
    embedding = 2 * 36 * 3 * 8 * 8 * 32
    tower = VisionTower(num_patches=36, width=32, mlp_width=80, num_blocks=3)
    assert tower.flops() + embedding == counter.get_total_flops()
    assert VisionTower().flops() == pytest.approx(641e9, rel=0.001)
