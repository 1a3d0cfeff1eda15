"""Generated tokens per second, against a Transformer of the same size (Figure 1)."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from timeviper_model.analysis.dropping import with_plan
from timeviper_model.analysis.transformer_twin import transformer_twin
from timeviper_model.batching.batch import IGNORE_INDEX, PackedBatch, Sample, TokenKind, pack_samples
from timeviper_model.config import HybridConfig
from timeviper_model.inference.answer import SamplingParams
from timeviper_model.inference.generate import generate_ids
from timeviper_model.inference.memory import is_out_of_memory
from timeviper_model.layers.backends import Backend, set_backend
from timeviper_model.timeviper import TimeViper

logger = logging.getLogger(__name__)

NUM_SYSTEM, NUM_QUESTION = 8, 24
"""Text tokens before and after the video."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedConfig:
    """Batches of prompts about random videos. Times include the prefill of all prompts and all decode steps."""

    num_frames: tuple[int, ...] = (64, 256, 1024)
    """Lengths of videos, in frames."""
    batch_sizes: tuple[int, ...] = (1, 8, 32)
    """Prompts that are decoded together."""
    num_new_tokens: int = 128
    """Tokens of every answer. The paper's figure has 1,024."""
    repeats: int = 3
    """Timed runs of each model, in turn, after an untimed one; the result is their median."""

    def __post_init__(self) -> None:
        numbers = (*self.num_frames, *self.batch_sizes, self.num_new_tokens, self.repeats)
        if not self.num_frames or not self.batch_sizes or min(numbers) < 1:
            raise ValueError(f"{self}: lengths, batches, tokens and repeats must be at least 1")


def speed_rows(model: TimeViper, config: SpeedConfig, *, backend: Backend) -> Iterator[dict[str, Any]]:
    """Yields a row per length, batch and model; `tokens_per_second` is None where memory did not suffice.

    Raises:
        ValueError: if `model` is a Transformer itself.
    """
    models = _models(model, backend)
    for num_frames in config.num_frames:
        for batch_size in config.batch_sizes:
            batches = [random_prompt(model, num_frames, seed) for seed in range(batch_size)]
            seconds: dict[str, list[float]] = {name: [] for name in models}
            failed: set[str] = set()
            for turn in range(config.repeats + 1):
                for name, one in models.items():
                    if name not in failed:
                        try:
                            spent = _seconds(one, batches, config.num_new_tokens)
                        except (RuntimeError, MemoryError) as error:
                            if not (isinstance(error, MemoryError) or is_out_of_memory(error)):
                                raise
                            failed.add(name)
                        else:
                            seconds[name] += [spent] * (turn > 0)
            for name in models:
                rate = None
                if name not in failed:
                    rate = batch_size * config.num_new_tokens / statistics.median(seconds[name])
                yield {
                    "model": name,
                    "num_frames": num_frames,
                    "num_prompt_tokens": len(batches[0].input_ids),
                    "batch_size": batch_size,
                    "num_new_tokens": config.num_new_tokens,
                    "tokens_per_second": rate,
                    "seconds": seconds[name],
                }


def _models(model: TimeViper, backend: Backend) -> dict[str, TimeViper]:
    text = model.config.text
    if not isinstance(text, HybridConfig) or "M" not in text.hybrid_override_pattern:
        raise ValueError("figure speed compares a hybrid with a Transformer of its size, but these weights are not one")
    weight = model.lm_head.weight
    with torch.device(weight.device):
        twin = TimeViper(transformer_twin(with_plan(model, ()).config)).to(weight.dtype).eval()
    twin.init_weights(torch.Generator(weight.device).manual_seed(0))
    set_backend(twin, backend, device=str(weight.device), dtype=weight.dtype)
    models = {"hybrid": with_plan(model, ()), "Transformer of its size": twin.requires_grad_(False)}
    return ({"hybrid with TransV": model} if model.config.transv else {}) | models


def random_prompt(model: TimeViper, num_frames: int, seed: int) -> PackedBatch:
    vision = model.config.vision
    second = 0 if vision.second is None else vision.second.num_tokens_per_frame
    num_vision = num_frames * (vision.num_tokens_per_frame + second)
    weight, generator = model.lm_head.weight, torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.text.vocab_size, (NUM_SYSTEM + NUM_QUESTION,), generator=generator).tolist()
    kinds = [TokenKind.SYSTEM] * NUM_SYSTEM + [TokenKind.VISION] * num_vision + [TokenKind.INSTRUCTION] * NUM_QUESTION
    sample = Sample(
        input_ids=[*ids[:NUM_SYSTEM], *[0] * num_vision, *ids[NUM_SYSTEM:]],
        vision_index=[*[-1] * NUM_SYSTEM, *range(num_vision), *[-1] * NUM_QUESTION],
        token_kind=[int(kind) for kind in kinds],
        labels=[IGNORE_INDEX] * len(kinds),
    )
    features = torch.randn(num_vision, vision.row_size, generator=generator)
    return pack_samples([sample], [features]).to(weight.device, weight.dtype)


@torch.inference_mode()
def _seconds(model: TimeViper, batches: list[PackedBatch], num_new_tokens: int) -> float:
    _wait(model)
    started = time.perf_counter()
    generate_ids(model, batches, end_ids=(), params=SamplingParams(max_new_tokens=num_new_tokens))
    _wait(model)
    return time.perf_counter() - started


def _wait(model: TimeViper) -> None:
    if model.lm_head.weight.device.type == "cuda":
        torch.cuda.synchronize()
