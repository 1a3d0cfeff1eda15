"""Scores options and generates text with one model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from timeviper_model.batching.batch import PackedBatch, Sample, pack_samples
from timeviper_model.batching.prompt import Turn, add_time_texts, build_sample, end_token_ids
from timeviper_model.batching.tokenizer_template import chat_template
from timeviper_model.inference.answer import SamplingParams
from timeviper_model.inference.generate import generate_ids
from timeviper_model.timeviper import TimeViper

DEFAULT_MAX_PACK_TOKENS = 8192
"""About 8 minutes of video at 16 tokens per second."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    text: str
    media: tuple[Tensor, ...] = ()
    """(tokens, dim) vision rows per medium."""
    time_texts: tuple[str, ...] = ()
    """Sentence after each medium, see `add_time_texts`; () = none."""


class Answerer:
    def __init__(self, model: TimeViper, tokenizer: Any, *, max_pack_tokens: int = DEFAULT_MAX_PACK_TOKENS) -> None:
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._template = chat_template(model.config.chat_template, tokenizer)
        self._max_pack_tokens = max_pack_tokens
        parameter = model.lm_head.weight
        self._device, self._dtype = parameter.device, parameter.dtype

    def score_options(self, prompts: Sequence[Prompt], options: Sequence[Sequence[str]]) -> list[list[float]]:
        """Returns log-probabilities per prompt and option, end token included."""
        pairs = [(prompt, option) for prompt, texts in zip(prompts, options, strict=True) for option in texts]
        scores: list[float] = []
        for batch in self.pack_answers(pairs):
            log_probs, segment_ids = self._model.target_log_probs(batch)
            # float64: the order of a float32 sum must not decide between close options
            sums = torch.zeros(batch.num_segments, dtype=torch.float64, device=log_probs.device)
            scores += sums.index_add_(0, segment_ids.long(), log_probs.double()).tolist()
        rest = iter(scores)
        return [[next(rest) for _ in texts] for texts in options]

    def pack_answers(self, pairs: Sequence[tuple[Prompt, str]]) -> Iterator[PackedBatch]:
        """Yields packs of at most `max_pack_tokens`, in order."""
        samples = [self.sample(prompt, answer) for prompt, answer in pairs]
        for members in _group([len(sample) for sample in samples], self._max_pack_tokens):
            batch = pack_samples([samples[n] for n in members], [self._rows(pairs[n][0]) for n in members])
            yield batch.to(self._device, self._dtype)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> list[str]:
        """Decodes greedy answers together."""
        batches = [pack_samples([self.sample(prompt, None)], [self._rows(prompt)]) for prompt in prompts]
        answers = generate_ids(
            self._model,
            [batch.to(self._device, self._dtype) for batch in batches],
            end_ids=end_token_ids(self._tokenizer, self._template, self._model.config.text),
            params=SamplingParams(max_new_tokens=max_new_tokens),
        )
        return [self._tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]

    def sample(self, prompt: Prompt, answer: str | None) -> Sample:
        """Builds the prompt, and the answer unless it is None."""
        conversation = [Turn(role="user", text=prompt.text)]
        if prompt.time_texts:
            conversation = add_time_texts(conversation, prompt.time_texts)
        if answer is not None:
            conversation.append(Turn(role="assistant", text=answer))
        return build_sample(
            self._tokenizer,
            conversation,
            [rows.shape[0] for rows in prompt.media],
            template=self._template,
            add_generation_prompt=answer is None,
        )

    def _rows(self, prompt: Prompt) -> Tensor:
        if prompt.media:
            return torch.cat([rows.to(self._dtype) for rows in prompt.media])
        return torch.zeros(0, self._model.config.vision.row_size, dtype=self._dtype)


def _group(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Groups indices of samples that fit into `max_tokens`; a longer sample is alone."""
    members: list[int] = []
    total = 0
    for index, length in enumerate(lengths):
        if members and total + length > max_tokens:
            yield members
            members, total = [], 0
        members.append(index)
        total += length
    if members:
        yield members
