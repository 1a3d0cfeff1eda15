"""Reference sampling: decodes every frame and keeps the last one with PTS <= t."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter


def sample_every_frame(path: Path, times: Sequence[Fraction], image_size: int) -> tuple[list[float], np.ndarray]:
    """PTS in seconds on the medium's clock, and pixels (F, S, S, 3), of the frames on screen at `times`."""
    scaler = VideoReformatter()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        time_base = Fraction(stream.time_base)
        start = Fraction(max(0, container.start_time or 0), av.time_base)
        frames = sorted(container.decode(stream), key=lambda frame: frame.pts)
        chosen = []
        for t in times:
            before = [frame for frame in frames if frame.pts * time_base - start <= t]
            chosen.append(before[-1] if before else frames[0])
        pixels = [
            scaler.reformat(
                f, image_size, image_size, "rgb24", interpolation=Interpolation.BICUBIC, threads=1
            ).to_ndarray()
            for f in chosen
        ]
    return [float(frame.pts * time_base - start) for frame in chosen], np.stack(pixels)
