"""A machine's processes share one download of remote files."""

from __future__ import annotations

import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from reference.counted_files import LOG_VARIABLE, CountedFileSystem, reads
from timeviper_platform.common import machine_cache
from timeviper_platform.common.machine_cache import MAX_UNUSED_SECONDS, local_copy


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files, as counted:// remote; the cache and the log of reads lie beside it."""
    folder = tmp_path / "remote"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "cache"))
    monkeypatch.setenv(LOG_VARIABLE, str(tmp_path / "log"))
    return folder


def test_local_paths_and_names_on_a_hub_stay(tmp_path: Path) -> None:
    for name in (str(tmp_path), "nvidia/NVIDIA-Nemotron-Nano-9B-v2", "relative/folder"):
        assert local_copy(name) == name
    assert local_copy(f"file://{tmp_path}") == str(tmp_path)


def test_callers_share_one_download_until_a_file_changes(remote: Path, tmp_path: Path) -> None:
    uri = f"counted://{remote}"
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(local_copy, [uri] * 4))
    (folder,) = folders
    assert sorted(path.name for path in Path(folder).iterdir()) == ["config.json", "model.safetensors"]
    assert (Path(folder) / "model.safetensors").read_bytes() == b"weights" * 1000
    assert len(reads(tmp_path / "log")) == 2
    (remote / "config.json").write_text('{"a": 1}')
    changed = local_copy(uri)
    assert changed != folder
    assert (Path(changed) / "config.json").read_text() == '{"a": 1}'


def test_only_files_of_the_patterns_are_fetched(remote: Path, tmp_path: Path) -> None:
    folder = local_copy(f"counted://{remote}", ("config.json",))
    assert [path.name for path in Path(folder).iterdir()] == ["config.json"]
    assert reads(tmp_path / "log") == [(str(remote / "config.json"), 2)]
    with pytest.raises(ValueError, match=r"there is no \*\.model or \*\.txt in counted://.*name a folder"):
        local_copy(f"counted://{remote}", ("*.model", "*.txt"))


def test_a_folder_in_an_object_store_is_fetched(s3_bucket: object, remote: Path) -> None:
    s3_bucket.put(str(remote), "bucket/weights", recursive=True)  # type: ignore[attr-defined]
    folder = local_copy("s3://bucket/weights")
    assert (Path(folder) / "model.safetensors").read_bytes() == b"weights" * 1000
    with pytest.raises(ValueError, match=r"there is no \* in s3://bucket/none"):
        local_copy("s3://bucket/none")


def test_a_download_that_does_not_fit_is_refused_before_it_starts(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(RuntimeError, match=r"the download of counted://.* needs 0.0 GB, and .* set TMPDIR to a larger"):
        local_copy(f"counted://{remote}")
    assert reads(tmp_path / "log") == []


def test_an_interrupted_download_leaves_nothing_and_starts_again(remote: Path, tmp_path: Path) -> None:
    def broken(self: CountedFileSystem, path1: str, path2: str, **options: object) -> None:
        Path(path2).write_bytes(b"wei")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CountedFileSystem, "get_file", broken)
        with pytest.raises(RuntimeError, match=r"has 3 bytes, and had \d"):
            local_copy(f"counted://{remote}")
    (cache,) = (tmp_path / "cache").iterdir()
    assert {path.suffix for path in cache.iterdir()} <= {".lock", ""}
    assert not [path for path in cache.iterdir() if path.is_dir()]
    assert (Path(local_copy(f"counted://{remote}")) / "model.safetensors").stat().st_size == 7000


def test_copies_that_nobody_used_for_a_week_are_removed(remote: Path) -> None:
    old = Path(local_copy(f"counted://{remote}", ("config.json",)))
    used = Path(local_copy(f"counted://{remote}", ("model.safetensors",)))
    past = time.time() - MAX_UNUSED_SECONDS - 60
    os.utime(old, (past, past))
    os.utime(used, (past, past))
    local_copy(f"counted://{remote}", ("model.safetensors",))
    local_copy(f"counted://{remote}")
    assert used.exists()
    assert not old.exists()


def test_a_file_that_another_process_renames_meanwhile_is_passed_over(remote: Path) -> None:
    folder = Path(local_copy(f"counted://{remote}", ("config.json",)))
    (folder.parent / "gone.partial").symlink_to("renamed")  # listed, but no longer there
    assert local_copy(f"counted://{remote}")
