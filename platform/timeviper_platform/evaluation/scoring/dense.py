"""Scores dense captions by the times of their events, not by their words."""

from __future__ import annotations

import re
from collections.abc import Sequence

from timeviper_platform.evaluation.scoring.spans import Span, parse_spans, temporal_iou

THRESHOLDS = (0.3, 0.5, 0.7, 0.9)
"""tIoU of ActivityNet's evaluation (Krishna et al. 2017)."""


def event_spans(text: str, duration_seconds: float | None = None) -> list[Span]:
    """Reads 'at 3 - 8 seconds, a man runs.' and 'From 3 to 8 seconds: ..', one event per line or sentence."""
    lines = re.split(r"\n|(?<=[.!?])\s+(?=(?:at|from|between)\b)", text, flags=re.IGNORECASE)
    return [spans[0] for line in lines if (spans := parse_spans(line, duration_seconds))]


def precision_recall(predicted: Sequence[Span], references: Sequence[Sequence[Span]]) -> tuple[float, float]:
    """Shares of predicted events that match a true one, and of true events that match a predicted one.
    Means over thresholds and reference sets.
    """
    precisions, recalls = [], []
    for true in references:
        for threshold in THRESHOLDS:
            covered = {
                (first, second)
                for first, one in enumerate(predicted)
                for second, other in enumerate(true)
                if temporal_iou(one, other) >= threshold
            }
            precisions.append(len({first for first, _ in covered}) / len(predicted) if predicted else 0.0)
            recalls.append(len({second for _, second in covered}) / len(true) if true else 0.0)
    if not precisions:
        return 0.0, 0.0
    return sum(precisions) / len(precisions), sum(recalls) / len(recalls)


def ordered_overlap(predicted: Sequence[Span], true: Sequence[Span]) -> float:
    """F1 of the largest total IoU over pairs in the order of both, as SODA matches events (Fujita et al. 2020)."""
    if not predicted or not true:
        return 0.0
    best = [0.0] * (len(true) + 1)
    for one in sorted(predicted):
        row = [0.0]
        for index, other in enumerate(sorted(true), start=1):
            row.append(max(best[index], row[-1], best[index - 1] + temporal_iou(one, other)))
        best = row
    precision, recall = best[-1] / len(predicted), best[-1] / len(true)
    return 2 * precision * recall / (precision + recall) if best[-1] else 0.0
