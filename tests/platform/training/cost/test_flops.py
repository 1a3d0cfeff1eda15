from __future__ import annotations

import math
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from timeviper_model.batching.batch import IGNORE_INDEX, Sample, TokenKind, pack_samples
from timeviper_model.config import PRESETS
from timeviper_model.layers.lora import LoraConfig, add_lora
from timeviper_model.timeviper import TimeViper
from timeviper_platform.common.devices import PEAK_FLOPS
from timeviper_platform.training.batches.packing import Pack, PackPosition
from timeviper_platform.training.batches.step_batches import StepCounts
from timeviper_platform.training.cost.flops import forward_flops, gpu_hours, training_flops
from timeviper_platform.training.metrics.step_log import step_row
from timeviper_platform.training.optim.parameter_groups import ParameterRule, resolve_groups, trained_share
from timeviper_platform.training.phase import Phase, mean_kept_share
from timeviper_platform.training.step import StepResult


def text_sample(num_tokens: int) -> Sample:
    return Sample(
        input_ids=[5] * num_tokens,
        vision_index=[-1] * num_tokens,
        token_kind=[int(TokenKind.SYSTEM)] * num_tokens,
        labels=[IGNORE_INDEX] + [5] * (num_tokens - 1),
    )


@pytest.mark.parametrize("preset", ["tiny", "tiny-qwen"])
def test_the_count_equals_torchs_count(preset: str) -> None:
    config = PRESETS[preset]
    model = TimeViper(config)
    model.init_weights(torch.Generator().manual_seed(0))
    samples = [text_sample(64)] * 3
    batch = pack_samples(samples, [torch.empty(0, config.vision.row_size)] * 3, pad_token_id=0)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False), counter:  # torch does not count oneDNN products
        model(batch.to("cpu", torch.float32), use_transv=False)
    shape = Pack(num_tokens=192, vision_counts=(0, 0, 0), num_targets=189)
    # torch also counts the masked half of attention and scan
    assert forward_flops(config, shape, use_transv=False) == pytest.approx(counter.get_total_flops(), rel=0.06)


def test_a_token_of_the_9b_costs_two_operations_a_weight() -> None:
    config = PRESETS["9b"]
    with torch.device("meta"):
        model = TimeViper(config)
    weights = sum(parameter.numel() for parameter in model.backbone.layers.parameters())
    shape = Pack(num_tokens=1000, vision_counts=(), num_targets=0)
    assert forward_flops(config, shape, use_transv=True) == pytest.approx(2 * weights * 1000, rel=0.03)


def test_transv_and_frozen_weights_reduce_the_count() -> None:
    config = PRESETS["9b"]
    shape = Pack(num_tokens=4196, vision_counts=(4096,), num_targets=20)
    with_transv, without = (forward_flops(config, shape, use_transv=use) for use in (True, False))
    assert with_transv / without == pytest.approx(mean_kept_share(config), rel=0.05)
    trained = training_flops(config, shape, use_transv=True, trained_share=1.0)
    assert training_flops(config, shape, use_transv=True, trained_share=0.0) == pytest.approx(trained * 2 / 3)


@pytest.mark.parametrize(
    ("rule", "lora", "least", "most"),
    [
        (".*", None, 1.0, 1.0),
        (r"projector\..*", None, 0.0, 0.0),
        (r"backbone\.layers\.\d*[02468]\..*", None, 0.3, 0.7),
        (r".*\.lora_[AB]", LoraConfig(rank=16), 0.001, 0.01),
    ],
)
def test_only_trained_weights_need_gradients(rule: str, lora: LoraConfig | None, least: float, most: float) -> None:
    """Adapters were counted as if all blocks were trained: 1.5 times the operations."""
    with torch.device("meta"):
        model = TimeViper(PRESETS["9b"])
        if lora is not None:
            add_lora(model, lora, torch.Generator())
    share = trained_share(model, resolve_groups(model, [ParameterRule(match=rule, lr=1.0)]))
    assert least <= share <= most
    shape = Pack(num_tokens=4196, vision_counts=(4096,), num_targets=20)
    forward = forward_flops(PRESETS["9b"], shape, use_transv=True)
    assert training_flops(PRESETS["9b"], shape, use_transv=True, trained_share=share) == forward * (2 + share)


def test_samples_of_a_pack_do_not_attend_to_each_other() -> None:
    config = PRESETS["tiny-qwen"]
    apart = Pack(num_tokens=2000, vision_counts=(500, 500), num_targets=0)
    alone = Pack(num_tokens=1000, vision_counts=(500,), num_targets=0)
    assert forward_flops(config, apart, use_transv=True) == pytest.approx(
        2 * forward_flops(config, alone, use_transv=True)
    )


def test_an_hour_at_the_assumed_mfu_is_one_gpu_hour() -> None:
    assert math.isclose(gpu_hours(989e12 * 0.4 * 3600), 1.0)


def test_mfu_is_computed_flops_over_the_peak_of_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = dict.fromkeys(("num_targets", "num_vision_tokens", "num_samples", "num_padding_tokens"), 0)
    step = StepCounts(step=1, num_tokens=10, fill=1.0, flops=8e12, end=PackPosition(0, 1), **zeros)
    phase = cast(Phase, SimpleNamespace(name="align"))
    monkeypatch.setitem(PEAK_FLOPS, "CPU", 16e12)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    row = step_row(phase.name, step, StepResult(1.0, 1.0, (0,)), {}, 1, 0.5, 0.1, 0, torch.device("cpu"))
    assert (row["tflops_per_second"], row["mfu"]) == (16.0, 0.5)  # 8 TFLOP in half a second on two devices
