"""Routes of uploads and of the feature store's media."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import Response
from starlette.datastructures import FormData

from timeviper_platform.serving.gateway.bodies import Bodies, form_file
from timeviper_platform.serving.gateway.chat_request import (
    parse_object,
    validated,
)
from timeviper_platform.serving.gateway.config import ApiKey, CurrentConfig
from timeviper_platform.serving.gateway.media.byte_ranges import content_response
from timeviper_platform.serving.gateway.media.chunked_uploads import (
    FILE_EXPIRES_AFTER_S,
    ChunkedUploads,
    CompleteRequest,
    UploadRequest,
)
from timeviper_platform.serving.gateway.media.remote import FILE as FILE_SCHEME
from timeviper_platform.serving.gateway.media.remote import local_path
from timeviper_platform.serving.gateway.media.uploads import FileRecord, MediaStore, no_such_file, page_of, read_chunks
from timeviper_platform.serving.gateway.openai_protocol import ApiError
from timeviper_platform.serving.messages import (
    FEATURE_SCHEME,
    FeatureClient,
    Refusal,
    StoredMedium,
)

T = TypeVar("T")

MAX_AT_ONCE = 16
"""Uploads that a gateway stores at once; others wait."""
MAX_VIDEOS = 1000
"""Stored media per page."""


class FileRoutes:
    def __init__(self, current: CurrentConfig, features: FeatureClient, store: MediaStore, bodies: Bodies) -> None:
        self._current = current
        self._features = features
        self._store = store
        self._bodies = bodies
        root = current.config.media_root
        self._threads = ThreadPoolExecutor(MAX_AT_ONCE, thread_name_prefix="upload")  # slow storage holds up no chats
        self._uploads = ChunkedUploads(root, store, lambda: current.config.max_upload_bytes)

    async def create_file(self, request: Request) -> dict[str, object]:
        """Stores a video or picture for the owner of the API key."""
        async with form_file(request, "file") as (form, file):
            put = partial(
                self._store.put,
                filename=file.filename or "",
                purpose=str(form.get("purpose", "user_data"))[:64],
                expires_after_s=_expires_after(form),
                max_total_bytes=_max_stored_bytes(request),
            )
            record = await self._run(put, request.state.tenant, file.file)
        return record.to_json()

    async def create_upload(self, request: Request) -> dict[str, Any]:
        values = await self._bodies.parsed(request, parse_object)
        upload = validated(UploadRequest, values)
        create = partial(self._uploads.create, max_total_bytes=_max_stored_bytes(request))
        return await asyncio.to_thread(create, request.state.tenant, upload)

    async def add_upload_part(self, request: Request, upload_id: str) -> dict[str, Any]:
        async with form_file(request, "data") as (_, file):
            add = partial(self._uploads.add_part, max_total_bytes=_max_stored_bytes(request))
            return await self._run(add, request.state.tenant, upload_id, file.file)

    async def complete_upload(self, request: Request, upload_id: str) -> dict[str, Any]:
        parts = validated(CompleteRequest, await self._bodies.parsed(request, parse_object)).part_ids
        complete = partial(self._uploads.complete, max_total_bytes=_max_stored_bytes(request))
        return await self._run(complete, request.state.tenant, upload_id, parts)

    async def cancel_upload(self, request: Request, upload_id: str) -> dict[str, Any]:
        return await asyncio.to_thread(self._uploads.cancel, request.state.tenant, upload_id)

    async def list_files(self, request: Request) -> dict[str, object]:
        """Lists uploads, the newest first; `purpose`, `order`, `limit` and `after` as in OpenAI's API."""
        records = await asyncio.to_thread(self._store.list, request.state.tenant)
        return page_of(records, request.query_params)

    async def get_file(self, request: Request, file_id: str) -> dict[str, object]:
        return (await self._record(request, file_id)).to_json()

    async def get_content(self, request: Request, file_id: str) -> Response:
        record = await self._record(request, file_id)
        headers = {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(record.filename)}"}
        read = partial(self._store.read, request.state.tenant, record)
        return content_response(request, read, size=record.num_bytes, etag=record.sha256, headers=headers)

    async def list_videos(self, request: Request) -> dict[str, object]:
        """Lists stored media by id; `prefix`, `after` and `limit`."""
        query = request.query_params
        limit = query.get("limit", "100")
        if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= MAX_VIDEOS):
            raise ApiError(400, f"limit must be between 1 and {MAX_VIDEOS}", code="invalid_value", param="limit")
        after, prefix = query.get("after", ""), query.get("prefix", "")
        page = accepted(await self._features.list_media(after=after, prefix=prefix, limit=int(limit)))
        data = [_video_json(medium) for medium in page.media]
        ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
        return {"object": "list", "data": data, **ends, "has_more": page.has_more}

    async def get_video(self, video_id: str) -> dict[str, object]:
        """Returns a stored medium with the times of its frames."""
        return _video_json(accepted(await self._features.medium(video_id)))

    async def get_video_content(self, request: Request, video_id: str) -> Response:
        """Returns the file that a stored medium was made from, if requests may read its folder."""
        medium = accepted(await self._features.medium(video_id))
        url = medium.uri if medium.uri.startswith(FILE_SCHEME) else FILE_SCHEME + quote(medium.uri)
        try:
            path = await asyncio.to_thread(local_path, url, self._current.config.allowed_local_media, "video_id")
        except ApiError:
            text = "the medium's file is not below gateway.allowed_local_media of this server"
            raise ApiError(404, text, code="content_not_available", param="video_id") from None
        status = Path(path).stat()
        etag = f"{status.st_mtime_ns:x}-{status.st_size:x}"
        return content_response(request, partial(read_chunks, path), size=status.st_size, etag=etag, headers={})

    async def delete_file(self, request: Request, file_id: str) -> dict[str, object]:
        if not await asyncio.to_thread(self._store.delete, request.state.tenant, file_id):
            raise no_such_file("file_id")
        return {"id": file_id, "object": "file", "deleted": True}

    async def _run(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    async def _record(self, request: Request, file_id: str) -> FileRecord:
        record = await asyncio.to_thread(self._store.get, request.state.tenant, file_id)
        if record is None:
            raise no_such_file("file_id")
        return record


def _max_stored_bytes(request: Request) -> int | None:
    key: ApiKey | None = request.state.key
    return None if key is None else key.quota.max_stored_bytes


def _expires_after(form: FormData) -> int | None:
    seconds, anchor = form.get("expires_after[seconds]"), form.get("expires_after[anchor]")
    if seconds is None and anchor is None:
        return None
    shortest, longest = FILE_EXPIRES_AFTER_S
    if anchor != "created_at" or not str(seconds).isascii() or not str(seconds).isdigit():
        text = "expires_after needs anchor created_at and whole seconds"
        raise ApiError(400, text, code="invalid_value", param="expires_after")
    if not shortest <= (value := int(str(seconds)[:12])) <= longest:
        text = f"expires_after[seconds] must be between {shortest} and {longest}"
        raise ApiError(400, text, code="invalid_value", param="expires_after")
    return value


def _video_json(medium: StoredMedium) -> dict[str, Any]:
    values: dict[str, Any] = {
        "id": medium.media_id,
        "object": "video",
        "url": FEATURE_SCHEME + medium.media_id,
        "modality": medium.modality,
        "duration_seconds": medium.duration_seconds,
        "num_frames": medium.num_frames,
        "num_tokens_per_frame": medium.num_tokens_per_frame,
    }
    if medium.pts_seconds is not None:
        values |= {"frame_seconds": medium.pts_seconds, "selected_frames": medium.selected}
    return values


def accepted(answer: T | Refusal) -> T:
    """Raises ApiError for a refusal."""
    if isinstance(answer, Refusal):
        raise ApiError.from_refusal(answer)
    return answer
