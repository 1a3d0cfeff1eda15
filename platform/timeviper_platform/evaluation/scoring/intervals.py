"""95 % intervals of scores, by video: questions about one video are not independent."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np

Z_95 = 1.959964
"""Two-sided 95 % normal quantile."""

NUM_RESAMPLES = 2000
CHUNK_VALUES = 4_000_000
"""Weights drawn at once: 32 MB."""

Statistic = Callable[[np.ndarray], np.ndarray]
"""(R, Q) weights of questions to (R,) values; all weights 1 give the score itself."""


def mean_of(values: Sequence[float]) -> Statistic:
    scores = np.asarray(values, dtype=np.float64)
    return lambda weights_RQ: _ratio(weights_RQ @ scores, weights_RQ.sum(1))


def mean_of_means(values: Sequence[float], groups: Sequence[Hashable]) -> Statistic:
    """The unweighted mean of the groups' means, for M-Avg of MLVU and MVBench."""
    scores = np.asarray(values, dtype=np.float64)
    names = list(dict.fromkeys(groups))
    member_QG = np.array([[group == name for name in names] for group in groups], dtype=np.float64)

    def statistic(weights_RQ: np.ndarray) -> np.ndarray:
        means_RG = _ratio(weights_RQ @ (member_QG * scores[:, None]), weights_RQ @ member_QG)
        is_drawn = ~np.isnan(means_RG)
        return _ratio(np.where(is_drawn, means_RG, 0.0).sum(1), is_drawn.sum(1).astype(np.float64))

    return statistic


def value(statistic: Statistic, num_questions: int) -> float:
    return float(statistic(np.ones((1, num_questions)))[0])


def interval_by_video(
    statistic: Statistic, videos: Sequence[Hashable], *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> tuple[float, float]:
    """Returns the percentile bootstrap over videos (Efron and Tibshirani 1993, section 13.3).

    Args:
        statistic: of scores within 0 and 1.
        videos: the video of each question.

    Where all resamples agree, as with every answer right, the interval is Wilson's for as many trials as videos.
    """
    if not len(videos):
        raise ValueError("no interval without a question")
    numbers = {video: number for number, video in enumerate(dict.fromkeys(videos))}
    video_Q = np.array([numbers[video] for video in videos])
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK_VALUES // len(videos))
    found = []
    for first in range(0, num_resamples, step):
        count = min(step, num_resamples - first)
        drawn_RV = rng.multinomial(len(numbers), np.full(len(numbers), 1 / len(numbers)), size=count)
        found.append(statistic(drawn_RV[:, video_Q].astype(np.float64)))
    values = np.concatenate(found)
    low, high = (float(bound) for bound in np.nanpercentile(values, [2.5, 97.5]))
    if low == high:
        return wilson_interval(min(1.0, max(0.0, low)) * len(numbers), len(numbers))
    return low, high


def wilson_interval(num_right: float, num_questions: int) -> tuple[float, float]:
    """Returns Wilson's interval (1927, JASA 22:209) of independent questions."""
    if num_questions < 1:
        raise ValueError("no interval without a question")
    share = num_right / num_questions
    spread = Z_95**2 / num_questions
    centre = (share + spread / 2) / (1 + spread)
    half = Z_95 * math.sqrt(share * (1 - share) / num_questions + spread / (4 * num_questions)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator > 0)
