"""Share of samples whose first answer greedy generation reproduces."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from timeviper_model.batching.batch import Sample, TokenKind, pack_samples
from timeviper_model.inference.generate import stream_ids
from timeviper_model.layers.cache import HybridCache
from timeviper_model.timeviper import TimeViper
from timeviper_platform.training.distributed import sum_over_ranks


class AnswerTask(NamedTuple):
    prompt: Sample
    features: Tensor
    """Shape (num_vision_tokens of the prompt, dim)."""
    answer: list[int]
    """Token ids, including the end token."""


def answer_task(sample: Sample, features: Tensor) -> AnswerTask:
    """Returns the sample's first answer and its prompt. `features` is (num_vision_tokens, dim)."""
    start = sample.token_kind.index(TokenKind.RESPONSE)
    after = (index for index in range(start, len(sample)) if sample.token_kind[index] != TokenKind.RESPONSE)
    stop = next(after, len(sample))
    prompt = Sample(
        input_ids=sample.input_ids[:start],
        vision_index=sample.vision_index[:start],
        token_kind=sample.token_kind[:start],
        labels=sample.labels[:start],
    )
    return AnswerTask(prompt, features[: prompt.num_vision_tokens], sample.input_ids[start:stop])


@torch.no_grad()
def exact_match_share(
    model: TimeViper, tasks: Iterable[AnswerTask], *, device: torch.device, dtype: torch.dtype
) -> float:
    """Returns exact answers / tasks over all ranks; collective. Every rank needs whole parameters."""
    was_training = model.training
    model.eval()
    try:
        cache = model.new_cache(1, device=device, dtype=dtype)
        matches = [_reproduces_answer(model, task, cache, device=device, dtype=dtype) for task in tasks]
    finally:
        model.train(was_training)
    counts = torch.tensor([sum(matches), len(matches)], dtype=torch.int64, device=device)
    sum_over_ranks(counts)
    num_matches, num_tasks = counts.tolist()
    return float(num_matches / max(1, num_tasks))


def _reproduces_answer(
    model: TimeViper, task: AnswerTask, cache: HybridCache, *, device: torch.device, dtype: torch.dtype
) -> bool:
    prompt = pack_samples([task.prompt], [task.features]).to(device, dtype)
    tokens = stream_ids(model, [prompt], cache=cache)
    return all(expected == token[0] for expected, token in zip(task.answer, tokens, strict=False))
