"""Answers without an engine.

text = generate(model, tokenizer, "What happens?", features, max_new_tokens=64)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from timeviper_model.batching.batch import PackedBatch, pack_samples
from timeviper_model.batching.prompt import Turn, build_sample, end_token_ids
from timeviper_model.batching.tokenizer_template import chat_template
from timeviper_model.inference.answer import SamplingParams
from timeviper_model.inference.prefill import prefill
from timeviper_model.inference.sampling import sample_tokens
from timeviper_model.layers.cache import HybridCache
from timeviper_model.timeviper import TimeViper

ReadPrompt = Callable[[PackedBatch, HybridCache, int], Tensor]
"""(prompt, cache, slot) -> the next token's (V,) logits."""


def generate(model: TimeViper, tokenizer: Any, prompt: str, features: Tensor | None = None, **sampling: Any) -> str:
    """Answers a prompt about one medium.

    Args:
        features: (num_vision_tokens, dim); None for text only.
        sampling: fields of SamplingParams, except `stop` and `num_logprobs`.
    """
    template, weight = chat_template(model.config.chat_template, tokenizer), model.lm_head.weight
    rows = torch.zeros(0, model.config.vision.row_size) if features is None else features
    sample = build_sample(
        tokenizer,
        [Turn(role="user", text=prompt)],
        [len(rows)] if len(rows) else [],
        template=template,
        add_generation_prompt=True,
    )
    batch = pack_samples([sample], [rows.to(weight.dtype)]).to(weight.device, weight.dtype)
    end_ids = end_token_ids(tokenizer, template, model.config.text)
    (ids,) = generate_ids(model, [batch], end_ids=end_ids, params=SamplingParams(**sampling))
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def generate_ids(
    model: TimeViper,
    prompts: Sequence[PackedBatch],
    *,
    end_ids: Collection[int],
    params: SamplingParams | None = None,
    read: ReadPrompt | None = None,
) -> list[list[int]]:
    """Returns one answer per prompt (one segment each), without end tokens. `read` replaces `prefill`."""
    params = params or SamplingParams()
    answers: list[list[int]] = [[] for _ in prompts]
    stream = stream_ids(model, prompts, end_ids=end_ids, params=params, read=read)
    for tokens in islice(stream, params.max_new_tokens):
        for index, token in tokens.items():
            if token not in end_ids:
                answers[index].append(token)
    return answers


def stream_ids(
    model: TimeViper,
    prompts: Sequence[PackedBatch],
    *,
    end_ids: Collection[int] = (),
    params: SamplingParams | None = None,
    cache: HybridCache | None = None,
    read: ReadPrompt | None = None,
) -> Iterator[dict[int, int]]:
    """Yields each unfinished prompt's next token by index, endlessly and lazily."""
    if not prompts:
        return
    params = params or SamplingParams()
    weight = model.lm_head.weight
    cache = cache or model.new_cache(len(prompts), device=weight.device, dtype=weight.dtype)
    generators = [torch.Generator().manual_seed(params.seed) for _ in prompts]
    active = list(range(len(prompts)))  # the prompt in each running slot
    num_new = params.max_new_tokens
    read = read or partial(prefill, model, max_new_tokens=num_new)
    logits_BV = torch.stack([read(prompt, cache, slot) for slot, prompt in enumerate(prompts)])
    while active:
        sampled = sample_tokens(logits_BV, [params] * len(active), [generators[index] for index in active])
        tokens = {index: token.id for index, token in zip(active, sampled, strict=True)}
        yield dict(sorted(tokens.items()))
        for slot in reversed(range(len(active))):
            if tokens[active[slot]] in end_ids:
                cache.swap(slot, len(active) - 1)
                active[slot] = active[-1]
                active.pop()
        if active:
            ids = torch.tensor([tokens[index] for index in active], device=weight.device)
            logits_BV = model.decode_step(ids, cache, torch.arange(len(active)))
