"""The store suite at small sizes."""

from __future__ import annotations

import mmap
from collections.abc import Callable

import pytest

from timeviper_platform.benchmarks.measure import Cost, cost_here
from timeviper_platform.benchmarks.store import open_and_read as store_benchmark
from timeviper_platform.benchmarks.store import scale as scale_benchmark


def run(action: Callable[..., object], *arguments: object) -> Cost:
    """Runs the action in this process, with a fixed cost."""
    action(*arguments)
    return Cost(1.0, 1.0, 1_000_000)


@pytest.mark.slow
def test_every_group_finds_the_segments_and_media_it_wrote() -> None:
    assert [row.holds for row in scale_benchmark.finalize_rows(1000, run)] == [None, None, True, None, True]
    assert [row.holds for row in scale_benchmark.dry_run_rows(100, run)] == [True, True]
    assert [row.unit for row in scale_benchmark.upkeep_rows(80, run)] == 3 * ["s", "MB", "MB"]
    assert [row.holds for row in store_benchmark.opening_rows(3000, run)] == [True, None, True]


@pytest.mark.slow
def test_reading_has_rows_for_films_clips_and_bytes() -> None:
    films, clips, overhead = store_benchmark.reading_rows(2)
    assert films.value > 0 < clips.value
    assert 1 < overhead.value <= 1.01


def test_peak_memory_counts_memory_already_freed() -> None:
    def hold() -> None:  # new pages, not memory kept from earlier allocations
        with mmap.mmap(-1, 50_000_000) as memory:
            for page in range(0, len(memory), mmap.PAGESIZE):
                memory[page] = 1

    assert cost_here(hold).peak_bytes > 45_000_000
