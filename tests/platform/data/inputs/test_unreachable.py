"""One row or file out of reach is one reject; only many in a row end the job, with cause, row and file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from reference.synthetic_media import make_encoder, make_video
from timeviper_platform.common.storage import StorageError, plain_errors, shown_text
from timeviper_platform.data.encode.frame_encoder import VisionTowerConfig
from timeviper_platform.data.preprocess.config import ExecutionConfig, PreprocessConfig
from timeviper_platform.data.preprocess.report import PreprocessReport
from timeviper_platform.data.preprocess.run import run_in_process, run_preprocess
from timeviper_platform.data.video_worker.frame_source import DecodeConfig


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


def run(folder: Path, source: str, *, isolation: str = "process", limit: int | None = 100) -> PreprocessReport:
    if not (folder / "encoder").exists():
        make_encoder(folder / "encoder")
    config = PreprocessConfig(
        input=str(folder / source),
        feature_store=str(folder / "store"),
        encoder=VisionTowerConfig(model=str(folder / "encoder"), num_tokens_per_frame=4, merge_heads=4),
        decode=DecodeConfig(isolation=isolation),  # type: ignore[arg-type]
        execution=ExecutionConfig(max_consecutive_failures=limit),
    )
    return run_preprocess(config, run=run_in_process)


def rejects(folder: Path) -> dict[str, tuple[str, str, str]]:
    rows = pq.read_table(folder / "store" / "rejects.parquet").to_pylist()
    return {row["uri"]: (row["error_stage"], row["error_type"], row["error_message"]) for row in rows}


@pytest.mark.parametrize("isolation", ["process", "none"])
def test_unreachable_rows_are_one_reject_each_and_the_job_goes_on(tmp_path: Path, isolation: str) -> None:
    make_video(tmp_path / "good.mp4", range(8))
    known = {"size": 5, "duration_seconds": 2.0, "width": 64, "height": 64}  # planned without opening it
    rows = [
        {"uri": "good.mp4"},
        {"uri": "s3://bucket/a.mp4"},
        {"uri": "gs://bucket/b.mp4"},
        {"uri": "hf://datasets/owner/name/c.mp4"},
        {"uri": "s3://bucket/d.mp4", **known},
        {"uri": "gs://bucket/e.mp4", **known},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    report = run(tmp_path, "m.jsonl", isolation=isolation)
    assert (report.media.planned, report.media.ok, report.media.rejected) == (6, 1, 5)
    found = rejects(tmp_path)
    expected = [
        ("s3://bucket/a.mp4", "probe", "permission_denied", "Unable to locate credentials; give the job", 2),
        ("gs://bucket/b.mp4", "probe", "read_failed", "gcsfs.*; install the package where", 3),
        ("hf://datasets/owner/name/c.mp4", "probe", "read_failed", "offline mode is enabled", 4),
        ("s3://bucket/d.mp4", "decode_video", "permission_denied", "Unable to locate credentials", None),
        ("gs://bucket/e.mp4", "decode_video", "read_failed", "gcsfs", None),
    ]
    for uri, stage, kind, text, row in expected:
        assert found[uri][:2] == (stage, kind)
        with pytest.raises(ValueError, match=text):
            raise ValueError(found[uri][2])
        if row is not None:
            assert f"({tmp_path}/m.jsonl: row {row})" in found[uri][2]


def test_unreachable_files_beside_tars_and_tables_are_rejects(tmp_path: Path) -> None:
    media = tmp_path / "media"
    media.mkdir()
    make_video(media / "good.mp4", range(8))
    (media / "a.tar").write_bytes(bytes(10240))
    (media / "a.parquet").write_bytes(b"PAR1 no table")  # img2dataset's list of failures
    (media / "gone.tar").symlink_to("nowhere")
    report = run(tmp_path, "media")
    assert (report.media.planned, report.media.ok, report.media.rejected) == (3, 1, 2)
    assert report.errors_by_stage == {"list": {"corrupt_file": 1, "not_found": 1}}


def test_the_limit_names_cause_row_and_file_of_planned_rows(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("uri\n" + "".join(f"s3://bucket/{n}.mp4\n" for n in range(5)))
    with pytest.raises(RuntimeError) as raised:
        run(tmp_path, "m.csv", limit=3)
    text = str(raised.value)
    assert text.startswith("3 media in a row failed for one reason, probe/permission_denied: ")
    assert "(s3://bucket/2.mp4: Unable to locate credentials; give the job" in text
    assert f"({tmp_path}/m.csv: row 3)" in text


def test_the_limit_names_cause_row_and_file_of_decoded_rows(tmp_path: Path) -> None:
    rows = "".join(f"s3://bucket/{n}.mp4,5,2\n" for n in range(5))
    (tmp_path / "m.csv").write_text("uri,size,duration_seconds\n" + rows)
    with pytest.raises(RuntimeError) as raised:
        run(tmp_path, "m.csv", isolation="none", limit=3)
    assert "3 media in a row failed for one reason, decode_video/permission_denied: " in str(raised.value)
    assert "(s3://bucket/2.mp4: Unable to locate credentials; give the job" in str(raised.value)
    assert f"; {tmp_path}/m.csv: row 3)" in str(raised.value)


def test_credentials_are_never_shown() -> None:
    for text, shown in (
        ("GET https://u:geheim@h.test/x.mp4?X-Amz-Signature=geheim failed", "GET https://h.test/x.mp4 failed"),
        ("for url 'https://h.test/a?token=geheim'.", "for url 'https://h.test/a'."),
        ('Invalid bucket name "AKIA:geheim@bucket"', 'Invalid bucket name "bucket"'),
        ("AccountKey=geheim; password: x, secret = geheim", "AccountKey=***; password: x, secret = ***"),
        ("two\nlines", "two lines"),
        ("self.max_pixels = 5", "self.max_pixels = 5"),
    ):
        assert shown_text(text) == shown


@pytest.mark.parametrize(
    ("package", "name", "text", "kind"),
    [
        ("httpx", "HTTPStatusError", "Client error for url 'https://u:geheim@h.test/x?sig=geheim'", StorageError),
        ("httpx", "ConnectError", "[Errno -2] Name or service not known", OSError),
        ("aiohttp.client", "ServerTimeoutError", "", TimeoutError),
        ("google.auth.exceptions", "DefaultCredentialsError", "Could not find default credentials", PermissionError),
        ("botocore.exceptions", "NoCredentialsError", "Unable to locate credentials", PermissionError),
    ],
)
def test_errors_of_storage_libraries_become_those_of_files(
    package: str, name: str, text: str, kind: type[Exception]
) -> None:
    error = type(name, (Exception,), {"__module__": package})(text)
    with pytest.raises(kind) as raised, plain_errors():
        raise error
    assert "geheim" not in str(raised.value)
    assert str(raised.value)


def test_our_own_errors_stay() -> None:
    for error in (KeyError("x"), ValueError("x"), FileNotFoundError(2, "x"), MemoryError()):
        with pytest.raises(type(error)), plain_errors():
            raise error
    with pytest.raises(StorageError), plain_errors(of_any_library=True):
        raise pa.ArrowInvalid("x")
