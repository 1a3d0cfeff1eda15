from __future__ import annotations

import errno
from functools import partial
from pathlib import Path
from typing import IO

import pytest

from timeviper_platform.common import storage


def test_json_round_trip_and_listing(tmp_path: Path) -> None:
    root = str(tmp_path)
    storage.write_json(storage.join_uri(root, "a", "b.json"), {"x": 1})
    storage.write_bytes(storage.join_uri(root, "a", "a.bin"), b"12")
    assert storage.read_json(f"{root}/a/b.json") == {"x": 1}
    assert storage.files_in(f"{root}/a") == [f"{root}/a/a.bin", f"{root}/a/b.json"]
    assert storage.files_in(f"{root}/a", ".json") == [f"{root}/a/b.json"]
    assert storage.files_in(f"{root}/missing") == []


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    uri = str(tmp_path / "data.bin")
    storage.write_bytes(uri, b"old")

    def fail_half_way(file: IO[bytes]) -> None:
        file.write(b"new but")
        raise KeyError("stop")

    with pytest.raises(KeyError):
        storage.write_atomic(uri, fail_half_way)
    assert storage.read_bytes(uri) == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["data.bin"]


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file where a folder should be")
    with pytest.raises(RuntimeError, match=r"cannot write .*file/out"):
        storage.ensure_writable(str(tmp_path / "file" / "out"))


def test_ensure_writable_leaves_no_trace(tmp_path: Path) -> None:
    storage.ensure_writable(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://me:secret@a.invalid/x.mp4?token=secret#secret", "https://a.invalid/x.mp4"),
        ("HTTPS://a.invalid?token=a/secret", "HTTPS://a.invalid"),
        ("sftp://me:secret@host/x@y?.mp4", "sftp://host/x@y?.mp4"),
        ("s3://bucket/a?b/x@y#1.mp4", "s3://bucket/a?b/x@y#1.mp4"),
        ("/videos/what? me@home.mp4", "/videos/what? me@home.mp4"),
        ("/videos/caf\udce9.mp4", "/videos/caf\\udce9.mp4"),
    ],
)
def test_shown_uris_hold_no_secrets(uri: str, shown: str) -> None:
    assert storage.shown_uri(uri) == shown


def test_a_permanent_error_is_not_retried() -> None:
    attempts = []

    def fail(error: Exception) -> None:
        attempts.append(error)
        raise error

    for error in (FileNotFoundError(errno.EIO, "HTTP 404"), PermissionError(errno.EIO, "HTTP 403")):
        with pytest.raises(type(error)):
            storage.retrying(partial(fail, error), "x")
    assert len(attempts) == 2


def test_nested_retries_are_not_multiplied(caplog: pytest.LogCaptureFixture) -> None:
    retrying = partial(storage.retrying, first_wait_s=0.0)
    caplog.set_level("INFO")
    attempts = []

    def fail() -> None:
        attempts.append(1)
        raise ConnectionResetError("gone")

    url = "https://a.invalid/x?token=secret"
    with pytest.raises(storage.StorageUnavailableError, match=r"https://a.invalid/x: gone \(tried") as caught:
        retrying(lambda: retrying(fail, url), url)
    assert len(attempts) == storage.MAX_ATTEMPTS
    assert "secret" not in caplog.text + str(caught.value)


def test_the_memory_filesystem_behaves_like_a_disk() -> None:
    storage.write_json("memory://bucket/a/x.json", [1])
    assert storage.exists("memory://bucket/a/x.json")
    assert storage.files_in("memory://bucket/a") == ["memory://bucket/a/x.json"]
    assert not storage.is_local("memory://bucket/a")
    storage.remove("memory://bucket/a")
    assert not storage.exists("memory://bucket/a/x.json")
