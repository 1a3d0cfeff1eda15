"""Scores of generated answers with one flow of information cut (Figure 3), or vision tokens dropped (Figure 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from timeviper_model.analysis.blocking import Blocking, cut_flow, read_blocked
from timeviper_model.analysis.dropping import with_plan
from timeviper_model.batching.batch import PackedBatch
from timeviper_model.config import TransVSite
from timeviper_model.timeviper import TimeViper
from timeviper_platform.evaluation.answering import Answerer, Prompt
from timeviper_platform.evaluation.outcomes import Question
from timeviper_platform.evaluation.scoring.captions import rouge_l
from timeviper_platform.evaluation.scoring.intervals import interval_by_video, mean_of, wilson_interval
from timeviper_platform.evaluation.scoring.spans import Span, parse_span, temporal_iou

Generate = Callable[[Sequence[Prompt]], list[str]]
TargetLogProbs = Callable[[PackedBatch], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockingSweep:
    """Blocks one flow of information per measurement (Figure 3)."""

    flows: tuple[Literal["v2i", "v2r"], ...] = ("v2i", "v2r")
    """Vision to instruction (v2i), vision to response (v2r)."""
    scopes: tuple[Literal["layer", "window", "from_layer"], ...] = ("from_layer",)
    """Extent of blocking: one block, `window` blocks, or all from one on."""
    window: int = 5
    """Number of blocks in scope `window`."""
    kinds: tuple[Literal["attention", "mamba", "both"], ...] = ("both",)
    """Kinds of affected blocks."""
    layers: tuple[int, ...] | None = None
    """Measured blocks; null = all that mix tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DroppingSweep:
    """Drops vision tokens before one block per measurement (Figure 4)."""

    selections: tuple[Literal["uniform", "attention"], ...] = ("uniform", "attention")
    """Criteria for keeping tokens."""
    keep_ratios: tuple[float, ...] = (0.5, 0.1)
    """Shares of kept vision tokens."""
    layers: tuple[int, ...] | None = None
    """Measured blocks; null = all that mix tokens. `attention` needs an attention block."""


class TaskPrompts(NamedTuple):
    task: str
    questions: tuple[Question, ...]
    prompts: tuple[Prompt, ...]

    @property
    def videos(self) -> list[str]:
        return [" ".join(medium["media_id"] for medium in row["media"] or []) for row in self.questions]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    scores: tuple[float, ...]
    """From 0 to 1 per question, see `score_text`."""
    log_prob: float
    """Of the right answers, nats per token."""


def score_text(question: Question, text: str) -> float:
    """Choices: whether `text` is the right one, ignoring case and outer punctuation. Intervals: temporal IoU.
    Else: ROUGE-L against the answer.
    """
    if question["choices"]:
        return float(text.strip(" .").lower() == question["answer"].strip(" .").lower())
    if question["start_seconds"] is not None and question["end_seconds"] is not None:
        span = parse_span(text)
        return 0.0 if span is None else temporal_iou(span, Span(question["start_seconds"], question["end_seconds"]))
    return rouge_l(text, question["answer"])


def metric_name(question: Question) -> str:
    if question["choices"]:
        return "accuracy"
    return "ROUGE-L" if question["start_seconds"] is None else "mIoU"


def measure(answerer: Answerer, task: TaskPrompts, generate: Generate, target_log_probs: TargetLogProbs) -> Scores:
    """Scores generated answers, and the log-probability of the right ones."""
    texts = generate(task.prompts)
    scores = tuple(score_text(row, text) for row, text in zip(task.questions, texts, strict=True))
    pairs = [(prompt, row["answer"]) for row, prompt in zip(task.questions, task.prompts, strict=True)]
    means: list[float] = []
    for batch in answerer.pack_answers(pairs):
        log_probs_K, segment_ids_K = target_log_probs(batch)
        sums = torch.zeros(batch.num_segments, dtype=torch.float64, device=log_probs_K.device)
        sums.index_add_(0, segment_ids_K.long(), log_probs_K.double())
        means += (sums / torch.bincount(segment_ids_K.long(), minlength=batch.num_segments)).tolist()
    return Scores(scores=scores, log_prob=sum(means) / len(means))


