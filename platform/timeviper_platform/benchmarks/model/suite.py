"""Row groups of the `model` suite. Each group creates its models and frees them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from timeviper_platform.benchmarks.measure import Row
from timeviper_platform.benchmarks.model.engine import engine_rows
from timeviper_platform.benchmarks.model.generate import generate_rows
from timeviper_platform.benchmarks.model.prefill import prefill_rows
from timeviper_platform.benchmarks.model.prefix import prefix_rows
from timeviper_platform.benchmarks.model.scan import scan_rows
from timeviper_platform.benchmarks.model.token_decode import decode_rows


def on_one_thread(rows: Callable[[], list[Row]]) -> Callable[[], list[Row]]:
    """Runs a group of small steps on one torch thread.

    With two threads on a busy machine, products of eight rows took 10 to 50 times as long.
    """

    def measured() -> list[Row]:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return [replace(row, name=f"{row.name}, one thread") for row in rows()]
        finally:
            torch.set_num_threads(before)

    return measured


MODEL_GROUPS: dict[str, Callable[[], list[Row]]] = {
    "scan": scan_rows,
    "prefill": prefill_rows,
    "prefix": on_one_thread(prefix_rows),
    "decode": on_one_thread(decode_rows),
    "generate": on_one_thread(generate_rows),
    "engine": on_one_thread(engine_rows),
}
