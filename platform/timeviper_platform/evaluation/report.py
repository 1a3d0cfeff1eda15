"""Summarises outcomes by task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from timeviper_platform.evaluation.outcomes import SCORED, Outcome
from timeviper_platform.evaluation.scoring.intervals import interval_by_video, mean_of


def summarise(outcomes: Iterable[Outcome]) -> dict[str, Any]:
    """Returns one entry per task, in order of first appearance. Intervals are by video.

    Choices:   {accuracy, interval_95, chance, above_chance, accuracy_without_video, interval_95_without_video,
                num_questions, num_skipped, skipped}
    Grounding: {miou, interval_95, miou_without_video, interval_95_without_video, num_unparsable, num_questions,
                num_skipped, skipped}

    `above_chance`: the whole interval lies above chance. `skipped` has the statuses of questions that are not scored;
    unparsable answers are scored 0.
    """
    by_task: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_task.setdefault(outcome.task, []).append(outcome)
    return {task: _summarise_task(rows) for task, rows in by_task.items()}


def report_lines(report: dict[str, Any]) -> list[str]:
    lines = [f"{'task':<12}{'score':>8}{'95 % interval':>18}{'chance':>9}{'without video':>15}{'questions':>11}"]
    for task, row in report.items():
        score = row.get("accuracy", row.get("miou"))
        blind = row.get("accuracy_without_video", row.get("miou_without_video"))
        if score is None:
            lines.append(f"{task:<12}{'none of ' + str(row['num_skipped']) + ' questions could be answered':>43}")
            lines += _counted(task, row)
            continue
        low, high = row["interval_95"]
        chance = f"{row['chance']:.2f}" if "chance" in row else "-"
        interval = f"{low:.3f} - {high:.3f}"
        lines.append(f"{task:<12}{score:>8.3f}{interval:>18}{chance:>9}{blind:>15.3f}{row['num_questions']:>11}")
        lines += _counted(task, row)
    return lines


def _counted(task: str, row: dict[str, Any]) -> list[str]:
    """Returns a line of what was not scored, or scored 0 unread."""
    counts = dict(row.get("skipped", {}))
    if row.get("num_unparsable"):
        counts["unparsable (scored 0)"] = row["num_unparsable"]
    return [f"{task:<12}{', '.join(f'{count} {name}' for name, count in sorted(counts.items()))}"] if counts else []


def _summarise_task(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    scored = [outcome for outcome in outcomes if outcome.status in SCORED]
    skipped = Counter(outcome.status for outcome in outcomes if outcome.status not in SCORED)
    counts = {"num_questions": len(scored), "num_skipped": skipped.total(), "skipped": dict(skipped)}
    if not scored:
        return counts
    videos = [outcome.video or outcome.question_hash for outcome in scored]

    def interval(values: Sequence[float]) -> list[float]:
        return [round(bound, 4) for bound in interval_by_video(mean_of(values), videos)]

    scores = [outcome.score for outcome in scored]
    blind = [outcome.score_without_video for outcome in scored]
    chances = [outcome.chance for outcome in scored if outcome.chance is not None]
    if not chances:
        return {
            "miou": _mean(scores),
            "interval_95": interval(scores),
            "miou_without_video": _mean(blind),
            "interval_95_without_video": interval(blind),
            "num_unparsable": sum(outcome.status == "unparsable" for outcome in scored),
            **counts,
        }
    chance, interval_95 = _mean(chances), interval(scores)
    return {
        "accuracy": _mean(scores),
        "interval_95": interval_95,
        "chance": chance,
        "above_chance": interval_95[0] > chance,
        "accuracy_without_video": _mean(blind),
        "interval_95_without_video": interval(blind),
        **counts,
    }


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)
