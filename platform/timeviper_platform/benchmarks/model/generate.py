"""Row group `generate`: our engine against transformers' `generate`, with the same weights and greedy tokens."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from timeviper_model.inference.answer import SamplingParams
from timeviper_model.inference.engine import InferenceEngine
from timeviper_model.inference.requests import EngineConfig, Request, Token
from timeviper_model.timeviper import TimeViper
from timeviper_model.weights.families import text_config_to_dict
from timeviper_model.weights.weights_folder import from_pretrained, save_pretrained
from timeviper_platform.benchmarks.measure import Row, compare
from timeviper_platform.benchmarks.model.models import FEATURE_SIZE, make_model, narrow_config, text_prompt

COMMAND = "python jobs/benchmark.py model --only generate"


@torch.inference_mode()
def generate_rows(
    *, width: int = 256, batch: int = 8, num_prompt: int = 512, num_new: int = 128, repeats: int = 5
) -> list[Row]:
    """Tokens per second of a batch, including prefill."""
    ours, theirs = make_pair(width)
    prompts = torch.tensor([text_prompt(num_prompt, seed=seed).input_ids for seed in range(batch)])
    result = compare(
        lambda: answer_with_engine(ours, prompts, num_new),
        lambda: answer_with_transformers(theirs, prompts, num_new),
        repeats=repeats,
    )
    name = f"engine over transformers' generate, width {width}, batch {batch}, {num_prompt} in, {num_new} out"
    return [
        Row(
            name=f"{name} (noise {result.noise:.0%})",
            value=result.speedup,
            unit="x tokens/s",
            bar=">= 2",
            command=COMMAND,
        )
    ]


def make_pair(width: int) -> tuple[TimeViper, Any]:
    from transformers import NemotronHForCausalLM
    from transformers.utils import logging

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "weights")
        save_pretrained(make_model(narrow_config(width, plan=())), folder)
        ours = from_pretrained(folder).eval().requires_grad_(False)
        text = text_config_to_dict(ours.config.text)
        (folder / "config.json").write_text(json.dumps(text))  # transformers knows only the language model
        logging.disable_progress_bar()
        theirs = NemotronHForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for layer in theirs.model.layers:
        if hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = (0.0, float("inf"))  # transformers 5.23 clamps to (time_step_min, inf)
    return ours, theirs


def answer_with_engine(model: TimeViper, prompts_BT: torch.Tensor, num_new: int) -> list[list[int]]:
    batch, length = prompts_BT.shape
    config = EngineConfig(num_slots=batch, max_prompt_tokens=length, max_new_tokens=num_new)
    engine = InferenceEngine(model, config)
    engine.end_token_ids = frozenset()  # every answer has full length
    answers: dict[int, list[int]] = {}
    for row in prompts_BT.tolist():
        sample = text_prompt(length)
        sample.input_ids[:] = row
        request = Request(
            prompt=sample, vision_features=torch.zeros(0, FEATURE_SIZE), sampling=SamplingParams(max_new_tokens=num_new)
        )
        answers[engine.submit(request)] = []
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, Token):
                answers[event.request_id].append(event.id)
    return list(answers.values())


def answer_with_transformers(model: Any, prompts_BT: torch.Tensor, num_new: int) -> list[list[int]]:
    mask = torch.ones_like(prompts_BT)  # a mask guessed from ids would hide tokens equal to the pad id
    ids = model.generate(prompts_BT, attention_mask=mask, max_new_tokens=num_new, do_sample=False, eos_token_id=None)
    answers: list[list[int]] = ids[:, prompts_BT.shape[1] :].tolist()
    return answers
