from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reference.small_models import SMALL
from timeviper_model.batching.batch import TokenKind
from timeviper_model.config import PRESETS, TINY, TimeViperConfig
from timeviper_model.inference.frame_limit import frames_that_fit, prompt_bytes
from timeviper_model.inference.prefill import Prefill
from timeviper_model.timeviper import TimeViper

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
    for size in (3_000_000, 4_000_000):
        most = frames_that_fit(config, size, dtype=torch.float32, device_type="cpu")
        more = frames_that_fit(config, size + 100_000, dtype=torch.float32, device_type="cpu")
        assert most < more


def peak_bytes(run: Callable[[], object], folder: Path) -> int:
    """Most bytes that PyTorch's allocator held during a call, above those before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    profile.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    memory = [event["args"] for event in sorted(events, key=lambda e: e.get("ts", 0)) if event["name"] == "[memory]"]
    before = memory[0]["Total Allocated"] - memory[0]["Bytes"]
    return int(max(event["Total Allocated"] for event in memory) - before)


@pytest.mark.parametrize(
    "config",
    [pytest.param(TINY, id="TransV"), pytest.param(replace(TINY, transv=()), id="without", marks=pytest.mark.slow)],
)
def test_the_arithmetic_is_what_a_prefill_takes(config: TimeViperConfig, tmp_path: Path) -> None:
    model = TimeViper(config).eval().requires_grad_(False)
    model.init_weights(torch.Generator().manual_seed(0))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    num_text, num_new = 16, 64

    def measured(num_frames: int) -> int:
        num_vision = num_frames * config.vision.tokens_per_frame
        kinds = [TokenKind.VISION] * num_vision + [TokenKind.INSTRUCTION] * num_text

        @torch.inference_mode()
        def run() -> None:
            cache = model.new_cache(1, device="cpu", dtype=torch.float32)
            features = torch.zeros(num_vision, config.vision.row_size)
            ids, token_kind = torch.zeros(len(kinds), dtype=torch.long), torch.tensor([int(kind) for kind in kinds])
            Prefill(model, ids, token_kind, lambda: [features], cache, 0, max_new_tokens=num_new).advance(10**9)

        return peak_bytes(run, tmp_path) + weights

    counts = 1024, 2048  # whole chunks
    needed = prompt_bytes(config, dtype=torch.float32, num_text=num_text, num_new=num_new, device_type="cpu")
    known, found = [needed(count) for count in counts], [measured(count) for count in counts]
    assert found[1] - found[0] == pytest.approx(known[1] - known[0], rel=0.04)  # what grows with the video
    assert found[1] == pytest.approx(known[1], rel=0.1)


def test_all_logits_take_the_bytes_of_two_dtypes(tmp_path: Path) -> None:
    model = TimeViper(TINY).to(torch.bfloat16).requires_grad_(False)
    hidden = torch.zeros(2048, TINY.text.hidden_size, dtype=torch.bfloat16)
    found = peak_bytes(lambda: model.logits(hidden), tmp_path)
    assert found == pytest.approx(2048 * TINY.text.vocab_size * (4 + 2), rel=0.1)
