"""Rows that do not fit in memory, sorted and read side by side."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from timeviper_platform.data.store.sorted_runs import SortedRuns, merge_runs

ROWS = pa.schema([pa.field("key", pa.string()), pa.field("number", pa.int64())])
KEYS = st.lists(st.sampled_from(["", "a", "aa", "b", "é", "z", "\U0001f600"]), max_size=30)


def sorted_runs(folder: Path, keys: list[str], *, run_bytes: int, batch_rows: int, table_rows: int = 3) -> SortedRuns:
    runs = SortedRuns(folder, ROWS, "key")
    runs.run_bytes, runs.batch_rows = run_bytes, batch_rows
    for start in range(0, len(keys), table_rows):
        page = keys[start : start + table_rows]
        runs.add(pa.table({"key": page, "number": list(range(start, start + len(page)))}, schema=ROWS))
    return runs


@settings(max_examples=40)
@given(left=KEYS, right=KEYS, run_bytes=st.sampled_from([1, 200, 1 << 20]), batch_rows=st.sampled_from([1, 2, 64]))
def test_blocks_are_the_sorted_rows_with_each_key_in_one_block(
    left: list[str], right: list[str], run_bytes: int, batch_rows: int
) -> None:
    with TemporaryDirectory() as folder:
        kinds = [
            sorted_runs(Path(folder, name), keys, run_bytes=run_bytes, batch_rows=batch_rows)
            for name, keys in (("l", left), ("r", right))
        ]
        blocks = list(merge_runs(kinds, "key"))
    for place, keys in enumerate((left, right)):
        found = [(row["key"], row["number"]) for block in blocks for row in block[place].to_pylist()]
        expected = sorted(((key, number) for number, key in enumerate(keys)), key=lambda row: row[0].encode())
        assert found == expected
    of_blocks = [{row["key"] for table in block for row in table.to_pylist()} for block in blocks]
    assert sum(len(keys) for keys in of_blocks) == len(set(left) | set(right))


def test_a_block_is_a_small_part_of_many_rows(tmp_path: Path) -> None:
    keys = [f"{number * 7919 % 5000:05d}" for number in range(5000)]
    runs = sorted_runs(tmp_path / "runs", keys, run_bytes=20_000, batch_rows=16, table_rows=100)
    sizes = [table.num_rows for (table,) in merge_runs([runs], "key")]
    assert len(list((tmp_path / "runs").iterdir())) > 3
    assert (sum(sizes), max(sizes) <= 200) == (5000, True)
