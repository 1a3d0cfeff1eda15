"""Row group `backpressure`: whether split mode is faster when more decoded frames may wait for the encoder."""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path

from timeviper_platform.benchmarks.measure import Row
from timeviper_platform.benchmarks.preprocess.share_of_ideal import executions, link, make_tiny_encoder, media_rate
from timeviper_platform.benchmarks.video.clips import ClipSpec, make_clip
from timeviper_platform.common.ray_cluster import connect
from timeviper_platform.data.preprocess.ray_graph import run_on_ray
from timeviper_platform.data.preprocess.run import Runner

COMMAND = "python jobs/benchmark.py preprocess --only backpressure"
RATIOS = (2.0, 10.0)
"""Ray Data's `downstream_capacity_backpressure_ratio`: the default, and that of older versions."""
CLIP = ClipSpec(seconds=24)


def backpressure_rows(
    film: Path | None = None,
    *,
    num_clips: int = 128,
    clip: ClipSpec = CLIP,
    repeats: int = 5,
    run: Runner = run_on_ray,
) -> list[Row]:
    """Frames per second of split mode with each of RATIOS, in turn, after an unmeasured run."""
    import ray

    rates: dict[float, list[float]] = {ratio: [] for ratio in RATIOS}
    execution = executions(os.cpu_count() or 1)["split"]
    with tempfile.TemporaryDirectory(prefix="tv-benchmark-") as folder, connect():
        root = Path(folder)
        encoder = make_tiny_encoder(root / "encoder")
        make_clip(root / "clip.mp4", clip)
        (root / "clips").mkdir()
        link(root / "clip.mp4", root / "clips", num_clips)
        context = ray.data.DataContext.get_current().copy()
        with ray.data.DataContext.current(context):
            media_rate(root, root / "clips", encoder, execution, run)
            for _ in range(repeats):
                for ratio in RATIOS:
                    context.downstream_capacity_backpressure_ratio = ratio
                    found = media_rate(root, root / "clips", encoder, execution, run)
                    rates[ratio].append(found.frames_per_second / (1.0 - found.stolen))
    low, high = (statistics.median(rates[ratio]) for ratio in RATIOS)
    noise = (max(rates[RATIOS[0]]) - min(rates[RATIOS[0]])) / low
    text = f"split mode's rate with downstream_capacity_backpressure_ratio {RATIOS[1]:g} over {RATIOS[0]:g}"
    return [Row(name=f"{text} ({num_clips} clips; noise {noise:.0%})", value=high / low, unit="x", command=COMMAND)]
