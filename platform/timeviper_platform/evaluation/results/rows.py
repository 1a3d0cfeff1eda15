"""A row per answer with its scores, for tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from timeviper_platform.evaluation.benchmark_answers import BENCHMARK_ANSWERS, BenchmarkAnswer
from timeviper_platform.evaluation.benchmarks.question import BenchmarkQuestion
from timeviper_platform.evaluation.benchmarks.registry import BENCHMARKS, Benchmark, BenchmarkName
from timeviper_platform.evaluation.results.scores import (
    Replies,
    judged,
    likeliest_label,
    official_label,
    strict_label,
    true_span,
)
from timeviper_platform.evaluation.scoring.spans import find_span, temporal_iou

ANSWER_ROWS = pa.schema(
    [
        pa.field("question_id", pa.string()),
        pa.field("video", pa.string()),
        pa.field("expected", pa.string()),  # right labels, or intervals
        pa.field("official", pa.string()),  # label or interval that the official scorer finds; null = none
        pa.field("strict", pa.string()),
        pa.field("likelihood", pa.string()),
        pa.field("official_score", pa.float64()),  # 1 or 0; temporal IoU; null for other kinds, or a missing video
        pa.field("strict_score", pa.float64()),
        pa.field("likelihood_score", pa.float64()),
        pa.field("judge_score", pa.float64()),  # of a caption by the first judge, 0 to 1; null = not judged
        *BENCHMARK_ANSWERS,
    ]
)


def answer_rows(
    benchmark: BenchmarkName, answers: Sequence[BenchmarkAnswer], replies: Replies | None = None
) -> list[dict[str, Any]]:
    first_judge = replies[min(replies)] if replies else {}
    return [_row(BENCHMARKS[benchmark], answer, first_judge) for answer in answers]


def _row(spec: Benchmark, answer: BenchmarkAnswer, known: Mapping[str, str]) -> dict[str, Any]:
    question = answer.asked()
    row: dict[str, Any] = {
        "question_id": question.question_id,
        "video": question.clip.path,
        "expected": _expected(question),
    }
    if question.kind == "caption" and answer.status == "ok":
        verdict = judged(question, answer.answer, known)
        row["judge_score"] = None if verdict is None else next(iter(verdict.values.values()))
    elif answer.status in ("ok", "failed"):
        row |= _choice(spec, question, answer) if question.kind == "choice" else _span(spec, question, answer)
    return row | asdict(answer)


def _expected(question: BenchmarkQuestion) -> str:
    return ", ".join(question.answers or [f"{start:g} - {end:g}" for start, end in question.spans])


def _choice(spec: Benchmark, question: BenchmarkQuestion, answer: BenchmarkAnswer) -> dict[str, Any]:
    labels = {
        "official": official_label(spec, question, answer),
        "strict": strict_label(question, answer.answer),
        "likelihood": likeliest_label(question, answer),
    }
    right = {"official": question.answers[:1], "strict": question.answers, "likelihood": question.answers}
    scores = {f"{name}_score": float(label in right[name]) for name, label in labels.items()}
    if not answer.option_log_probs:
        del scores["likelihood_score"]
    return labels | scores


def _span(spec: Benchmark, question: BenchmarkQuestion, answer: BenchmarkAnswer) -> dict[str, Any]:
    if question.kind != "span":
        return {}
    spans = {
        "official": find_span(spec.span_rule, answer.answer),
        "strict": find_span("strict", answer.answer, question.duration_seconds),
    }
    row: dict[str, Any] = {}
    for name, span in spans.items():
        row[name] = None if span is None else f"{span.start_seconds:g} - {span.end_seconds:g}"
        row[f"{name}_score"] = (
            0.0 if span is None else temporal_iou(span, true_span(question, is_official=name == "official"))
        )
    return row
