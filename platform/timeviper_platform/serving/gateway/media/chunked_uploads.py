"""OpenAI's Uploads: files in parts, which become ordinary uploads on completion."""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import IO, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from timeviper_platform.common.storage import (
    entries_in,
    join_uri,
    open_file,
    read_json_or_none,
    split_uri,
    write_atomic,
    write_json,
)
from timeviper_platform.serving.gateway.media.uploads import FileRecord, MediaStore, display_name
from timeviper_platform.serving.gateway.openai_protocol import ApiError

UPLOAD_ID = re.compile(r"upload_[0-9a-f]{32}")
PART_ID = re.compile(r"part_[0-9a-f]{32}")
EXPIRES_AFTER_S = 3600
"""Seconds in which an upload must be completed, as in OpenAI's API."""
MAX_PARTS = 10_000
FILE_EXPIRES_AFTER_S = 3600, 2_592_000
"""OpenAI's shortest and longest age of a file: an hour, 30 days."""
_CHUNK_BYTES = 1 << 20
_FILE_EXPIRY = "file_expires_after_s"
"""Key of an upload's record that clients do not see."""


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class ExpiresAfter(_Lenient):
    anchor: Literal["created_at"]
    seconds: int = Field(ge=FILE_EXPIRES_AFTER_S[0], le=FILE_EXPIRES_AFTER_S[1])


class UploadRequest(_Lenient):
    filename: str
    purpose: str = "user_data"
    num_bytes: int = Field(alias="bytes", ge=1)
    mime_type: str = ""
    expires_after: ExpiresAfter | None = None
    """When the file is deleted."""


class CompleteRequest(_Lenient):
    part_ids: list[str] = Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)


class ChunkedUploads:
    """Incomplete uploads, each in a folder below its tenant's."""

    def __init__(self, root: str, store: MediaStore, max_bytes: Callable[[], int]) -> None:
        self._root = root
        self._store = store
        self._max_bytes = max_bytes

    def create(self, tenant: str, request: UploadRequest, *, max_total_bytes: int | None) -> dict[str, Any]:
        """Raises ApiError 413 for a file over the limit, 429 as MediaStore.check_total."""
        if request.num_bytes > (limit := self._max_bytes()):
            text = f"the file has {request.num_bytes} bytes, the limit is {limit}"
            raise ApiError(413, text, code="too_large", param="bytes")
        if max_total_bytes is not None:
            self._store.check_total(tenant, request.num_bytes, max_total_bytes, param="bytes")
        now = int(time.time())
        upload: dict[str, Any] = {
            "id": f"upload_{secrets.token_hex(16)}",
            "object": "upload",
            "bytes": request.num_bytes,
            "created_at": now,
            "filename": display_name(request.filename),
            "purpose": request.purpose[:64],
            "status": "pending",
            "expires_at": now + EXPIRES_AFTER_S,
            "file": None,
        }
        expiry = None if request.expires_after is None else request.expires_after.seconds
        write_json(self._record(tenant, upload["id"]), {**upload, _FILE_EXPIRY: expiry})
        return upload

    def add_part(self, tenant: str, upload_id: str, file: IO[bytes], *, max_total_bytes: int | None) -> dict[str, Any]:
        """Stores a part.

        Raises:
            ApiError: 404 for an unknown upload, 400 for one that is not pending, or parts above its bytes; 429 as
                MediaStore.check_total.
        """
        upload = self._pending(tenant, upload_id)
        part_id = f"part_{secrets.token_hex(16)}"
        num_bytes = file.seek(0, 2)
        entries = entries_in(self._folder(tenant, upload_id))  # with their sizes: one request, however many parts
        stored = [int(entry["size"]) for entry in entries if entry["name"].endswith(".part")]
        total = num_bytes + sum(stored)
        if total > upload["bytes"] or len(stored) >= MAX_PARTS:
            text = f"the parts have {total} bytes, the upload announced {upload['bytes']}"
            raise ApiError(400, text, code="invalid_value", param="data")
        if max_total_bytes is not None:
            self._store.check_total(tenant, num_bytes, max_total_bytes, param="data")
        file.seek(0)
        uri = join_uri(self._folder(tenant, upload_id), f"{part_id}.part")
        write_atomic(uri, lambda target: shutil.copyfileobj(file, target, _CHUNK_BYTES))
        return {"id": part_id, "object": "upload.part", "created_at": int(time.time()), "upload_id": upload_id}

    def complete(
        self, tenant: str, upload_id: str, part_ids: Sequence[str], *, max_total_bytes: int | None
    ) -> dict[str, Any]:
        """Joins parts in the given order.

        Raises:
            ApiError: as `add_part` and MediaStore.put; 400 for unknown parts or other bytes than announced.
        """
        upload = self._pending(tenant, upload_id)
        expiry = upload.pop(_FILE_EXPIRY, None)
        folder = self._folder(tenant, upload_id)
        with tempfile.TemporaryFile() as whole:
            for index, part_id in enumerate(part_ids):
                uri = join_uri(folder, f"{part_id}.part")
                try:
                    if PART_ID.fullmatch(part_id) is None:
                        raise FileNotFoundError(part_id)
                    with open_file(uri) as part:
                        shutil.copyfileobj(part, whole, _CHUNK_BYTES)
                except FileNotFoundError:
                    raise ApiError(400, "no such part", code="invalid_value", param=f"part_ids.{index}") from None
                if whole.tell() > upload["bytes"]:
                    break
            if whole.tell() != upload["bytes"]:
                text = f"the parts have {whole.tell()} bytes, the upload announced {upload['bytes']}"
                raise ApiError(400, text, code="invalid_value", param="part_ids")
            record = self._store.put(
                tenant,
                whole,
                filename=upload["filename"],
                purpose=upload["purpose"],
                expires_after_s=expiry,
                # the parts already count, and are deleted next
                max_total_bytes=None if max_total_bytes is None else max_total_bytes + upload["bytes"],
            )
        return self._ended(tenant, upload, "completed", record)

    def cancel(self, tenant: str, upload_id: str) -> dict[str, Any]:
        """Raises ApiError as `add_part`."""
        upload = self._pending(tenant, upload_id)
        upload.pop(_FILE_EXPIRY, None)
        return self._ended(tenant, upload, "cancelled", None)

    def _pending(self, tenant: str, upload_id: str) -> dict[str, Any]:
        found = read_json_or_none(self._record(tenant, upload_id)) if UPLOAD_ID.fullmatch(upload_id) else None
        if found is None:
            raise ApiError(404, "no such upload", code="upload_not_found", param="upload_id")
        upload: dict[str, Any] = found
        if upload["expires_at"] <= time.time():
            raise ApiError(400, "the upload has expired", code="invalid_value", param="upload_id")
        return upload

    def _ended(self, tenant: str, upload: dict[str, Any], status: str, record: FileRecord | None) -> dict[str, Any]:
        filesystem, path = split_uri(self._folder(tenant, upload["id"]))
        with contextlib.suppress(FileNotFoundError):  # the janitor deleted it
            filesystem.rm(path, recursive=True)
        return {**upload, "status": status, "file": None if record is None else record.to_json()}

    def _folder(self, tenant: str, upload_id: str) -> str:
        return join_uri(self._root, tenant, upload_id)

    def _record(self, tenant: str, upload_id: str) -> str:
        return join_uri(self._folder(tenant, upload_id), "upload.json")
