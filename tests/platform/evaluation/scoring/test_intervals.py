from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from timeviper_platform.evaluation.scoring.intervals import (
    interval_by_video,
    mean_of,
    mean_of_means,
    value,
    wilson_interval,
)


def test_wilson_interval_of_worked_examples() -> None:
    # the bounds solve (p - share)^2 = z^2 p (1 - p) / n: checked against that equation rather than the closed form
    for right, number in ((396, 440), (110, 440), (0, 20), (20, 20)):
        for bound in wilson_interval(right, number):
            share = right / number
            assert (bound - share) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / number, abs=1e-9)
    low, high = wilson_interval(396, 440)
    assert low < 0.9 < high
    assert wilson_interval(0, 20)[0] == 0
    with pytest.raises(ValueError, match="no interval"):
        wilson_interval(0, 0)


@given(st.integers(1, 2000), st.floats(0, 1))
def test_wilson_interval_holds_the_share_and_stays_in_range(number: int, part: float) -> None:
    right = math.floor(part * number)
    low, high = wilson_interval(right, number)
    assert 0 <= low <= right / number + 1e-12
    assert right / number - 1e-12 <= high <= 1


def test_questions_about_one_video_count_as_one() -> None:
    """Three questions a video that are all right or all wrong say no more than one; Wilson's interval is too narrow."""
    right_by_video = [float(n % 3 > 0) for n in range(90)]
    one = interval_by_video(mean_of(right_by_video), list(range(90)))
    three = interval_by_video(mean_of(right_by_video * 3), list(range(90)) * 3)
    assert three == pytest.approx(one, abs=0.02)
    independent = interval_by_video(mean_of(right_by_video * 3), list(range(270)))
    assert three[1] - three[0] > 1.5 * (independent[1] - independent[0])
    # a video's deviation from the mean has sqrt(2 / 9 / 90): the standard error of the bootstrap
    assert (one[1] - one[0]) / 2 == pytest.approx(1.96 * math.sqrt(2 / 9 / 90), rel=0.1)


def test_an_interval_repeats_and_is_never_of_width_0() -> None:
    assert interval_by_video(mean_of([1, 0, 1, 1]), "aabc") == interval_by_video(mean_of([1, 0, 1, 1]), "aabc")
    low, high = interval_by_video(mean_of([1.0] * 30), [n // 3 for n in range(30)])
    assert (low, high) == pytest.approx(wilson_interval(10, 10))
    with pytest.raises(ValueError, match="no interval"):
        interval_by_video(mean_of([]), [])


def test_a_mean_of_means_weighs_tasks_alike() -> None:
    statistic = mean_of_means([1, 1, 1, 0], ["a", "a", "a", "b"])
    assert value(statistic, 4) == 0.5
    assert value(mean_of([1, 1, 1, 0]), 4) == 0.75
    # a resample without a task leaves it out
    assert statistic(np.array([[1, 0, 0, 0]]))[0] == 1.0
