"""Raw answers of a benchmark to scores, by protocol and scorer. Needs no model and no benchmark files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from timeviper_platform.evaluation.benchmark_answers import BenchmarkAnswer
from timeviper_platform.evaluation.benchmarks.question import BenchmarkQuestion
from timeviper_platform.evaluation.benchmarks.registry import BENCHMARKS, Benchmark, BenchmarkName
from timeviper_platform.evaluation.judging.exams import Verdict, exams_of, verdict_of
from timeviper_platform.evaluation.protocols import PAPER_MIN_FRAMES
from timeviper_platform.evaluation.results.published import published_scores
from timeviper_platform.evaluation.scoring import dense, tempcompass, windows
from timeviper_platform.evaluation.scoring.groups import GROUP_SIZE, logic_score, relevance_score
from timeviper_platform.evaluation.scoring.intervals import (
    Statistic,
    interval_by_video,
    mean_of,
    mean_of_means,
    value,
)
from timeviper_platform.evaluation.scoring.letters import LetterRule, find_letter
from timeviper_platform.evaluation.scoring.spans import Span, SpanRule, find_span, parse_spans, temporal_iou

JUDGE = "judge"
"""Start of a judge's name as scorer."""

RECALL_THRESHOLDS = (0.3, 0.5, 0.7)

OTHER_RULES: tuple[LetterRule, ...] = ("lmms_eval", "vlmevalkit")
"""Public rules for letters whose scores are given in addition to each benchmark's official one."""


@dataclass(frozen=True, slots=True)
class _Scored:
    """A question's values by metric, within 0 and 1; None = not parsed."""

    question: BenchmarkQuestion
    values: Mapping[str, float]
    is_parsed: bool = True


@dataclass(slots=True)
class _Scorer:
    name: str
    rows: list[_Scored] = field(default_factory=list)


Replies = Mapping[str, Mapping[str, str]]
"""Of judges: judge, then call hash, to reply."""


def score_answers(
    benchmark: BenchmarkName, answers: Sequence[BenchmarkAnswer], replies: Replies | None = None
) -> dict[str, Any]:
    """Returns the report of a benchmark; scores are in percent, with 95 % intervals by video.

    {benchmark, title, published, protocols: {protocol: {num_questions, num_videos, num_missing_videos, num_missing,
    num_no_frames, num_failed, num_below_32_frames, num_unjudged, scorers: {scorer: {num_unparsable,
    metrics: {metric: score}, breakdowns: {group: {value: score}}}}}}}, where a score is {score, interval_95,
    num_questions}.

    Questions whose video is missing are in no score. Failed ones are wrong, as empty answers, in every scorer but
    `likelihood`, which leaves them out.
    """
    spec = BENCHMARKS[benchmark]
    protocols = {answer.protocol: None for answer in answers}
    return {
        "benchmark": benchmark,
        "title": spec.title,
        "published": published_scores(benchmark),
        "protocols": {
            protocol: _score_protocol(
                spec, [answer for answer in answers if answer.protocol == protocol], replies or {}
            )
            for protocol in protocols
        },
    }


def _score_protocol(spec: Benchmark, answers: Sequence[BenchmarkAnswer], replies: Replies) -> dict[str, Any]:
    asked = [(answer.asked(), answer) for answer in answers]
    missing = [question for question, answer in asked if answer.status == "no_features"]
    scored = [(question, answer) for question, answer in asked if answer.status in ("ok", "failed")]
    scorers = [scorer for scorer in _scorers(spec, scored, replies) if scorer.rows]
    judged = [len(scorer.rows) for scorer in scorers if scorer.name.startswith(JUDGE)]
    num_captions = sum(question.kind == "caption" for question, _ in scored)
    short = [answer for _, answer in scored if 0 < answer.num_frames < PAPER_MIN_FRAMES]
    return {
        "num_questions": len(scored),
        "num_videos": len({question.clip.path for question, _ in scored}),
        "num_missing": len(missing),
        "num_missing_videos": len({question.clip.path for question in missing}),
        "num_no_frames": sum(answer.status == "no_frames" for answer in answers),
        "num_failed": sum(answer.status == "failed" for answer in answers),
        "num_empty": sum(not answer.answer.strip() for _, answer in scored),
        "num_below_32_frames": len(short),
        "num_unjudged": num_captions - min(judged, default=0),
        "scorers": {scorer.name: _summary(spec, scorer) for scorer in scorers},
    }