def score_row(task: TaskPrompts, found: Scores, baseline: Scores) -> dict[str, Any]:
    """A row's score with its 95 % interval by video, and its change against the baseline, question by question."""
    low, high = interval_by_video(mean_of(found.scores), task.videos)
    changes = [own - before for own, before in zip(found.scores, baseline.scores, strict=True)]
    if any(changes):
        change_low, change_high = interval_by_video(mean_of(changes), task.videos)
    else:  # none changed: the bootstrap would give no width
        change_high = wilson_interval(0, len(set(task.videos)))[1]
        change_low = -change_high
    return {
        "task": task.task,
        "metric": metric_name(task.questions[0]),
        "num_questions": len(task.questions),
        "score": float(np.mean(found.scores)),
        "low": low,
        "high": high,
        "change": float(np.mean(changes)),
        "change_low": change_low,
        "change_high": change_high,
        "log_prob": found.log_prob,
    }


def mixing_layers(model: TimeViper, layers: tuple[int, ...] | None) -> list[int]:
    types = model.config.text.block_types
    return [layer for layer, kind in enumerate(types) if kind != "mlp"] if layers is None else list(layers)


def blocking_rows(
    model: TimeViper, answerer: Answerer, task: TaskPrompts, sweep: BlockingSweep, *, max_new_tokens: int
) -> Iterator[dict[str, Any]]:
    """Yields a baseline (`flow` "none"), then a row per flow, scope, kind and layer."""
    batches = [answerer.prompt_batch(prompt) for prompt in task.prompts]

    def scores(cut: Blocking | None) -> Scores:
        if cut is None:
            return measure(
                answerer,
                task,
                lambda prompts: answerer.generate(prompts, max_new_tokens=max_new_tokens),
                model.target_log_probs,
            )
        read = partial(read_blocked, model, blocking=cut)
        return measure(
            answerer,
            task,
            lambda _: answerer.generate_with(read, batches, max_new_tokens=max_new_tokens),
            partial(model.target_log_probs, run_block=cut_flow(model, cut)),
        )

    start = scores(None)
    yield {"flow": "none", "scope": "", "kind": "", "layer": None, **score_row(task, start, start)}
    for flow in sweep.flows:
        for scope in sweep.scopes:
            for kind in sweep.kinds:
                for layer in mixing_layers(model, sweep.layers):
                    window = sweep.window if scope == "window" else 1
                    cut = Blocking(flow=flow, scope=scope, layer=layer, window=window, kind=kind)
                    row = score_row(task, scores(cut), start)
                    yield {"flow": flow, "scope": scope, "kind": kind, "layer": layer, **row}


def dropping_rows(
    model: TimeViper,
    answerer_of: Callable[[TimeViper], Answerer],
    task: TaskPrompts,
    sweep: DroppingSweep,
    *,
    max_new_tokens: int,
) -> Iterator[dict[str, Any]]:
    """Yields a baseline without drops (`select` "none"), then a row per selection, ratio and layer."""

    def scores(sites: Sequence[TransVSite]) -> Scores:
        twin = with_plan(model, sites)
        answerer = answerer_of(twin)
        generate = partial(answerer.generate, max_new_tokens=max_new_tokens)
        return measure(answerer, task, generate, twin.target_log_probs)

    types = model.config.text.block_types
    start = scores(())
    yield {"select": "none", "keep": 1.0, "layer": None, **score_row(task, start, start)}
    for select in sweep.selections:
        for keep in sweep.keep_ratios:
            for layer in mixing_layers(model, sweep.layers):
                if select == "uniform" or types[layer] == "attention":
                    site = TransVSite(layer=layer, select=select, keep=keep, transfer="none")
                    row = score_row(task, scores((site,)), start)
                    yield {"select": select, "keep": keep, "layer": layer, **row}
