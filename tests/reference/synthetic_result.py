"""A synthetic task result: ten seconds of one worker, 6 + 3 + 1 by stage."""

from __future__ import annotations

from dataclasses import replace

from timeviper_platform.data.preprocess.tasks import TaskResult
from timeviper_platform.data.store.audit import Outcomes


def synthetic_result(**changes: object) -> TaskResult:
    result = TaskResult(
        task="t", num_frames=100, segments=Outcomes(planned=2, ok=2), error_types=[], media=[], reasons=[],
        messages=[], feature_bytes=0, decode_seconds=6.0, encode_seconds=3.0, write_seconds=1.0, started=0.0,
        ended=10.0, retries=0, decoder="a", encoder="a", worker="a", decode_cpu_seconds=6.0,
        encode_cpu_seconds=3.0, write_cpu_seconds=1.0,
    )  # fmt: skip
    return replace(result, **changes)  # type: ignore[arg-type]
