from __future__ import annotations

import errno
import itertools
import os
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO

import pytest
import s3fs

from reference.faulty_s3 import Faults, s3_server
from reference.hiccups import HiccupFileSystem
from timeviper_platform.common import storage
from timeviper_platform.common.listing import list_files


def test_json_round_trip_and_listing(tmp_path: Path) -> None:
    root = str(tmp_path)
    storage.write_json(storage.join_uri(root, "a", "b.json"), {"x": 1})
    storage.write_bytes(storage.join_uri(root, "a", "a.bin"), b"12")
    assert storage.read_json(f"{root}/a/b.json") == {"x": 1}
    assert storage.files_in(f"{root}/a") == [f"{root}/a/a.bin", f"{root}/a/b.json"]
    assert storage.files_in(f"{root}/a", ".json") == [f"{root}/a/b.json"]
    assert storage.files_in(f"{root}/missing") == []


def test_a_report_has_no_passwords(tmp_path: Path) -> None:
    storage.write_report(f"{tmp_path}/report.json", {"store": "sftp://wilma:secret@nas/b", "at": "10:20:30", "é": 1})
    assert storage.read_json(f"{tmp_path}/report.json") == {"store": "sftp://nas/b", "at": "10:20:30", "é": 1}


@pytest.mark.parametrize(
    "ask", [storage.exists, storage.is_folder, storage.files_in, storage.folders_in, storage.remove]
)
def test_an_error_of_the_storage_is_not_an_absent_file(
    ask: Callable[[str], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsspec's default `exists` and `isdir`, and os.path's, answer False."""
    monkeypatch.setenv(storage.FIRST_WAIT_VARIABLE, "0")
    monkeypatch.setattr(HiccupFileSystem, "broken", {"/commits"})
    (tmp_path / "commits").mkdir()
    with pytest.raises(storage.StorageUnavailableError, match=r"hiccup://.*/commits.*hiccups.*is the storage up"):
        ask(f"hiccup://{tmp_path}/commits")
    stat = os.stat

    def stale(path: object, *arguments: object, **options: object) -> os.stat_result:
        if str(path).endswith("/commits"):
            raise OSError(errno.ESTALE, "Stale file handle", path)
        return stat(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", stale)
    with pytest.raises(storage.StorageUnavailableError, match=r"/commits.*Stale file handle"):
        ask(str(tmp_path / "commits"))


def test_absent_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nothing")
    for root in (str(tmp_path), f"hiccup://{tmp_path}"):
        for name in ("missing", "file/below", "n" * 300, "dangling", "loop", "zero\0byte"):
            assert not storage.exists(f"{root}/{name}")
            assert not storage.is_folder(f"{root}/{name}")
        assert storage.exists(f"{root}/file")
        assert not storage.is_folder(f"{root}/file")
        assert storage.is_folder(root)
        assert storage.files_in(f"{root}/file") == storage.files_in(f"{root}/missing") == []


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


ODD_NAMES = (
    *("a::b.mp4", "a::s3://b.mp4", "c://d.mp4", "e//f.mp4", "50% #1?.mp4", "%20+&=.mp4", "[1]*.mp4", "{a,b}.mp4"),
    *("\u00e9.mp4", "e\u0301.mp4", " g .mp4", "h\\i.mp4", "~.mp4", "\t.mp4", "$(id)'`.mp4", "x" * 900),
)


def test_any_name_of_an_object_is_listed_and_read(s3_bucket: s3fs.S3FileSystem) -> None:
    """fsspec reads `::` as a file system over another."""
    for name in ODD_NAMES:
        s3_bucket.pipe_file(f"bucket/odd/{name}", name.encode())
    uris = {file.uri for file in list_files("s3://bucket/odd").files}
    assert uris == {f"s3://bucket/odd/{name}" for name in ODD_NAMES}
    assert {storage.read_bytes(uri).decode() for uri in uris} == set(ODD_NAMES)
    assert all(storage.exists(uri) and not storage.is_folder(uri) for uri in uris)


def test_an_archive_or_cache_over_another_file_system_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("b.txt", "in a zip")
    storage.write_bytes("memory://chains/a.zip", (tmp_path / "a.zip").read_bytes())
    for source in ("memory://chains/a.zip", str(tmp_path / "a.zip"), "simplecache::memory://chains/a.zip"):
        assert storage.read_bytes(f"zip://b.txt::{source}") == b"in a zip"
        assert storage.read_bytes(f"simplecache::zip://b.txt::{source}") == b"in a zip"


@pytest.fixture
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Faults, Path]]:
    """An S3 server that takes the key `new` alone, and the credentials file of its clients, which holds `old`."""
    with s3_server() as (url, faults):
        file = tmp_path / "credentials"
        file.write_text("[default]\naws_access_key_id = new\naws_secret_access_key = secret\n")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in (
            ("AWS_ENDPOINT_URL", url),
            ("AWS_SHARED_CREDENTIALS_FILE", str(file)),
            ("AWS_DEFAULT_REGION", "us-east-1"),
            ("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required"),
            ("AWS_EC2_METADATA_DISABLED", "true"),
        ):
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")
        storage.write_bytes("s3://bucket/a", b"1")
        s3fs.S3FileSystem.clear_instance_cache()
        faults.expired_keys.add("old")
        file.write_text(file.read_text().replace("new", "old"))
        yield faults, file
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    "act",
    [
        lambda: storage.read_bytes("s3://bucket/a"),
        lambda: storage.exists("s3://bucket/a"),
        lambda: storage.write_bytes("s3://bucket/b", b"2"),
        lambda: storage.open_file("s3://bucket/a").read(),
    ],
    ids=["read", "exists", "write", "open"],
)
def test_expired_credentials_are_read_again_from_their_file(
    profile: tuple[Faults, Path], act: Callable[[], object]
) -> None:
    _, file = profile
    with pytest.raises((OSError, RuntimeError), match="credentials that may use it and have not expired") as refused:
        act()
    assert "\n" not in str(refused.value)
    assert "s3://bucket/" in str(refused.value)
    file.write_text(file.read_text().replace("old", "new"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "REFRESH_S", 0.0)
        assert act() in (b"1", True, None)


def test_a_forbidden_path_reads_the_credentials_again_only_once(profile: tuple[Faults, Path]) -> None:
    faults, file = profile
    file.write_text(file.read_text().replace("old", "new"))
    faults.answers["secret"] = "403 Forbidden"
    for _ in range(3):
        with pytest.raises(PermissionError, match=r"s3://bucket/secret: .*credentials that may use it"):
            storage.read_bytes("s3://bucket/secret")
    assert sum(path.endswith("/secret") for _, path, _ in faults.requests) == 4


def test_a_folder_that_another_process_makes_while_it_is_listed_is_listed(
    s3_bucket: s3fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3 has no folders: one appears with its first object."""
    filesystem, _ = storage.split_uri("s3://bucket/metrics")
    ls, num_calls = filesystem.ls, itertools.count()

    def ls_before_a_write(*arguments: object, **options: object) -> object:
        try:
            return ls(*arguments, **options)
        except FileNotFoundError:
            if next(num_calls) == 0:
                s3_bucket.pipe("bucket/metrics/a.jsonl", b"{}")
            raise

    monkeypatch.setattr(filesystem, "ls", ls_before_a_write)
    assert storage.files_in("s3://bucket/metrics") == ["s3://bucket/metrics/a.jsonl"]
    assert storage.files_in("s3://bucket/none") == []


def test_a_remote_folder_that_cannot_be_listed_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsspec's `walk` leaves it out."""
    monkeypatch.setenv(storage.FIRST_WAIT_VARIABLE, "0")
    for name in ("a/1.mp4", "b/2.mp4"):
        storage.write_bytes(f"{tmp_path}/{name}", b"")
    uri = f"hiccup://{tmp_path}"
    assert [Path(file.uri).name for file in list_files(uri).files] == ["1.mp4", "2.mp4"]
    monkeypatch.setattr(HiccupFileSystem, "broken", {"/b"})
    with pytest.raises(OSError, match="hiccups"):
        list(list_files(uri).files)
