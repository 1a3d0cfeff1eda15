"""Mixtures too large for memory are mapped from one file."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pytest

from reference.training_corpus import sample_row, write_samples
from timeviper_platform.common import storage
from timeviper_platform.common.machine_cache import MAX_UNUSED_SECONDS
from timeviper_platform.training.batches.rows import SampleRows, SourceConfig


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The machine's folder of mapped files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"timeviper-samples-{os.getuid()}"


@pytest.fixture
def sources(tmp_path: Path) -> list[SourceConfig]:
    """24 rows, twice."""
    uri = tmp_path / "samples.parquet"
    write_samples(uri, [sample_row(n, [], [("user", f"{n}?"), ("assistant", f"{n}!" * 99)]) for n in range(24)])
    return [SourceConfig(uri=str(uri), weight=0.5), SourceConfig(uri=str(uri), weight=2.0)]


def read_mapped(sources: list[SourceConfig]) -> SampleRows:
    return SampleRows.read(sources, max_in_memory_bytes=0)


def test_mapped_rows_equal_rows_in_memory(sources: list[SourceConfig], folder: Path) -> None:
    mapped, loaded = read_mapped(sources), SampleRows.read(sources)
    assert len(mapped) == len(loaded) == 48
    assert mapped.block(0, 48) == loaded.block(0, 48)
    assert mapped[30] == loaded[30]
    assert mapped.digest == loaded.digest
    assert mapped.weights.tolist() == loaded.weights.tolist() == [0.5] * 24 + [2.0] * 24
    assert [path.suffix for path in sorted(folder.iterdir())] == [".arrow", ".lock", ""]


def test_one_process_writes_and_the_others_map(sources: list[SourceConfig], folder: Path) -> None:
    read_mapped(sources)
    (file,) = folder.glob("*.arrow")
    inode = file.stat().st_ino
    before = pa.total_allocated_bytes()
    rows = read_mapped(sources)
    assert file.stat().st_ino == inode  # not written again
    assert pa.total_allocated_bytes() - before < file.stat().st_size / 4
    file.unlink()
    assert rows[47]["sample_id"]  # a mapped file stays readable


def test_leftovers_of_a_killed_writer_and_old_files_are_replaced(sources: list[SourceConfig], folder: Path) -> None:
    read_mapped(sources)
    (file,) = folder.glob("*.arrow")
    file.with_suffix(".partial").write_bytes(b"half a f")
    old = folder / "old.arrow"
    old.write_bytes(b"")
    os.utime(old, (0, time.time() - MAX_UNUSED_SECONDS - 60))
    file.unlink()
    assert len(read_mapped(sources)) == 48
    assert sorted(path.name for path in folder.iterdir()) == [file.name, f"{file.name}.lock", "lock"]


def test_a_file_that_changes_while_it_is_read_is_an_error(
    sources: list[SourceConfig], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_samples(tmp_path / "other.parquet", [sample_row(0, [], [("user", "?"), ("assistant", "!")])])
    read, num_reads = storage.read_bytes, 0

    def changing(uri: str) -> bytes:
        nonlocal num_reads
        num_reads += 1
        return read(uri if num_reads < 4 else str(tmp_path / "other.parquet"))

    monkeypatch.setattr(storage, "read_bytes", changing)
    with pytest.raises(RuntimeError, match=r"samples\.parquet.*changed while it was read"):
        read_mapped(sources)
    assert [path.name for path in folder.iterdir() if path.suffix != ".lock"] == ["lock"]
    num_reads = -99
    assert len(read_mapped(sources)) == 48
