"""Moment retrieval with several windows: QVHighlights (Lei et al. 2021), as in its standalone evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from timeviper_platform.evaluation.scoring.spans import Span, temporal_iou

MAP_THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
MAX_WINDOWS = 10
LENGTHS = {"short": (0, 10), "middle": (10, 30), "long": (30, 150)}
"""Ranges (over, up to] of a window's length in seconds."""


def best_iou(predicted: Sequence[Span], true: Sequence[Span]) -> float:
    """IoU of the first predicted window with the true window that it overlaps most."""
    return max((temporal_iou(predicted[0], window) for window in true), default=0.0) if predicted else 0.0


def average_precision(predicted: Sequence[Span], true: Sequence[Span], threshold: float) -> float:
    """Interpolated average precision of windows in order, at most 10; each true window is matched once."""
    free = set(range(len(true)))
    hits = []
    for window in predicted[:MAX_WINDOWS]:
        overlaps = sorted(((temporal_iou(window, other), index) for index, other in enumerate(true)), reverse=True)
        match = next((index for iou, index in overlaps if iou >= threshold and index in free), None)
        hits.append(match is not None)
        free.discard(-1 if match is None else match)
    if not true or not hits:
        return 0.0
    right = np.cumsum(hits)
    precision = np.concatenate([[0.0], right / np.arange(1, len(hits) + 1), [0.0]])
    recall = np.concatenate([[0.0], right / len(true), [1.0]])
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    steps = np.flatnonzero(np.diff(recall)) + 1
    return float(np.sum((recall[steps] - recall[steps - 1]) * precision[steps]))


def mean_average_precision(predicted: Sequence[Span], true: Sequence[Span]) -> float:
    return float(np.mean([average_precision(predicted, true, threshold) for threshold in MAP_THRESHOLDS]))


def of_length(spans: Sequence[Span], length: str) -> list[Span]:
    low, high = LENGTHS[length]
    return [span for span in spans if low < span.end_seconds - span.start_seconds <= high]
