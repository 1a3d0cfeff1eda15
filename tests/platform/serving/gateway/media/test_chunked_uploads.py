"""chunked_uploads: files in parts, as the openai package sends them."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from reference.synthetic_gateway import MP4, Server, check_error, keys
from timeviper_platform.serving.gateway.config import Quota, Retention
from timeviper_platform.serving.gateway.media import chunked_uploads
from timeviper_platform.serving.gateway.media.janitor import clean
from timeviper_platform.serving.gateway.media.uploads import MediaStore


def begin(server: Server, num_bytes: int = len(MP4), **options: Any) -> Any:
    body = {"filename": "../cat.mp4", "purpose": "vision", "bytes": num_bytes, "mime_type": "video/mp4"}
    return server.http.post("/v1/uploads", json=body, **options)


def add(server: Server, upload_id: str, data: bytes, **options: Any) -> Any:
    return server.http.post(f"/v1/uploads/{upload_id}/parts", files={"data": ("data", data)}, **options)


def complete(server: Server, upload_id: str, *part_ids: str, **options: Any) -> Any:
    return server.http.post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": part_ids}, **options)


def test_parts_become_a_file_in_the_given_order(server: Server, tmp_path: Path) -> None:
    upload = begin(server).json()
    assert (upload["status"], upload["filename"], upload["file"]) == ("pending", "cat.mp4", None)
    second, first = (add(server, upload["id"], part).json()["id"] for part in (MP4[50:], MP4[:50]))
    done = complete(server, upload["id"], first, second).json()
    assert done["status"] == "completed"
    assert server.http.get(f"/v1/files/{done['file']['id']}/content").content == MP4
    check_error(complete(server, upload["id"], first, second), 404, "upload_not_found")
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".part"]


def test_an_upload_holds_what_it_announced(tmp_path: Path) -> None:
    server = Server(tmp_path, max_upload_bytes=1000)
    check_error(begin(server, 1001), 413, "too_large")
    check_error(begin(server, 0), 400, "invalid_value")
    check_error(server.http.post("/v1/uploads", json={"bytes": 3}), 400, "missing_required_parameter")
    upload_id = begin(server).json()["id"]
    part = add(server, upload_id, MP4[:50]).json()["id"]
    check_error(add(server, upload_id, MP4), 400, "invalid_value")
    check_error(complete(server, upload_id, part), 400, "invalid_value")
    for unknown in ("part_" + "0" * 32, "../upload", part[:-1]):
        check_error(complete(server, upload_id, unknown), 400, "invalid_value")
    assert server.http.post(f"/v1/uploads/{upload_id}/cancel").json()["status"] == "cancelled"
    check_error(add(server, upload_id, b"x"), 404, "upload_not_found")
    check_error(add(server, "upload_..", b"x"), 404, "upload_not_found")
    text = begin(server, 9).json()["id"]
    part = add(server, text, b"some text").json()["id"]
    check_error(complete(server, text, part), 415, "unsupported_media_type")


def test_the_file_of_an_upload_may_expire(server: Server) -> None:
    """Before, expires_after was dropped, and the file stayed."""
    body = {"filename": "cat.mp4", "purpose": "vision", "bytes": len(MP4), "mime_type": "video/mp4"}

    def post(seconds: int) -> Any:
        return server.http.post("/v1/uploads", json={**body, "expires_after": _after(seconds)})

    for wrong in (3599, 2_592_001):
        check_error(post(wrong), 400, "invalid_value")
    upload = post(3600).json()
    part = add(server, upload["id"], MP4).json()["id"]
    file = complete(server, upload["id"], part).json()["file"]
    assert file["expires_at"] == file["created_at"] + 3600
    client = server.openai()
    sent = client.uploads.upload_file_chunked(
        file=MP4 + b"x", filename="b.mp4", bytes=len(MP4) + 1, mime_type="video/mp4", purpose="vision"
    )
    assert sent.file is not None
    assert sent.file.expires_at is None
    assert set(upload) == set(client.uploads.cancel(post(3600).json()["id"]).to_dict())


def _after(seconds: int) -> dict[str, Any]:
    return {"anchor": "created_at", "seconds": seconds}


def test_parts_count_towards_the_keys_bytes(tmp_path: Path) -> None:
    """Before, uploads that were never completed took any space for a day."""
    (key,) = keys("alice")
    server = Server(tmp_path, api_keys=(replace(key, quota=Quota(max_stored_bytes=2 * len(MP4) + 10)),))
    server.http.headers["Authorization"] = "Bearer key-alice"
    first, second, third = (begin(server).json()["id"] for _ in range(3))
    parts = [add(server, upload_id, MP4).json()["id"] for upload_id in (first, second)]
    check_error(add(server, third, MP4), 429, "insufficient_quota")
    check_error(begin(server), 429, "insufficient_quota")
    check_error(server.upload(MP4 + b"y", key="key-alice"), 429, "insufficient_quota")
    assert complete(server, first, parts[0]).json()["status"] == "completed"
    assert server.http.post(f"/v1/uploads/{second}/cancel").json()["status"] == "cancelled"
    assert add(server, third, MP4).status_code == 200


def test_a_part_costs_the_storage_one_listing_however_many_there_are(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, every part asked for the size of each one before it."""
    upload_id = begin(server).json()["id"]
    monkeypatch.setattr(LocalFileSystem, "size", lambda *_: pytest.fail("asked"))
    listings = []
    ls = LocalFileSystem.ls
    monkeypatch.setattr(LocalFileSystem, "ls", lambda *values, **named: listings.append(1) or ls(*values, **named))
    for number in range(6):
        assert add(server, upload_id, MP4[number : number + 1]).status_code == 200
    assert len(listings) == 6
    check_error(add(server, upload_id, MP4), 400, "invalid_value")


def test_an_upload_belongs_to_its_key_and_ends_with_its_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(tmp_path, api_keys=keys("alice", "bob"))
    alice, bob = ({"headers": {"Authorization": f"Bearer key-{name}"}} for name in ("alice", "bob"))
    upload = begin(server, **alice).json()
    check_error(add(server, upload["id"], MP4, **bob), 404, "upload_not_found")
    assert add(server, upload["id"], MP4, **alice).status_code == 200
    monkeypatch.setattr(chunked_uploads.time, "time", lambda: upload["expires_at"])
    check_error(add(server, upload["id"], b"x", **alice), 400, "invalid_value")
    monkeypatch.undo()
    left = [path for path in (tmp_path / "media" / "alice").rglob("*") if path.is_file()]
    assert len(left) == 2
    for path in left:
        os.utime(path, (time.time() - 2 * 86_400,) * 2)
    clean(MediaStore(str(tmp_path / "media")), Retention())
    assert not any(path.is_file() for path in (tmp_path / "media" / "alice").rglob("*"))
