"""The cost model: formulas against counting, and docs/scale.md against the command's output."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import SiglipVisionConfig, SiglipVisionModel

from timeviper_platform.cli.store import main
from timeviper_platform.data.preprocess.cost_model import ScaleConfig, TowerSizes, compute_scale, scale_table

ROOT = Path(__file__).resolve().parents[4]


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out.strip()


def test_the_document_has_the_output_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "scale.md").read_text()
    assert printed(["scale"], capsys) in text
    commands = [part for part in text.split("\n\n") if part.startswith("    python jobs/store.py scale")]
    assert len(commands) == 2
    for command in commands:
        assert printed(shlex.split(command.replace("\\\n", " "))[2:], capsys) in text


def test_totals_equal_counting() -> None:
    scale = compute_scale(ScaleConfig(num_videos=3, seconds_per_video=130.5, frames_per_file=128, price_gpu_hour=2.0,
                                      encode_frames_per_second=100, decode_milliseconds=20, num_gpus=2,
                                      video_megabytes=5))  # fmt: skip
    assert (scale.frames, scale.segments, scale.files) == (3 * 131, 3 * 3, 5)
    assert scale.feature_bytes == 3 * 131 * 16 * 1152 * 2
    assert (scale.gpu_hours * 3600, scale.hours * 3600) == (pytest.approx(3.93), pytest.approx(1.965))
    assert (scale.core_hours * 3600, scale.cores_per_gpu) == (pytest.approx(7.86), 2.0)
    assert (scale.puts, scale.gets) == (5 * 2 + 1 + 4, 3 * 3 + 2 * 5)
    assert scale.money == pytest.approx(3.93 / 3600 * 2)
    with pytest.raises(ValueError, match=r"num_gpus = 0 must be above 0"):
        ScaleConfig(num_gpus=0)


def test_a_second_tower_adds_its_tokens_and_its_time() -> None:
    one = ScaleConfig(num_videos=3, seconds_per_video=100.0, encode_frames_per_second=100)
    two = replace(one, second_num_tokens_per_frame=4, second_dim=1000, second_encode_frames_per_second=50)
    scale = compute_scale(two)
    assert scale.feature_bytes == 300 * (16 + 4) * 1152 * 2  # rows have the width of the wider tower
    assert compute_scale(replace(two, second_dim=2000)).feature_bytes == 300 * (16 + 4) * 2000 * 2
    assert scale.gpu_hours * 3600 == pytest.approx(300 / 100 + 300 / 50)
    assert scale.encode_frames_per_second == pytest.approx(100 / 3)
    assert scale.cores_per_gpu == pytest.approx(compute_scale(one).cores_per_gpu / 3)
    assert (scale.core_hours, scale.puts, scale.gets) == (
        compute_scale(one).core_hours, compute_scale(one).puts, compute_scale(one).gets
    )  # fmt: skip
    computed = replace(
        two, second_encode_frames_per_second=0, second_teraflops_per_frame=2, gpu_peak_tflops=500, mfu=0.2
    )
    assert compute_scale(computed).encode_frames_per_second == pytest.approx(100 / 3)
    assert "(both towers, measured)" in scale_table([two])
    assert "(both towers, one tower measured, the other computed from FLOPs)" in scale_table([computed])


@pytest.mark.parametrize(
    "second",
    [
        {"second_num_tokens_per_frame": 4},
        {"second_dim": 1024},
        {"second_teraflops_per_frame": 0.1},
        {"second_num_tokens_per_frame": 4, "second_dim": 1024},
        {"second_num_tokens_per_frame": 4, "second_dim": -1, "second_teraflops_per_frame": 0.1},
    ],
)
def test_an_incomplete_second_tower_is_refused(second: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give all of a second tower"):
        ScaleConfig(**second)


def test_flops_equal_those_counted_by_torch() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
    shape = {"image_size": 48, "patch_size": 8, "vision_use_head": False}
    config = SiglipVisionConfig(**sizes, **shape, attn_implementation="eager")  # fused kernels are not counted
    model = SiglipVisionModel(config).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 48, 48))
    embedding = 2 * 36 * 3 * 8 * 8 * 32
    tower = TowerSizes(num_patches=36, width=32, mlp_width=80, num_blocks=3)
    assert tower.flops() + embedding == counter.get_total_flops()
    assert TowerSizes().flops() == pytest.approx(641e9, rel=0.001)
    dinov2_large = TowerSizes(num_patches=257, width=1024, mlp_width=4096, num_blocks=23)
    assert dinov2_large.flops() == pytest.approx(0.155e12, rel=0.001)
