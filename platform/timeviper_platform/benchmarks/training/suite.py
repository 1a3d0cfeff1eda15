"""Row groups of the `training` suite."""

from __future__ import annotations

from collections.abc import Callable

from timeviper_platform.benchmarks.measure import Row
from timeviper_platform.benchmarks.training.packing import packing_rows
from timeviper_platform.benchmarks.training.recovery import recovery_rows
from timeviper_platform.benchmarks.training.stalls import checkpoint_rows, data_rows
from timeviper_platform.benchmarks.training.step import step_rows

TRAINING_GROUPS: dict[str, Callable[[], list[Row]]] = {
    "packing": packing_rows,
    "step": step_rows,
    "checkpoint": checkpoint_rows,
    "data": data_rows,
    "recovery": recovery_rows,
}
