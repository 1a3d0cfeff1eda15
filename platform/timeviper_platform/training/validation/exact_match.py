"""A small generation evaluation beside the training: the share of samples whose first answer the model writes itself.

    system, vision, question -> prefill -> id -> decode_step -> id -> ... compared with the sample's answer, id by id

Knows the model, samples and ranks; not phases or files. Draws no random number and leaves the model as it was, so
that training goes on bit for bit as without it.
"""

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
    """A conversation up to where the model takes over, and what it should write."""

    prompt: Sample
    features: Tensor
    """(num_vision_tokens of the prompt, dim)"""
    answer: list[int]
    """ids, with the end token"""


def answer_task(sample: Sample, features: Tensor) -> AnswerTask:
    """The sample's first answer and all that stands before it; later turns are left out.

    Args:
        sample: with at least one answer.
        features: (num_vision_tokens, dim) of the sample.
    """
    start = sample.token_kind.index(TokenKind.RESPONSE)
    behind = (place for place in range(start, len(sample)) if sample.token_kind[place] != TokenKind.RESPONSE)
    stop = next(behind, len(sample))
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
    """Answers of all ranks' tasks that greedy generation writes id by id / tasks, 0 without any; one collective.

    Args:
        model: with whole parameters on this rank; in its former mode afterwards.
        tasks: this rank's share, of any number.
        device: of the model.
        dtype: of its activations.
    """
    was_training = model.training
    model.eval()
    try:
        cache = model.new_cache(1, device=device, dtype=dtype)
        matches = [_writes_answer(model, task, cache, device=device, dtype=dtype) for task in tasks]
    finally:
        model.train(was_training)
    counts = torch.tensor([sum(matches), len(matches)], dtype=torch.int64, device=device)
    sum_over_ranks(counts)
    num_matches, num_tasks = counts.tolist()
    return float(num_matches / max(1, num_tasks))


def _writes_answer(
    model: TimeViper, task: AnswerTask, cache: HybridCache, *, device: torch.device, dtype: torch.dtype
) -> bool:
    """Generates until the answer has ended or the first id differs: what follows could not mend it."""
    prompt = pack_samples([task.prompt], [task.features]).to(device, dtype)
    tokens = stream_ids(model, [prompt], cache=cache)
    return all(expected == token[0] for expected, token in zip(task.answer, tokens, strict=False))