_Asked = Sequence[tuple[BenchmarkQuestion, BenchmarkAnswer]]


def _scorers(spec: Benchmark, asked: _Asked, replies: Replies) -> list[_Scorer]:
    kinds = {question.kind for question, _ in asked}
    if "choice" in kinds:
        return _choice_scorers(spec, asked)
    if "span" in kinds:
        return [
            _span_scorer(
                "official", spec.span_rule, _without_equal_rows(asked) if spec.collapses_equal_rows else asked
            ),
            _span_scorer("strict", "strict", asked),
        ]
    if "windows" in kinds:
        return [_Scorer("strict", [_windows(question, answer.answer) for question, answer in asked])]
    if "dense" in kinds:
        return [_Scorer("strict", [_dense(question, answer.answer) for question, answer in asked])]
    return [_judge_scorer(judge, known, asked) for judge, known in sorted(replies.items())]


def _judge_scorer(judge: str, known: Mapping[str, str], asked: _Asked) -> _Scorer:
    found = [(question, judged(question, answer.answer, known)) for question, answer in asked]
    rows = [_Scored(question, v.values, v.num_unparsable == 0) for question, v in found if v is not None]
    return _Scorer(f"{JUDGE} {judge}", rows)


def judged(question: BenchmarkQuestion, caption: str, known: Mapping[str, str]) -> Verdict | None:
    """Returns the verdict by a judge's replies; None if a call about the caption was not answered."""
    found = [exam.replies(known) for exam in exams_of(question, caption)]
    complete = [replies for replies in found if replies is not None]
    return verdict_of(question, complete) if len(complete) == len(found) else None


def _choice_scorers(spec: Benchmark, asked: _Asked) -> list[_Scorer]:
    official = [(q, a) for q, a in asked if a.answer or a.status == "failed" or not spec.drops_empty]
    rules = [rule for rule in OTHER_RULES if rule != spec.letter_rule]
    likelihood = [(question, answer) for question, answer in asked if answer.option_log_probs]
    return [
        _Scorer("official", [_choice(q, official_label(spec, q, a), q.answers[:1]) for q, a in official]),
        _Scorer("strict", [_choice(q, strict_label(q, a.answer), q.answers) for q, a in asked]),
        _Scorer("likelihood", [_choice(q, likeliest_label(q, a), q.answers) for q, a in likelihood]),
        *(
            _Scorer(rule, [_choice(q, find_letter(rule, a.answer, q.options), q.answers[:1]) for q, a in asked])
            for rule in rules
            if not any({"tempcompass", "form"} & set(question.details) for question, _ in asked)
        ),
    ]


def official_label(spec: Benchmark, question: BenchmarkQuestion, answer: BenchmarkAnswer) -> str | None:
    if answer.status == "failed":  # some rules draw a letter for an empty answer
        return None
    if task := question.details.get("tempcompass"):
        return tempcompass.official_label(task, answer.answer, question.labels, question.options)
    return find_letter(spec.letter_rule, answer.answer, question.options)


def strict_label(question: BenchmarkQuestion, answer: str) -> str | None:
    if task := question.details.get("tempcompass"):
        return tempcompass.strict_label(task, answer, question.labels, question.options)
    return find_letter("strict", answer, question.options)


def likeliest_label(question: BenchmarkQuestion, answer: BenchmarkAnswer) -> str | None:
    if not answer.option_log_probs:
        return None
    return question.labels[answer.option_log_probs.index(max(answer.option_log_probs))]


def _choice(question: BenchmarkQuestion, label: str | None, right: Sequence[str]) -> _Scored:
    return _Scored(question, {"accuracy": float(label in right)}, label is not None)


def _span_scorer(name: str, rule: SpanRule, asked: _Asked) -> _Scorer:
    rows = []
    for question, answer in asked:
        span = find_span(rule, answer.answer, question.duration_seconds)
        iou = 0.0 if span is None else temporal_iou(span, true_span(question, is_official=rule != "strict"))
        rows.append(_Scored(question, _span_values(iou), span is not None))
    return _Scorer(name, rows)


