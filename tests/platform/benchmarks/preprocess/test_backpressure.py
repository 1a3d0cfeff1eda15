"""The `backpressure` row at toy size."""

from __future__ import annotations

import pytest
import ray

from timeviper_platform.benchmarks.preprocess.backpressure import RATIOS, backpressure_rows
from timeviper_platform.benchmarks.video.clips import ClipSpec
from timeviper_platform.data.preprocess.run import run_in_process


@pytest.mark.cluster
@pytest.mark.slow
def test_each_ratio_reaches_ray_data_in_turn(ray_address: str) -> None:
    seen = []

    def watched(*arguments: object, **keywords: object) -> object:
        seen.append(ray.data.DataContext.get_current().downstream_capacity_backpressure_ratio)
        return run_in_process(*arguments, **keywords)  # type: ignore[arg-type]

    clip = ClipSpec(seconds=2, width=64, height=36)
    (row,) = backpressure_rows(num_clips=2, clip=clip, repeats=2, run=watched)  # type: ignore[arg-type]
    assert seen[1:] == [*RATIOS, *RATIOS]
    assert row.value > 0
    assert ray.data.DataContext.get_current().downstream_capacity_backpressure_ratio == seen[0]
