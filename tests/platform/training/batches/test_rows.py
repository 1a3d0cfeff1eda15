"""sample_rows: a mixture too large to keep is mapped from one file of the machine, and reads as if it were kept."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pytest

from reference.training_corpus import sample_row, write_samples
from timeviper_platform.common import storage
from timeviper_platform.training.batches import rows as sample_rows
from timeviper_platform.training.batches.rows import SampleRows, SourceConfig


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where mapped files lie, when nothing is kept in memory."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sample_rows, "MAX_KEPT_BYTES", 0)
    monkeypatch.setattr(sample_rows, "ROWS_PER_BATCH", 5)
    return tmp_path / f"timeviper-samples-{os.getuid()}"


@pytest.fixture
def sources(tmp_path: Path) -> list[SourceConfig]:
    """24 rows, twice."""
    uri = tmp_path / "samples.parquet"
    write_samples(uri, [sample_row(n, [], [("user", f"{n}?"), ("assistant", f"{n}!" * 99)]) for n in range(24)])
    return [SourceConfig(uri=str(uri), weight=0.5), SourceConfig(uri=str(uri), weight=2.0)]


def test_mapped_rows_are_those_that_would_be_kept(
    sources: list[SourceConfig], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped = SampleRows.read(sources)
    monkeypatch.setattr(sample_rows, "MAX_KEPT_BYTES", 1 << 20)
    kept = SampleRows.read(sources)
    assert len(mapped) == len(kept) == 48
    assert mapped.block(0, 48) == kept.block(0, 48)
    assert mapped[30] == kept[30]
    assert mapped.digest == kept.digest
    assert mapped.weights.tolist() == kept.weights.tolist() == [0.5] * 24 + [2.0] * 24
    assert [path.suffix for path in sorted(folder.iterdir())] == [".arrow", ""]


def test_one_process_writes_and_the_others_map(
    sources: list[SourceConfig], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SampleRows.read(sources)
    (file,) = folder.glob("*.arrow")
    monkeypatch.setattr(sample_rows, "_write_mapped", lambda *_: pytest.fail("written twice"))
    before = pa.total_allocated_bytes()
    rows = SampleRows.read(sources)
    assert pa.total_allocated_bytes() - before < file.stat().st_size / 4
    file.unlink()
    assert rows[47]["sample_id"]  # who has it mapped keeps it


def test_what_a_killed_writer_left_and_what_is_old_is_no_trouble(sources: list[SourceConfig], folder: Path) -> None:
    SampleRows.read(sources)
    (file,) = folder.glob("*.arrow")
    file.with_suffix(".partial").write_bytes(b"half a f")
    old = folder / "old.arrow"
    old.write_bytes(b"")
    os.utime(old, (0, time.time() - sample_rows.KEPT_SECONDS - 60))
    file.unlink()
    assert len(SampleRows.read(sources)) == 48
    assert sorted(path.name for path in folder.iterdir()) == [file.name, "lock"]


def test_a_file_that_changes_meanwhile_is_an_error(
    sources: list[SourceConfig], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_samples(tmp_path / "other.parquet", [sample_row(0, [], [("user", "?"), ("assistant", "!")])])
    read, num_reads = storage.read_bytes, 0

    def changing(uri: str) -> bytes:
        nonlocal num_reads
        num_reads += 1
        return read(uri if num_reads < 4 else str(tmp_path / "other.parquet"))

    monkeypatch.setattr(storage, "read_bytes", changing)
    with pytest.raises(RuntimeError, match=r"samples\.parquet.*has changed while it was read"):
        SampleRows.read(sources)
    assert [path.name for path in folder.iterdir()] == ["lock"]
    num_reads = -99
    assert len(SampleRows.read(sources)) == 48
