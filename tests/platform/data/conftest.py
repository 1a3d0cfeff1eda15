"""What tests of data share: an S3 server on loopback that can be made to fail."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import s3fs

from reference.faulty_s3 import Faults, s3_server


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
