"""Row group `vllm`: the 9b without TransV against Nemotron-H in vLLM, both with random weights.

vLLM runs in its own process with the same sizes (`load_format="dummy"`) and numbers of tokens.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from timeviper_model.config import PRESETS, TimeViperConfig
from timeviper_platform.benchmarks.gpu.device import free_memory, make_row
from timeviper_platform.benchmarks.gpu.token_decode import decode_side
from timeviper_platform.benchmarks.measure import Row
from timeviper_platform.benchmarks.model.models import text_prompt, video_question

logger = logging.getLogger(__name__)


def vllm_rows(
    device: torch.device,
    *,
    ours: TimeViperConfig = PRESETS["9b"],
    num_frames: int = 2048,
    num_new: int = 1024,
    batch: int = 32,
    num_steps: int = 64,
    repeats: int = 3,
    other: Callable[[dict[str, Any], int, int, int], float] | None = None,
) -> list[Row]:
    """Tokens per second including prefill, ours over vLLM's; no rows if vLLM is not installed.

    Args:
        ours: its TransV plan is ignored.
        num_frames: frames of our prompt; vLLM reads equally many text tokens.
        num_steps: our steps per measured pass.
        other: tokens per second of vLLM for a config.json, prompt length, batch and new tokens.
    """
    if other is None:
        if importlib.util.find_spec("vllm") is None:
            logger.warning("no rows against vLLM: it is not installed")
            return []
        other = run_vllm_apart
    plain = TimeViperConfig(text=ours.text, vision=ours.vision)
    rows, side = decode_side(
        "9b without TransV", plain, device, num_frames, num_new, batch, num_steps, repeats, group="vllm"
    )
    free_memory(device)
    theirs = other(huggingface_config(plain), len(video_question(num_frames)), batch, num_new)
    label = f"{num_frames * 16} in, {num_new} out, batch {batch}, prompts included"
    return [
        *rows,
        make_row("vllm", f"vLLM's Nemotron-H, {label}", theirs, "tokens/s"),
        make_row("vllm", f"ours over vLLM, {label}", side.whole_tokens_per_second / theirs, "x tokens/s", ">= 0.9"),
    ]


def huggingface_config(config: TimeViperConfig) -> dict[str, Any]:
    from timeviper_model.weights.families import (
        text_config_to_dict,  # imports pydantic, which the rest of the suite does not need
    )

    return text_config_to_dict(config.text) | {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "torch_dtype": "bfloat16",
        "time_step_limit": [0.0, float("inf")],
    }


def run_vllm_apart(values: dict[str, Any], num_prompt: int, batch: int, num_new: int) -> float:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(run_vllm, values, num_prompt, batch, num_new).result()


def run_vllm(values: dict[str, Any], num_prompt: int, batch: int, num_new: int) -> float:
    """Tokens per second of one batch, after a short warm-up batch."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found,unused-ignore]  # not installed here

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(values))
        engine = LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=num_prompt + num_new,
            max_num_seqs=batch,
            enable_prefix_caching=False,
        )
        prompts = [{"prompt_token_ids": text_prompt(num_prompt, seed=seed).input_ids} for seed in range(batch)]

        def generate(num_tokens: int) -> None:
            engine.generate(
                prompts, SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
            )

        generate(2)
        start = time.perf_counter()
        generate(num_new)
        return batch * num_new / (time.perf_counter() - start)