def true_span(question: BenchmarkQuestion, *, is_official: bool) -> Span:
    """Returns the expected interval; the official scorer of Charades-STA does not cut it at the video's end."""
    uncut = question.details.get("uncut_span") if is_official else None
    return Span(*uncut) if uncut else question.spans[0]


def _span_values(iou: float) -> dict[str, float]:
    """Recall counts an IoU at the threshold; `R1>` does not, as in the public TimeViper code."""
    at = {f"R1@{threshold}": float(iou >= threshold) for threshold in RECALL_THRESHOLDS}
    return {"mIoU": iou} | at | {f"R1>{threshold}": float(iou > threshold) for threshold in RECALL_THRESHOLDS}


def _without_equal_rows(asked: _Asked) -> _Asked:
    """lmms-eval keys answers by video, query and interval: the last one of equal rows counts."""
    return list({question.details["key"]: (question, answer) for question, answer in asked}.values())


def _windows(question: BenchmarkQuestion, answer: str) -> _Scored:
    found, true = parse_spans(answer, question.duration_seconds), question.spans
    iou = windows.best_iou(found, true)
    values = {
        "mAP": windows.mean_average_precision(found, true),
        "mAP@0.5": windows.average_precision(found, true, 0.5),
        "mAP@0.75": windows.average_precision(found, true, 0.75),
        "R1@0.5": float(iou >= 0.5),
        "R1@0.7": float(iou >= 0.7),
    }
    for length in windows.LENGTHS:
        if selected := windows.of_length(true, length):
            of_length = windows.of_length(found, length)
            values[f"mAP {length}"] = windows.mean_average_precision(of_length, selected)
    return _Scored(question, values, bool(found))


def _dense(question: BenchmarkQuestion, answer: str) -> _Scored:
    found = dense.event_spans(answer, question.duration_seconds)
    references = [[Span(*span) for span in reference["spans"]] for reference in question.details["references"]]
    precision, recall = dense.precision_recall(found, references)
    both = precision + recall
    values = {
        "F1": 2 * precision * recall / both if both else 0.0,
        "precision": precision,
        "recall": recall,
        "ordered overlap": max(dense.ordered_overlap(found, true) for true in references),
    }
    return _Scored(question, values, bool(found))


def _summary(spec: Benchmark, scorer: _Scorer) -> dict[str, Any]:
    rows = scorer.rows
    if spec.headline == "groups_of_four":
        metrics, groups = _group_metrics(rows)
    else:
        metrics, groups = _metrics(spec, rows), rows
    first = next(iter(metrics))
    return {
        "num_unparsable": sum(not row.is_parsed for row in rows),
        "metrics": metrics,
        "breakdowns": _breakdowns(groups, "accuracy" if first.startswith(("accuracy", "M-Avg")) else first),
    }


def _metrics(spec: Benchmark, rows: Sequence[_Scored]) -> dict[str, Any]:
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    metrics = {name: _mean([row for row in rows if name in row.values], name) for name in names}
    if spec.headline == "mean_of_tasks":
        tasks = [row.question.groups["task"][0] for row in rows]
        name, own = ("M-Avg", "accuracy") if "accuracy" in names else ("G-Avg", "G-Avg")
        statistic = mean_of_means([row.values[own] for row in rows], tasks)
        return {name: _score(statistic, rows)} | {key: value for key, value in metrics.items() if key != name}
    if any(len(group) > 1 for row in rows for group in row.question.groups.values()):
        name = next(name for row in rows for name, group in row.question.groups.items() if len(group) > 1)
        counts = np.array([len(row.question.groups[name]) for row in rows], dtype=np.float64)
        plain = mean_of([row.values["accuracy"] for row in rows])
        metrics[f"accuracy, once for each {name}"] = _score(lambda weights_RQ: plain(weights_RQ * counts), rows)
    return metrics


