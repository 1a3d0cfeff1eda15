"""The same job with input and feature store on an S3 server on loopback."""

from __future__ import annotations

import os
import random
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest
import s3fs
import torch

from reference.faulty_s3 import Faults
from reference.killable import kill_after, start
from reference.synthetic_media import make_encoder, make_video
from reference.synthetic_store import read_committed
from timeviper_platform.common import listing, storage
from timeviper_platform.common.ray_cluster import free_port
from timeviper_platform.data.encode.frame_encoder import VisionTowerConfig
from timeviper_platform.data.inputs.readers import read_pages
from timeviper_platform.data.media.probe import file_version, probe_media
from timeviper_platform.data.preprocess.config import ExecutionConfig, PreprocessConfig
from timeviper_platform.data.preprocess.run import run_in_process, run_preprocess
from timeviper_platform.data.store.compact import compact
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.data.store.verify import verify_store


def make_config(tmp_path: Path, source: str, output: str) -> PreprocessConfig:
    encoder = VisionTowerConfig(
        model=str(tmp_path / "encoder"), num_tokens_per_frame=4, merge_heads=4, encode_batch_frames=8
    )
    return PreprocessConfig(
        input=source, feature_store=output, encoder=encoder, execution=ExecutionConfig(frames_per_file=3)
    )


def contents(uri: str) -> dict[str, bytes]:
    store = FeatureStore.open(uri, cache_bytes=1)
    return {m: store.read(m).features.view(torch.int16).numpy().tobytes() for m in store.media_ids}


