"""The row groups of the `model` suite, by their keys; each makes its own models, which are gone behind it."""

from __future__ import annotations

from collections.abc import Callable

from timeviper_platform.measure import Row
from timeviper_platform.model_benchmark.decode import decode_rows
from timeviper_platform.model_benchmark.generate import generate_rows
from timeviper_platform.model_benchmark.prefill import prefill_rows
from timeviper_platform.model_benchmark.prefix import prefix_rows
from timeviper_platform.model_benchmark.scan import scan_rows

MODEL_GROUPS: dict[str, Callable[[], list[Row]]] = {
    "scan": scan_rows,
    "prefill": prefill_rows,
    "prefix": prefix_rows,
    "decode": decode_rows,
    "generate": generate_rows,
}