def _group_metrics(rows: Sequence[_Scored]) -> tuple[dict[str, Any], list[_Scored]]:
    """Returns VideoMME-v2's metrics, and a row per group with the level and heads of its last question.

    Groups that lack a question, because of `max_questions` or a failure, count only in the accuracy.
    """
    by_group: dict[str, list[_Scored]] = {}
    for row in rows:
        by_group.setdefault(row.question.details["group"], []).append(row)
    groups = []
    for members in by_group.values():
        if len(members) != GROUP_SIZE:
            continue
        members.sort(key=lambda row: _number(row.question.question_id))
        right = [row.values["accuracy"] == 1.0 for row in members]
        last = members[-1].question
        if last.groups["group_type"] == ("relevance",):
            score = relevance_score(right)
        else:
            score = logic_score(right, last.details["group_structure"])
        groups.append(_Scored(last, {"group score": score}))
    metrics = {"group score": _mean(groups, "group score")} if groups else {}
    return metrics | {"accuracy": _mean(rows, "accuracy")}, groups


def _number(question_id: str) -> int:
    """The number at the end of an id, such as 2 of 001-2; equal ones keep the order of the file."""
    digits = question_id.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else 0


def _breakdowns(rows: Sequence[_Scored], metric: str) -> dict[str, Any]:
    """Scores by group and value; a question counts in each of its values."""
    found: dict[str, dict[str, list[_Scored]]] = {}
    for row in rows:
        for name, group in row.question.groups.items():
            for member in group:
                found.setdefault(name, {}).setdefault(member, []).append(row)
    return {
        name: {member: _mean(values, metric) for member, values in sorted(members.items())}
        for name, members in found.items()
        if len(members) > 1
    }


def _mean(rows: Sequence[_Scored], metric: str) -> dict[str, Any]:
    return _score(mean_of([row.values[metric] for row in rows]), rows)


def _score(statistic: Statistic, rows: Sequence[_Scored]) -> dict[str, Any]:
    low, high = interval_by_video(statistic, [row.question.clip.path for row in rows])
    return {
        "score": 100 * value(statistic, len(rows)),
        "interval_95": [round(100 * low, 2), round(100 * high, 2)],
        "num_questions": len(rows),
    }


def headline(report: Mapping[str, Any], protocol: str, scorer: str) -> tuple[str, Mapping[str, Any]] | None:
    """Returns name and score of the first metric; None without one."""
    found = report["protocols"].get(protocol, {}).get("scorers", {}).get(scorer)
    return None if not found else next(iter(found["metrics"].items()))


def score_lines(report: Mapping[str, Any]) -> Iterable[str]:
    """Yields the report's table for a terminal."""
    yield f"{report['title']}"
    yield f"{'protocol':<15}{'scorer':<24}{'metric':<34}{'score':>8}{'95 % interval':>17}{'questions':>11}"
    for protocol, found in report["protocols"].items():
        for scorer, summary in found["scorers"].items():
            for metric, score in summary["metrics"].items():
                low, high = score["interval_95"]
                numbers = f"{score['score']:>8.2f}{f'{low:.1f} - {high:.1f}':>17}{score['num_questions']:>11}"
                yield f"{protocol:<15}{scorer:<24}{metric:<34}{numbers}"
            if summary["num_unparsable"]:
                yield f"{protocol:<15}{scorer:<24}{summary['num_unparsable']} answers without a choice or interval"
        yield from _counts(protocol, found)
    for model, score in report["published"].items():
        yield f"{'published':<15}{model:<58}{score:>8.2f}"


def _counts(protocol: str, found: Mapping[str, Any]) -> Iterable[str]:
    if found["num_missing_videos"]:
        questions = f"{found['num_missing']} questions in no score"
        yield f"{protocol:<15}{found['num_missing_videos']} videos are not in the feature store, {questions}"
    for name, words in (
        ("num_no_frames", "clips without a frame"),
        ("num_failed", "questions failed"),
        ("num_empty", "answers are empty"),
    ):
        if found[name]:
            yield f"{protocol:<15}{found[name]} {words}"
    if protocol == "paper" and found["num_below_32_frames"]:
        advice = "preprocess with sampling.min_frames=32 for the paper's protocol"
        yield f"{protocol:<15}{found['num_below_32_frames']} answers saw fewer than {PAPER_MIN_FRAMES} frames; {advice}"
