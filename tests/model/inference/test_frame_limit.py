from __future__ import annotations

from dataclasses import replace

import torch

from reference.small_models import SMALL
from timeviper_model.config import PRESETS
from timeviper_model.inference.frame_limit import frames_that_fit

GB = 10**9


def test_more_memory_and_fewer_tokens_give_more_frames() -> None:
    sizes = [frames_that_fit(PRESETS["9b"], size * GB, dtype=torch.bfloat16) for size in (16, 24, 48, 80)]
    assert sizes[0] == 0  # the weights alone take 18 GB
    assert 0 < sizes[1] < sizes[2] < sizes[3]
    without = frames_that_fit(replace(PRESETS["9b"], transv=()), 24 * GB, dtype=torch.bfloat16)
    evs = frames_that_fit(PRESETS["9b-importance"], 24 * GB, dtype=torch.bfloat16)
    assert without != sizes[1] != evs


def test_logits_of_a_whole_prompt_are_what_limits_it() -> None:
    # the paper's limit without TransV is 5k frames: 80k tokens of 131,072 logits take 63 GB
    config = replace(PRESETS["9b"], transv=())
    every = frames_that_fit(config, 85 * GB, dtype=torch.bfloat16, logits="all")
    assert 4_000 < every < 5_500
    assert frames_that_fit(config, 85 * GB, dtype=torch.bfloat16) > 20 * every


def test_a_frame_less_of_memory_is_a_frame_less() -> None:
    config = replace(SMALL, transv=())
    for size in (2_000_000, 3_000_000):
        most = frames_that_fit(config, size, dtype=torch.float32, device_type="cpu")
        more = frames_that_fit(config, size + 100_000, dtype=torch.float32, device_type="cpu")
        assert most < more
