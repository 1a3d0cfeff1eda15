"""Shared fixtures: awkward videos, a corpus and its store, and an S3 server with faults."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs

from reference.awkward_videos import KINDS
from reference.faulty_s3 import Faults, s3_server
from reference.media_corpus import make_config, make_corpus
from timeviper_platform.data.preprocess.run import run_in_process, run_preprocess


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One file of each of KINDS."""
    folder = tmp_path_factory.mktemp("videos")
    for name, make in KINDS.items():
        make(folder / name)
    return {name: folder / name for name in KINDS}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `make_corpus`."""
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder)
    return folder


@pytest.fixture(scope="session")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of all that is in the corpus."""
    output = tmp_path_factory.mktemp("finished") / "store"
    run_preprocess(make_config(corpus, output), run=run_in_process)
    return output


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    with s3_server() as (url, faults):
        for name, value in (
            ("AWS_ENDPOINT_URL", url),
            ("AWS_ACCESS_KEY_ID", "test"),
            ("AWS_SECRET_ACCESS_KEY", "test"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
            ("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required"),
            ("AWS_MAX_ATTEMPTS", "2"),
        ):
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield faults
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(server: Faults) -> s3fs.S3FileSystem:
    filesystem = s3fs.S3FileSystem()
    filesystem.mkdir("bucket")
    return filesystem
