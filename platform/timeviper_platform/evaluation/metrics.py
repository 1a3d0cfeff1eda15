"""Temporal IoU and 95 % intervals of scores."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

Z_95 = 1.959964
"""Two-sided 95 % normal quantile."""

_INTERVAL = re.compile(r"from\s+(\d+(?:\.\d+)?)\s*(?:s|seconds?)?\s+to\s+(\d+(?:\.\d+)?)", re.IGNORECASE)


class Span(NamedTuple):
    start_seconds: float
    end_seconds: float


def parse_span(text: str) -> Span | None:
    """Parses the first 'From A to B seconds'; returns None without one, or when A > B."""
    match = _INTERVAL.search(text)
    if match is None:
        return None
    span = Span(float(match[1]), float(match[2]))
    return span if span.end_seconds >= span.start_seconds else None


def temporal_iou(first: Span, second: Span) -> float:
    shared = min(first.end_seconds, second.end_seconds) - max(first.start_seconds, second.start_seconds)
    covered = max(first.end_seconds, second.end_seconds) - min(first.start_seconds, second.start_seconds)
    return max(0.0, shared) / covered if covered > 0 else 0.0


def wilson_interval(num_right: int, num_questions: int) -> tuple[float, float]:
    """Returns Wilson's interval (1927, JASA 22:209)."""
    if num_questions < 1:
        raise ValueError("no interval without a question")
    share = num_right / num_questions
    spread = Z_95**2 / num_questions
    centre = (share + spread / 2) / (1 + spread)
    half = Z_95 * math.sqrt(share * (1 - share) / num_questions + spread / (4 * num_questions)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Uses the normal approximation."""
    if not values:
        raise ValueError("no interval without a value")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, mean
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = Z_95 * math.sqrt(variance / len(values))
    return mean - half, mean + half
