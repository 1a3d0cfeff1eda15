"""Scores options and generates text with one model."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from timeviper_model.batching.batch import IGNORE_INDEX, PackedBatch, Sample, TokenKind, pack_samples
from timeviper_model.batching.prompt import Turn, add_time_texts, build_sample, end_token_ids
from timeviper_model.batching.tokenizer_template import chat_template
from timeviper_model.inference.answer import SamplingParams
from timeviper_model.inference.generate import ReadPrompt, generate_ids
from timeviper_model.inference.prefill import Prefill, prefix_length
from timeviper_model.inference.prefix_cache import PrefixCache
from timeviper_model.layers.cache import HybridCache, SavedSlot
from timeviper_model.timeviper import TimeViper

DEFAULT_MAX_PACK_TOKENS = 8192
"""About 8 minutes of video at 16 tokens per second."""

DEFAULT_PREFIX_CACHE_BYTES = 1 << 30
"""About 15 videos of 256 frames for the 9B in bfloat16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    text: str
    media: tuple[Tensor, ...] = ()
    """(tokens, dim) vision rows per medium."""
    time_texts: tuple[str, ...] = ()
    """Sentence after each medium, see `add_time_texts`; () = none."""
    media_key: Hashable = None
    """Identifies `media`, so that further prompts reuse what the model has read; None = no reuse."""
    system: str = ""
    answer_prefix: str = ""
    """Text that the model continues, not repeated in the answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _ReadPrompt:
    """State of a prompt that the model has read."""

    num_tokens: int
    num_cached: int
    """Tokens whose state came from the prefix cache."""
    slot: SavedSlot
    logits_V: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    text: str
    option_log_probs: tuple[float, ...]
    """Log probability of each option as the whole answer, end token included."""
    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens whose state came from an earlier prompt about the same media."""


