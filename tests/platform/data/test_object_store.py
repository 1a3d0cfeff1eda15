"""The store on an object store: the same job, against an S3 server on loopback."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import s3fs
import torch

from reference.made_media import make_encoder, make_video
from timeviper_platform.data import listing
from timeviper_platform.data.encode import EncoderConfig
from timeviper_platform.data.features import FeatureStore
from timeviper_platform.data.graph import ExecutionConfig
from timeviper_platform.data.inputs import read_pages
from timeviper_platform.data.pipeline import PreprocessConfig, run_in_process, run_preprocess
from timeviper_platform.data.probe import file_version, probe_media


def test_media_and_features_on_an_object_store(s3_bucket: s3fs.S3FileSystem, tmp_path: Path) -> None:
    encoder = make_encoder(tmp_path / "encoder")
    make_video(tmp_path / "clip.mp4", range(24))
    for name in ("videos/a.mp4", "videos/b.mp4"):
        s3_bucket.put(str(tmp_path / "clip.mp4"), f"bucket/{name}")
    s3_bucket.pipe("bucket/videos/text.mp4", b"text")
    s3_bucket.pipe("bucket/manifest.csv", b"uri\nvideos/a.mp4\nvideos/b.mp4\nvideos/text.mp4\nvideos/none.mp4\n")
    config = PreprocessConfig(
        input="s3://bucket/manifest.csv",
        output="s3://bucket/features",
        encoder=EncoderConfig(encoder=str(encoder), num_tokens_per_frame=4, merge_heads=4, encode_batch_frames=8),
        execution=ExecutionConfig(frames_per_file=3),
    )
    report = run_preprocess(config, run=run_in_process)
    assert (report.segments_done, report.errors, report.audit["missing"]) == (2, 2, 0)
    assert report.errors_by_stage == {"probe": {"not_found": 1, "unknown_format": 1}}
    store = FeatureStore.open(config.output)
    first, second = (store.read(media_id) for media_id in store.media_ids)
    assert first.features.shape == (3, 4, 16)
    assert torch.equal(first.features, second.features)
    assert first.info.uri.startswith("s3://bucket/videos/")
    s3_bucket.pipe("bucket/features/data/orphan.parquet", b"half")
    assert run_preprocess(config, run=run_in_process).segments_encoded == 0
    assert not s3_bucket.exists("bucket/features/data/orphan.parquet")
    from_glob = PreprocessConfig(
        input="s3://bucket/videos/*.mp4", output=str(tmp_path / "store"), encoder=config.encoder
    )
    assert run_preprocess(from_glob, run=run_in_process).segments_done == 2


def test_a_listing_comes_in_pages_and_says_what_the_objects_say(
    s3_bucket: s3fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(listing, "S3_PAGE_KEYS", 2)
    make_video(tmp_path / "clip.mp4", range(8))
    names = [f"videos/{folder}/{number}.mp4" for folder in "ab" for number in range(3)] + ["videos/c.mp4"]
    for name in names:
        s3_bucket.put(str(tmp_path / "clip.mp4"), f"bucket/{name}")
    s3_bucket.pipe("bucket/videos/notes.txt", b"text")
    s3_bucket.pipe("bucket/videosb.mp4", b"beside the prefix")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "clip.mp4", "clip.mp4")
    s3_bucket.put(str(tmp_path / "x.tar"), "bucket/videos/x.tar")
    items = [item for page in read_pages("s3://bucket/videos", page_rows=3) for item in page]
    assert [item.uri.partition("#")[0] for item in items] == [
        f"s3://bucket/{name}" for name in [*names, "videos/x.tar"]
    ]
    assert [item.version for item in items] == [file_version(item.uri) for item in items]
    assert probe_media(items[-1].uri) == probe_media(items[0].uri)
    for pattern in ("s3://bucket/videos/*/1.mp4", "s3://bucket/videos/**/*.mp4", "s3://bucket/*.mp4"):
        found = [file.uri for file in listing.list_files(pattern).files]
        assert found == sorted(f"s3://{name}" for name in s3_bucket.glob(pattern)), pattern
