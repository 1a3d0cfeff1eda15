"""Row group `questions`: CPU time of a video's questions together against that of its first one alone."""

from __future__ import annotations

import math
import statistics
import time

import torch

from timeviper_platform.benchmarks.measure import Row
from timeviper_platform.benchmarks.model.models import (
    TOKENS_PER_FRAME,
    VOCAB_SIZE,
    iter_features,
    make_model,
    narrow_config,
)
from timeviper_platform.data.synthetic.tokenizer import train_tokenizer
from timeviper_platform.evaluation.answering import Answer, Answerer, Prompt

COMMAND = "python jobs/benchmark.py evaluation --only questions"
NUM_QUESTIONS = 3
"""As many as Video-MME has per video."""
OPTIONS = tuple(f"{letter}. option {letter}" for letter in "ABCD")
NUM_ANSWER = 8
"""Tokens per generated answer."""


def question_rows(*, width: int = 256, num_frames: int = 1024, repeats: int = 5) -> list[Row]:
    """Each question is answered freely, and its four options are scored.

    Raises:
        RuntimeError: if answers with the prefix cache differ from those without.
    """
    model = make_model(narrow_config(width))
    tokenizer = train_tokenizer(["What happens in part 3? Options.", *OPTIONS], VOCAB_SIZE)
    rows = torch.cat(list(iter_features(num_frames)))

    def ask(answerer: Answerer, video: int, count: int) -> tuple[float, list[Answer]]:
        prompts = [
            Prompt(text=f"What happens in part {number}?\n" + "\n".join(OPTIONS), media=(rows,), media_key=video)
            for number in range(count)
        ]
        start = time.process_time()
        answers = answerer.answer(prompts, [OPTIONS] * count, max_new_tokens=NUM_ANSWER)
        return time.process_time() - start, answers

    def answerer(prefix_cache_bytes: int) -> Answerer:
        return Answerer(model, tokenizer, prefix_cache_bytes=prefix_cache_bytes)

    cached = answerer(1 << 33)
    _, alone = ask(answerer(0), 0, NUM_QUESTIONS)
    ratios = []
    for number in range(repeats):
        one, _ = ask(cached, 2 * number, 1)
        several, answers = ask(cached, 2 * number + 1, NUM_QUESTIONS)
        _check_same(answers, alone)
        ratios.append(several / one)
    return [
        Row(
            name=f"CPU time of {NUM_QUESTIONS} questions on a video over one, {num_frames} frames of {TOKENS_PER_FRAME}"
            f" tokens, width {width}, four options each ({min(ratios):.3g} to {max(ratios):.3g})",
            value=statistics.median(ratios),
            unit="x",
            bar="<= 1.3",
            command=COMMAND,
        )
    ]


def _check_same(cached: list[Answer], alone: list[Answer]) -> None:
    for first, second in zip(cached, alone, strict=True):
        pairs = zip(first.option_log_probs, second.option_log_probs, strict=True)
        if first.text != second.text or not all(math.isclose(a, b, rel_tol=1e-3) for a, b in pairs):
            raise RuntimeError(f"with the prefix cache an answer is {first}, without {second}")
