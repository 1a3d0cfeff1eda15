"""janitor: uploads by age and size."""

from __future__ import annotations

import asyncio
import io
import os
import time
from pathlib import Path

import pytest

from timeviper_platform.serving.gateway.config import Retention
from timeviper_platform.serving.gateway.media import uploads
from timeviper_platform.serving.gateway.media.janitor import clean, keep_clean
from timeviper_platform.serving.gateway.media.remote import TENANT
from timeviper_platform.serving.gateway.media.uploads import FileRecord, MediaStore
from timeviper_platform.serving.jobs.job_store import JobStore

NOW = time.time()
MP4 = b"\x00\x00\x00\x20ftypisom" + bytes(100)


@pytest.fixture
def store(tmp_path: Path) -> MediaStore:
    return MediaStore(str(tmp_path / "media"))


def put(store: MediaStore, tenant: str, number: int, age_days: float, monkeypatch: pytest.MonkeyPatch) -> FileRecord:
    monkeypatch.setattr(uploads.time, "time", lambda: NOW - age_days * 86_400)
    record = store.put(tenant, io.BytesIO(MP4 + bytes([number])), filename="a", purpose="vision", expires_after_s=None)
    monkeypatch.setattr(uploads.time, "time", lambda: NOW)
    return record


def test_old_uploads_and_the_oldest_of_too_many_bytes_are_deleted(
    store: MediaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    ages = {1: ("a", 40.0), 2: ("a", 3.0), 3: ("b", 2.0), 4: ("b", 1.0)}
    records = {n: put(store, tenant, n, age, monkeypatch) for n, (tenant, age) in ages.items()}
    size = records[1].num_bytes
    assert clean(store, Retention(max_age_days=None, max_bytes=None)) == []
    assert clean(store, Retention()) == [records[1]]
    assert clean(store, Retention(max_bytes=2 * size)) == [records[2]]
    assert [*store.list("a"), *store.list("b")] == [records[4], records[3]]
    assert not Path(store.uri("a", records[2])).exists()


def test_expired_uploads_and_contents_without_a_record_are_deleted(store: MediaStore) -> None:
    record = store.put("a", io.BytesIO(MP4), filename="a", purpose="vision", expires_after_s=-1)
    folder = Path(store.uri("a", record)).parent
    for name, age_s in (("left", 2 * 86_400), ("new", 60)):
        (folder / f"{name}.media").write_bytes(b"x")
        os.utime(folder / f"{name}.media", (NOW - age_s, NOW - age_s))
    assert clean(store, Retention()) == [record]
    assert [path.name for path in folder.iterdir()] == ["new.media"]


def test_expired_downloads_are_deleted_and_jobs_are_kept(store: MediaStore, tmp_path: Path) -> None:
    jobs = JobStore(str(tmp_path / "media"))
    job = jobs.create("a", model="m", video="v", questions=["?"], requests=[{}])
    download = store.put(TENANT, io.BytesIO(MP4), filename="a", purpose="download", expires_after_s=-1)
    assert clean(store, Retention()) == [download]
    assert not Path(store.uri(TENANT, download)).exists()
    assert jobs.get("a", job.id) == job


def test_a_folder_that_does_not_exist_is_clean(store: MediaStore) -> None:
    assert clean(store, Retention()) == []


def test_it_goes_on_after_a_failure(store: MediaStore, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def tenants() -> list[str]:
        calls.append(1)
        raise OSError("away")

    monkeypatch.setattr(store, "tenants", tenants)

    async def scenario() -> None:
        task = asyncio.create_task(keep_clean(store, Retention(interval_s=0.01)))
        while len(calls) < 3:
            await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(asyncio.wait_for(scenario(), 10))
