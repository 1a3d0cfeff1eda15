"""The store suite at small sizes: it measures what it says."""

from __future__ import annotations

import mmap

import pytest

from timeviper_platform.benchmarks.measure import Cost, cost_here
from timeviper_platform.benchmarks.store import open_and_read as store_benchmark
from timeviper_platform.benchmarks.store import scale as scale_benchmark


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (scale_benchmark, store_benchmark):
        monkeypatch.setattr(module, "cost_elsewhere", lambda action, *arguments: run(action, *arguments))


def run(action, *arguments) -> Cost:
    action(*arguments)
    return Cost(1.0, 1.0, 1_000_000)


def test_what_was_made_is_found_again() -> None:
    assert [row.holds for row in scale_benchmark.finalize_rows(1000)] == [None, None, True, None, True]
    assert [row.holds for row in scale_benchmark.dry_run_rows(100)] == [True, True]
    assert [row.unit for row in scale_benchmark.upkeep_rows(80)] == 3 * ["s", "MB", "MB"]
    assert [row.holds for row in store_benchmark.opening_rows(3000)] == [True, None, True]


def test_reading_measures_films_and_stretches_and_bytes() -> None:
    films, stretches, overhead = store_benchmark.reading_rows(2)
    assert films.value > 0 < stretches.value
    assert 1 < overhead.value <= 1.01


def test_memory_that_was_held_at_once_is_counted_even_when_it_is_gone() -> None:
    def hold() -> None:  # of the system, not of what this process has kept from earlier allocations
        with mmap.mmap(-1, 50_000_000) as memory:
            for page in range(0, len(memory), mmap.PAGESIZE):
                memory[page] = 1

    assert cost_here(hold).peak_bytes > 45_000_000