class Answerer:
    """Answers prompts with one model.

    Args:
        max_pack_tokens: limit of a pack, and of prompts that are scored together.
        prefix_cache_bytes: limit of states after media, kept for further prompts about them.
    """

    def __init__(
        self,
        model: TimeViper,
        tokenizer: Any,
        *,
        max_pack_tokens: int = DEFAULT_MAX_PACK_TOKENS,
        prefix_cache_bytes: int = DEFAULT_PREFIX_CACHE_BYTES,
    ) -> None:
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._template = chat_template(model.config.chat_template, tokenizer)
        self._max_pack_tokens = max_pack_tokens
        self._prefixes = PrefixCache(prefix_cache_bytes)
        self._end_ids = end_token_ids(tokenizer, self._template, model.config.text)
        self.num_scored_tokens = 0
        """Tokens that the model has read to score options."""
        parameter = model.lm_head.weight
        self._device, self._dtype = parameter.device, parameter.dtype

    @torch.no_grad()
    def score_options(self, prompts: Sequence[Prompt], options: Sequence[Sequence[str]]) -> list[list[float]]:
        """Returns log-probabilities per prompt and option, end token included.

        A prompt with media is read once; then its options are read together, one token each per step. Short prompts,
        without media, are packed once per option, which needs fewer, larger operations.
        """
        samples = [
            (index, self.sample(prompt, text))
            for index, (prompt, texts) in enumerate(zip(prompts, options, strict=True))
            for text in texts
        ]
        read_once = [number for number, (index, _) in enumerate(samples) if prompts[index].media]
        packed = [number for number, (index, _) in enumerate(samples) if not prompts[index].media]
        found = dict(zip(read_once, self._score_read_once([samples[n] for n in read_once], prompts), strict=True))
        found |= dict(zip(packed, self._score_packed([samples[n] for n in packed], prompts), strict=True))
        scores: list[list[float]] = [[] for _ in prompts]
        for number, (index, _) in enumerate(samples):
            scores[index].append(found[number])
        if not all(math.isfinite(score) for row in scores for score in row):
            raise RuntimeError("the log-probability of an option is not finite; are weights or features damaged?")
        return scores

    def _score_packed(self, samples: Sequence[tuple[int, Sample]], prompts: Sequence[Prompt]) -> list[float]:
        scores: list[float] = []
        for batch in self._packs([(sample, prompts[index]) for index, sample in samples]):
            log_probs, segment_ids = self._model.target_log_probs(batch)
            # float64: the order of a float32 sum must not decide between close options
            sums = torch.zeros(batch.num_segments, dtype=torch.float64, device=log_probs.device)
            scores += sums.index_add_(0, segment_ids.long(), log_probs.double()).tolist()
            self.num_scored_tokens += len(batch.input_ids)
        return scores

    def _score_read_once(self, samples: Sequence[tuple[int, Sample]], prompts: Sequence[Prompt]) -> list[float]:
        pairs = [(index, *_split_answer(sample)) for index, sample in samples]
        scores: list[float] = []
        last: tuple[int, Sample] | None = None
        read: _ReadPrompt | None = None
        for members in _group([len(prompt) for _, prompt, _ in pairs], self._max_pack_tokens):
            answers: list[tuple[_ReadPrompt, list[int]]] = []
            for index, prompt, answer in (pairs[member] for member in members):
                if read is None or last != (index, prompt):
                    last, read = (index, prompt), self._read(prompt, prompts[index])
                answers.append((read, answer))
            scores += self._log_probs(answers)
        return scores

    def _read(self, sample: Sample, prompt: Prompt) -> _ReadPrompt:
        device = self._device
        ids = torch.tensor(sample.input_ids, device=device)
        kinds = torch.tensor(sample.token_kind, dtype=torch.int8, device=device)
        boundary = 0 if prompt.media_key is None else prefix_length(kinds)
        key = (prompt.media_key, tuple(sample.input_ids[:boundary]))
        lease = self._prefixes.lease(key) if boundary else None
        cache = self._model.new_cache(1, device=device, dtype=self._dtype)
        try:
            entry = None if lease is None else lease.entry
            reading = Prefill(
                self._model,
                ids,
                kinds,
                lambda: [self._rows(prompt).to(device)],
                cache,
                0,
                boundary=boundary,
                prefix=entry,
                on_prefix=None if lease is None or entry is not None else lease.publish,
            )
            while (logits_V := reading.advance()) is None:
                pass
        finally:
            if lease is not None:
                lease.release()
        self.num_scored_tokens += len(sample) - (0 if entry is None else boundary)
        saved = cache.save(0, self._model.config.text.num_hidden_layers)
        num_cached = 0 if entry is None else boundary
        return _ReadPrompt(num_tokens=len(sample), num_cached=num_cached, slot=saved, logits_V=logits_V)

    def _open(self, reads: Sequence[_ReadPrompt], num_new_tokens: Sequence[int]) -> HybridCache:
        """Returns a cache with a prompt in each slot and room for its answer."""
        cache = self._model.new_cache(len(reads), device=self._device, dtype=self._dtype)
        for slot, (read, count) in enumerate(zip(reads, num_new_tokens, strict=True)):
            cache.reserve(slot, {layer: keys.shape[1] + count for layer, (keys, _) in read.slot.attention.items()})
            cache.load(slot, read.slot)
            cache.num_tokens[slot] = read.num_tokens
        return cache

    def _log_probs(self, answers: Sequence[tuple[_ReadPrompt, list[int]]]) -> list[float]:
        """Returns the log-probability of each answer after its prompt."""
        longest_first = sorted(range(len(answers)), key=lambda index: -len(answers[index][1]))
        ordered = [answers[index] for index in longest_first]
        cache = self._open([read for read, _ in ordered], [len(ids) for _, ids in ordered])
        sums_B = torch.zeros(len(ordered), dtype=torch.float64, device=self._device)
        ids_B = self._ids(ordered, 0)
        sums_B += _log_probs_of(torch.stack([read.logits_V for read, _ in ordered]), ids_B)
        for step in range(1, len(ordered[0][1])):
            next_ids_B = self._ids(ordered, step)
            num_left = len(next_ids_B)
            logits_BV = self._model.decode_step(ids_B[:num_left], cache, torch.arange(num_left))
            sums_B[:num_left] += _log_probs_of(logits_BV, next_ids_B)
            ids_B = next_ids_B
            self.num_scored_tokens += num_left
        by_slot = dict(zip(longest_first, sums_B.tolist(), strict=True))
        return [by_slot[index] for index in range(len(answers))]

    def _ids(self, answers: Sequence[tuple[_ReadPrompt, list[int]]], step: int) -> Tensor:
        return torch.tensor([ids[step] for _, ids in answers if len(ids) > step], device=self._device)

    def pack_answers(self, pairs: Sequence[tuple[Prompt, str]]) -> Iterator[PackedBatch]:
        """Yields packs of at most `max_pack_tokens`, in order."""
        return self._packs([(self.sample(prompt, answer), prompt) for prompt, answer in pairs])

    def prompt_batch(self, prompt: Prompt) -> PackedBatch:
        return next(self._packs([(self.sample(prompt, None), prompt)]))

    def generate_with(self, read: ReadPrompt, batches: Sequence[PackedBatch], *, max_new_tokens: int) -> list[str]:
        """Decodes greedy answers to packs of one prompt each, which `read` reads into a cache."""
        params = SamplingParams(max_new_tokens=max_new_tokens)
        answers = generate_ids(self._model, batches, end_ids=self._end_ids, params=params, read=read)
        return [self._tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]

    def _packs(self, samples: Sequence[tuple[Sample, Prompt]]) -> Iterator[PackedBatch]:
        for members in _group([len(sample) for sample, _ in samples], self._max_pack_tokens):
            batch = pack_samples([samples[n][0] for n in members], [self._rows(samples[n][1]) for n in members])
            yield batch.to(self._device, self._dtype)

    def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> list[str]:
        """Decodes greedy answers together."""
        return [answer.text for answer in self.answer(prompts, [()] * len(prompts), max_new_tokens=max_new_tokens)]

    @torch.no_grad()
    def answer(
        self, prompts: Sequence[Prompt], options: Sequence[Sequence[str]], *, max_new_tokens: int
    ) -> list[Answer]:
        """Returns a greedy answer per prompt, and the log-probabilities of its options (() = none).

        Each prompt is read once; consecutive prompts about the same media read the media once.
        """
        answers: list[Answer] = []
        waiting: list[tuple[_ReadPrompt, list[list[int]]]] = []
        for prompt, texts in zip(prompts, options, strict=True):
            continuations = [_split_answer(self.sample(prompt, text))[1] for text in texts]
            waiting.append((self._read(self.sample(prompt, None), prompt), continuations))
            if sum(read.slot.num_bytes for read, _ in waiting) > self._prefixes.max_bytes:
                answers += self._answer_read(waiting, max_new_tokens)
                waiting = []
        return answers + (self._answer_read(waiting, max_new_tokens) if waiting else [])

    def _answer_read(self, waiting: Sequence[tuple[_ReadPrompt, list[list[int]]]], max_new_tokens: int) -> list[Answer]:
        reads = [read for read, _ in waiting]
        texts = self._decode(reads, max_new_tokens)
        scores = self._option_log_probs(waiting)
        return [
            Answer(
                text=text,
                option_log_probs=tuple(row),
                num_prompt_tokens=read.num_tokens,
                num_cached_tokens=read.num_cached,
            )
            for read, text, row in zip(reads, texts, scores, strict=True)
        ]

    def _option_log_probs(self, waiting: Sequence[tuple[_ReadPrompt, list[list[int]]]]) -> list[list[float]]:
        """Scores options of all prompts together, in groups of states that fit into the prefix cache's bytes."""
        found: list[float] = []
        group: list[tuple[_ReadPrompt, list[int]]] = []
        for read, ids in ((read, ids) for read, options in waiting for ids in options):
            num_bytes = sum(other.slot.num_bytes for other, _ in group) + read.slot.num_bytes
            if group and num_bytes > self._prefixes.max_bytes:
                found += self._log_probs(group)
                group = []
            group.append((read, ids))
        scores = iter(found + (self._log_probs(group) if group else []))
        return [[next(scores) for _ in options] for _, options in waiting]

    def _decode(self, reads: Sequence[_ReadPrompt], max_new_tokens: int) -> list[str]:
        cache = self._open(reads, [max_new_tokens] * len(reads))
        answers: list[list[int]] = [[] for _ in reads]
        active = list(range(len(reads)))  # the prompt in each running slot
        logits_BV = torch.stack([read.logits_V for read in reads])
        for _ in range(max_new_tokens):
            if not bool(logits_BV.isfinite().all()):
                raise RuntimeError("the logits of an answer are not finite; are weights or features damaged?")
            next_ids = logits_BV.argmax(-1).tolist()
            for slot in reversed(range(len(active))):
                if next_ids[slot] in self._end_ids:
                    cache.swap(slot, len(active) - 1)
                    active[slot], next_ids[slot] = active[-1], next_ids[-1]
                    active.pop()
                    next_ids.pop()
                else:
                    answers[active[slot]].append(next_ids[slot])
            if not active:
                break
            ids_B = torch.tensor(next_ids, device=self._device)
            logits_BV = self._model.decode_step(ids_B, cache, torch.arange(len(active)))
        return [self._tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]

    def sample(self, prompt: Prompt, answer: str | None) -> Sample:
        """Builds the prompt, and the answer unless it is None."""
        conversation = [Turn(role="user", text=prompt.text)]
        if prompt.time_texts:
            conversation = add_time_texts(conversation, prompt.time_texts)
        if prompt.system:
            conversation.insert(0, Turn(role="system", text=prompt.system))
        if answer is not None:
            conversation.append(Turn(role="assistant", text=answer))
        return build_sample(
            self._tokenizer,
            conversation,
            [rows.shape[0] for rows in prompt.media],
            template=self._template,
            add_generation_prompt=answer is None,
            answer_prefix=prompt.answer_prefix,
        )

    def _rows(self, prompt: Prompt) -> Tensor:
        if prompt.media:
            return torch.cat([rows.to(self._dtype) for rows in prompt.media])
        return torch.zeros(0, self._model.config.vision.row_size, dtype=self._dtype)


def _log_probs_of(logits_BV: Tensor, ids_B: Tensor) -> Tensor:
    return logits_BV.log_softmax(-1).gather(1, ids_B[:, None])[:, 0].double()


def _split_answer(sample: Sample) -> tuple[Sample, list[int]]:
    """Returns the prompt and the ids of the answer that ends the sample."""
    start = sample.token_kind.index(TokenKind.RESPONSE)
    prompt = replace(
        sample,
        input_ids=sample.input_ids[:start],
        vision_index=sample.vision_index[:start],
        token_kind=sample.token_kind[:start],
        labels=[IGNORE_INDEX] * start,
    )
    return prompt, sample.input_ids[start:]


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