@pytest.mark.slow
def test_failing_and_slow_requests_lose_nothing_and_are_counted(
    bucket: s3fs.S3FileSystem, server: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(storage.FIRST_WAIT_VARIABLE, "0.01")
    make_encoder(tmp_path / "encoder")
    (tmp_path / "media").mkdir()
    for number in range(3):
        make_video(tmp_path / "media" / f"{number}.mp4", range(8 * (1 + number)))
        bucket.put(str(tmp_path / "media" / f"{number}.mp4"), f"bucket/media/{number}.mp4")
    expected = make_config(tmp_path, str(tmp_path / "media"), str(tmp_path / "store"))
    run_preprocess(expected, run=run_in_process)
    config = make_config(tmp_path, "s3://bucket/media", "s3://bucket/store")
    server.fail_first_of, server.slow_rate = 3, 0.1
    storage.split_uri(config.feature_store)
    before, counted_before = server.num_errors, storage.num_retries()
    report = run_preprocess(config, run=run_in_process)
    injected, counted = server.num_errors - before, storage.num_retries() - counted_before
    assert str(report.segments) == "3 planned = 3 ok + 0 partial + 0 rejected"
    assert contents(config.feature_store) == contents(expected.feature_store)
    assert verify_store(config.feature_store).problems == []
    assert compact(config.feature_store).files_after == 1
    assert contents(config.feature_store) == contents(expected.feature_store)
    assert injected == counted >= 8
    assert 0 < report.retries <= injected  # writing the report may itself be retried
    assert server.num_slow > 0
    assert f"retries    {report.retries}" in report.lines()
    puts = [path for method, path, _ in server.requests if method == "PUT" and "/store/commits/" in path]
    assert len(puts) == len(set(puts)) + 1 == 4  # one put each, and two for the merged file's record
    assert not [request for request in server.requests if request[0] == "POST" and "uploads" in request[2]]


@pytest.mark.slow
def test_runs_killed_while_storage_fails_and_is_slow_end_with_the_same_bytes(
    bucket: s3fs.S3FileSystem, server: Faults, tmp_path: Path
) -> None:
    make_encoder(tmp_path / "encoder")
    (tmp_path / "media").mkdir()
    for number in range(6):
        make_video(tmp_path / "media" / f"{number}.mp4", range(8 * (1 + number % 3)))
        bucket.put(str(tmp_path / "media" / f"{number}.mp4"), f"bucket/media/{number}.mp4")
    one_per_file = ExecutionConfig(frames_per_file=1)
    expected = replace(make_config(tmp_path, str(tmp_path / "media"), str(tmp_path / "store")), execution=one_per_file)
    run_preprocess(expected, run=run_in_process)
    config = replace(make_config(tmp_path, "s3://bucket/media", "s3://bucket/store"), execution=one_per_file)
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    server.fail_first_of, server.slow_rate, server.slow_seconds = 5, 0.1, 0.05
    rng = random.Random(0)

    def num_puts() -> int:
        return sum(method == "PUT" and ("/data/" in path or "/commits/" in path) for method, path, _ in server.requests)

    num_killed = 0
    for _ in range(4):
        due = num_puts() + rng.randint(1, 3)
        process = start(config, environment)
        num_killed += kill_after(process, lambda due=due: num_puts() >= due, rng.uniform(0.0, 0.02))
        server.wait_until_idle()
        bucket.invalidate_cache()
        committed = {path.rpartition("/")[2] for path in bucket.find("bucket/store/commits")}
        assert committed <= {path.rpartition("/")[2] for path in bucket.find("bucket/store/data")}
        assert read_committed(config.feature_store).num_rows == len(committed)  # each record is complete
    assert num_killed >= 3
    last = start(config, environment)
    last.join()
    assert last.exitcode == 0
    assert storage.read_json("s3://bucket/store/report.json")["retries"] > 0
    assert contents(config.feature_store) == contents(expected.feature_store)
    ids = read_committed(config.feature_store)["segment_id"].to_pylist()
    assert len(ids) == len(set(ids)) == 6
    assert verify_store(config.feature_store).problems == []


def test_unavailable_storage_is_an_error_with_its_reason(
    bucket: s3fs.S3FileSystem, server: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(storage.FIRST_WAIT_VARIABLE, "0.01")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    storage.write_bytes("s3://bucket/name", b"old")
    server.is_down = True
    with pytest.raises(RuntimeError, match=r"cannot write s3://bucket/name: .*tried 4 times.*is the storage up"):
        storage.write_bytes("s3://bucket/name", b"new")
    with pytest.raises(storage.StorageUnavailableError, match="tried 4 times"):
        storage.read_bytes("s3://bucket/name")
    server.is_down = False
    assert storage.read_bytes("s3://bucket/name") == b"old"


def test_refused_connections_are_retried_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(storage.FIRST_WAIT_VARIABLE, "0.01")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    for name, value in (("ACCESS_KEY_ID", "test"), ("SECRET_ACCESS_KEY", "test"), ("MAX_ATTEMPTS", "1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    s3fs.S3FileSystem.clear_instance_cache()
    before = storage.num_retries()
    with pytest.raises(storage.StorageUnavailableError, match="tried 4 times"):
        storage.read_bytes("s3://bucket/name")
    assert storage.num_retries() - before >= storage.MAX_ATTEMPTS
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_failed_write_leaves_the_old_object(bucket: s3fs.S3FileSystem) -> None:
    storage.write_bytes("s3://bucket/name", b"old")

    def dies(file: IO[bytes]) -> None:
        file.write(b"new but")
        raise KeyError("killed")

    with pytest.raises(KeyError):
        storage.write_atomic("s3://bucket/name", dies)
    assert storage.read_bytes("s3://bucket/name") == b"old"


def test_media_and_features_on_an_object_store(bucket: s3fs.S3FileSystem, tmp_path: Path) -> None:
    make_encoder(tmp_path / "encoder")
    make_video(tmp_path / "clip.mp4", range(24))
    for name in ("videos/a.mp4", "videos/b.mp4"):
        bucket.put(str(tmp_path / "clip.mp4"), f"bucket/{name}")
    bucket.pipe("bucket/videos/text.mp4", b"text")
    bucket.pipe("bucket/manifest.csv", b"uri\nvideos/a.mp4\nvideos/b.mp4\nvideos/text.mp4\nvideos/none.mp4\n")
    config = make_config(tmp_path, "s3://bucket/manifest.csv", "s3://bucket/features")
    report = run_preprocess(config, run=run_in_process)
    assert (report.segments.ok, report.media.rejected, report.segments.missing) == (2, 2, 0)
    assert report.errors_by_stage == {"probe": {"not_found": 1, "unknown_format": 1}}
    store = FeatureStore.open(config.feature_store)
    first, second = (store.read(media_id) for media_id in store.media_ids)
    assert first.features.shape == (3, 4, 16)
    assert torch.equal(first.features, second.features)
    assert first.info.uri.startswith("s3://bucket/videos/")
    bucket.pipe("bucket/features/data/orphan.parquet", b"half")
    assert run_preprocess(config, run=run_in_process).segments_encoded == 0
    assert not bucket.exists("bucket/features/data/orphan.parquet")
    from_glob = PreprocessConfig(
        input="s3://bucket/videos/*.mp4", feature_store=str(tmp_path / "store"), encoder=config.encoder
    )
    assert run_preprocess(from_glob, run=run_in_process).segments.ok == 2


def test_a_listing_is_paged_and_has_the_versions_of_its_objects(
    bucket: s3fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(listing, "S3_PAGE_KEYS", 2)
    make_video(tmp_path / "clip.mp4", range(8))
    names = [f"videos/{folder}/{number}.mp4" for folder in "ab" for number in range(3)] + ["videos/c.mp4"]
    for name in names:
        bucket.put(str(tmp_path / "clip.mp4"), f"bucket/{name}")
    bucket.pipe("bucket/videos/notes.txt", b"text")
    bucket.pipe("bucket/videosb.mp4", b"outside the prefix")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "clip.mp4", "clip.mp4")
    bucket.put(str(tmp_path / "x.tar"), "bucket/videos/x.tar")
    items = [item for page in read_pages("s3://bucket/videos", page_rows=3) for item in page]
    assert [item.uri.partition("#")[0] for item in items] == [
        f"s3://bucket/{name}" for name in [*names, "videos/x.tar"]
    ]
    assert [item.version for item in items] == [file_version(item.uri) for item in items]
    assert items[0].with_headers(probe_media(items[-1].uri)) == items[0].with_headers(probe_media(items[0].uri))
    for pattern in ("s3://bucket/videos/*/1.mp4", "s3://bucket/videos/**/*.mp4", "s3://bucket/*.mp4"):
        found = [file.uri for file in listing.list_files(pattern).files]
        assert found == sorted(f"s3://{name}" for name in bucket.glob(pattern)), pattern
