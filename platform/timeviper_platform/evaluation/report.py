"""Outcomes to the report: per task the score, its 95 % interval, chance, and the same without the video."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from timeviper_platform.evaluation.evaluator import Outcome
from timeviper_platform.evaluation.metrics import mean_interval, wilson_interval


def summarise(outcomes: Iterable[Outcome]) -> dict[str, Any]:
    """One entry a task, in order of first appearance. Figures have four places.

    Choices:   {accuracy, interval_95, chance, above_chance, accuracy_without_video, interval_95_without_video,
                num_questions, num_skipped}
    grounding: {miou, interval_95, miou_without_video, interval_95_without_video, num_questions, num_skipped}

    `above_chance` is whether the whole interval lies above chance. Skipped questions (no features, nothing to compare
    with) are counted and not scored.
    """
    by_task: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_task.setdefault(outcome.task, []).append(outcome)
    return {task: _summarise_task(rows) for task, rows in by_task.items()}


def report_lines(report: dict[str, Any]) -> list[str]:
    """The report as a plain table."""
    lines = [f"{'task':<12}{'score':>8}{'95 % interval':>18}{'chance':>9}{'without video':>15}{'questions':>11}"]
    for task, row in report.items():
        score = row.get("accuracy", row.get("miou"))
        blind = row.get("accuracy_without_video", row.get("miou_without_video"))
        if score is None:
            lines.append(f"{task:<12}{'none of ' + str(row['num_skipped']) + ' questions could be asked':>40}")
            continue
        low, high = row["interval_95"]
        chance = f"{row['chance']:.2f}" if "chance" in row else "-"
        interval = f"{low:.3f} - {high:.3f}"
        lines.append(f"{task:<12}{score:>8.3f}{interval:>18}{chance:>9}{blind:>15.3f}{row['num_questions']:>11}")
    return lines


def _summarise_task(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    asked = [outcome for outcome in outcomes if outcome.status == "ok"]
    counts = {"num_questions": len(asked), "num_skipped": len(outcomes) - len(asked)}
    if not asked:
        return counts
    scores = [outcome.score for outcome in asked]
    blind = [outcome.score_without_video for outcome in asked]
    chances = [outcome.chance for outcome in asked if outcome.chance is not None]
    if not chances:
        return {
            "miou": _mean(scores),
            "interval_95": _places(mean_interval(scores)),
            "miou_without_video": _mean(blind),
            "interval_95_without_video": _places(mean_interval(blind)),
            **counts,
        }
    interval = wilson_interval(int(sum(scores)), len(scores))
    chance = _mean(chances)
    return {
        "accuracy": _mean(scores),
        "interval_95": _places(interval),
        "chance": chance,
        "above_chance": interval[0] > chance,
        "accuracy_without_video": _mean(blind),
        "interval_95_without_video": _places(wilson_interval(int(sum(blind)), len(blind))),
        **counts,
    }


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)


def _places(interval: tuple[float, float]) -> list[float]:
    return [round(value, 4) for value in interval]
