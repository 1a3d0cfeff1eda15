"""Row groups of the `serving` suite."""

from __future__ import annotations

from collections.abc import Callable

from timeviper_platform.benchmarks.measure import Row
from timeviper_platform.benchmarks.serving.edge import edge_rows
from timeviper_platform.benchmarks.serving.failures import disconnect_rows, kill_rows
from timeviper_platform.benchmarks.serving.film import film_rows
from timeviper_platform.benchmarks.serving.first_token import first_rows, second_rows
from timeviper_platform.benchmarks.serving.overload import overload_rows
from timeviper_platform.benchmarks.serving.throughput import haproxy_rows, throughput_rows

SERVING_GROUPS: dict[str, Callable[[], list[Row]]] = {
    "throughput": throughput_rows,
    "haproxy": haproxy_rows,
    "edge": edge_rows,
    "first": first_rows,
    "second": second_rows,
    "disconnect": disconnect_rows,
    "kill": kill_rows,
    "overload": overload_rows,
    "film": film_rows,
}
