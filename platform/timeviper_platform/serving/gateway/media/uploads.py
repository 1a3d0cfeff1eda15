"""Uploads and data: URIs: media types by signature, and a content-addressed store per tenant. Decodes nothing."""

from __future__ import annotations

import binascii
import contextlib
import hashlib
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import IO
from urllib.parse import unquote_to_bytes

from timeviper_platform.common.storage import (
    file_states,
    folders_in,
    join_uri,
    open_file,
    read_json,
    read_json_or_none,
    remove,
    split_uri,
    write_atomic,
    write_json,
)
from timeviper_platform.data.media.signatures import HEAD_BYTES, may_be_animation, sniff_modality
from timeviper_platform.serving.gateway.openai_protocol import ApiError
from timeviper_platform.serving.jobs.job_store import FOLDER as JOBS_FOLDER
from timeviper_platform.serving.messages import MediaBytes, MediaFrames, Modality

FILE_ID = re.compile(r"file-[0-9a-f]{32}")
DATA_SCHEME = "data:"
MAX_HEADER = 256
"""Characters of a data: URI before its comma."""
JOINED_FRAMES = ("video/jpeg", "video/mjpeg")
"""Types of comma-joined frames, as vLLM reads them."""
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
Inline = MediaBytes | MediaFrames
_CHUNK_BYTES = 1 << 20
MAX_PAGE = 10_000
"""Files per page, as in OpenAI's API."""


def require_media(head: bytes, *, expected: Modality | None = None, param: str) -> Modality:
    """Returns the modality by signature. A possible animation passes as either.

    Raises:
        ApiError: 415 for an unsupported or unexpected type.
    """
    modality = sniff_modality(head)
    if expected is not None and may_be_animation(head):
        return expected
    if modality is None or expected not in (None, modality):
        found = "neither a video nor a picture" if modality is None else f"a {modality.replace('image', 'picture')}"
        raise ApiError(
            415,
            f"the content is {found}; send a video as mp4, mov, matroska, webm, avi or mpegts,"
            " a picture as png, jpeg or webp, an animation as gif, webp or apng",
            code="unsupported_media_type",
            param=param,
        )
    return modality


def parse_data_uri(uri: str, *, expected: Modality | None, param: str, max_frames: int = 2048) -> Inline:
    """Decodes a data: URI (RFC 2397): base64, also folded or URL-safe, or percent-encoded.

    `data:video/jpeg;base64,FRAME,FRAME,...` is a video of JPEG frames. `expected` None = either modality.

    Raises:
        ApiError: 400 for an invalid URI, 415 for an unsupported or unexpected type.
    """
    header, comma, payload = uri.partition(",")
    kind, *options = header[len(DATA_SCHEME) : MAX_HEADER].lower().split(";")
    if not comma or len(header) > MAX_HEADER:
        raise _bad_data_uri("a data: URI must have the form data:TYPE;base64,DATA", param)
    is_base64 = "base64" in (option.strip() for option in options)
    if kind.strip() not in JOINED_FRAMES or not is_base64:
        return _inline(_from_base64(payload, param) if is_base64 else unquote_to_bytes(payload), expected, param)
    if (num_frames := payload.count(",") + 1) > max_frames:
        text = f"the video has {num_frames} frames, the limit is {max_frames}"
        raise ApiError(400, text, code="too_many_frames", param=param)
    if expected == "image":
        raise ApiError(415, "the content is a video, not a picture", code="unsupported_media_type", param=param)
    return MediaFrames.of([_inline(_from_base64(part, param), "image", param) for part in payload.split(",")])


def _inline(data: bytes, expected: Modality | None, param: str) -> MediaBytes:
    modality = require_media(data[:HEAD_BYTES], expected=expected, param=param)
    return MediaBytes(data=data, sha256=hashlib.sha256(data).hexdigest(), modality=modality)


def _from_base64(text: str, param: str) -> bytes:
    try:
        data = unquote_to_bytes(text) if "%" in text else text.encode("ascii")
        plain = data.translate(_URL_SAFE, delete=b" \t\r\n").rstrip(b"=")
        return binascii.a2b_base64(plain + b"=" * (-len(plain) % 4), strict_mode=True)
    except (binascii.Error, ValueError):
        raise _bad_data_uri("the data: URI is not valid base64", param) from None


def _bad_data_uri(message: str, param: str) -> ApiError:
    return ApiError(400, message, code="invalid_data_uri", param=param)


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    id: str
    """`file-` and the first half of the content's SHA-256."""
    sha256: str
    num_bytes: int
    modality: Modality
    filename: str
    """The client's name, for display only."""
    purpose: str
    created_at: int
    """Unix seconds."""
    may_be_animation: bool = False
    """True for pictures that requests may also call videos."""
    expires_at: int | None = None
    """Unix seconds."""

    def is_expired(self) -> bool:
        return self.expires_at is not None and self.expires_at <= time.time()

    def to_json(self) -> dict[str, object]:
        """Returns OpenAI's file object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.num_bytes,
            "created_at": self.created_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "expires_at": self.expires_at,
        }


class MediaStore:
    """Uploads under a URI, by tenant and SHA-256. A file exists once its record is written."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._known: dict[str, tuple[object, FileRecord]] = {}
        """Records by their file, with the file's state when it was read: what has not changed is not read again."""

    def put(
        self,
        tenant: str,
        file: IO[bytes],
        *,
        filename: str,
        purpose: str,
        expires_after_s: int | None = None,
        max_total_bytes: int | None = None,
    ) -> FileRecord:
        """Stores a seekable file. Known content keeps its id and takes the new name, purpose and age.

        Raises:
            ApiError: 415 for an unsupported type, 429 when all uploads would exceed `max_total_bytes`.
        """
        file.seek(0)
        head = file.read(HEAD_BYTES)
        modality = require_media(head, param="file")
        file.seek(0)
        digest = hashlib.sha256()
        num_bytes = 0
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            num_bytes += len(chunk)
        sha256 = digest.hexdigest()
        now = int(time.time())
        record = FileRecord(
            id=f"file-{sha256[:32]}",
            sha256=sha256,
            num_bytes=num_bytes,
            modality=modality,
            may_be_animation=may_be_animation(head),
            filename=display_name(filename),
            purpose=purpose,
            created_at=now,
            expires_at=None if expires_after_s is None else now + expires_after_s,
        )
        if self.get(tenant, record.id) is None:
            if max_total_bytes is not None:
                self.check_total(tenant, num_bytes, max_total_bytes)
            file.seek(0)
            write_atomic(self.uri(tenant, record), lambda target: shutil.copyfileobj(file, target, _CHUNK_BYTES))
        write_json(self._record_uri(tenant, record.id), asdict(record))
        return record

    def check_total(self, tenant: str, num_bytes: int, max_total_bytes: int, *, param: str = "file") -> None:
        """Raises ApiError 429 when a tenant's files, parts of uploads included, would exceed their quota."""
        filesystem, path = split_uri(join_uri(self._root, tenant))
        filesystem.invalidate_cache()  # other processes write here
        found = filesystem.find(path, detail=True)  # one listing instead of a read per record
        stored = sum(int(entry["size"]) for name, entry in found.items() if name.endswith((".media", ".part")))
        if stored + num_bytes > max_total_bytes:
            text = f"the uploads have {stored} of {max_total_bytes} bytes, and this one {num_bytes}; delete some files"
            raise ApiError(429, text, code="insufficient_quota", param=param)

    def get(self, tenant: str, file_id: str) -> FileRecord | None:
        if FILE_ID.fullmatch(file_id) is None:
            return None
        found = read_json_or_none(self._record_uri(tenant, file_id))
        record = None if found is None else FileRecord(**found)
        return None if record is None or record.is_expired() else record

    def list(self, tenant: str) -> list[FileRecord]:
        """Returns the newest first."""
        current = (record for record in self.records(tenant) if not record.is_expired())
        return sorted(current, key=lambda record: (-record.created_at, record.id))

    def records(self, tenant: str) -> Iterator[FileRecord]:
        """Yields all records, expired ones too."""
        folder = join_uri(self._root, tenant)
        states = file_states(folder, ".json")
        for gone in [uri for uri in self._known if uri.startswith(f"{folder}/") and uri not in states]:
            self._known.pop(gone, None)
        for uri, state in states.items():
            known = self._known.get(uri)
            if known is None or known[0] != state:
                try:
                    known = state, FileRecord(**read_json(uri))
                except FileNotFoundError:  # just deleted
                    continue
                self._known[uri] = known
            yield known[1]

    def tenants(self) -> Sequence[str]:
        """Returns the owners of files, that of downloads included."""
        names = [folder.rpartition("/")[2] for folder in folders_in(self._root)]
        return [name for name in names if name != JOBS_FOLDER]

    def read(self, tenant: str, record: FileRecord, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """Yields the content, or its bytes from `start` to `stop`, in chunks."""
        return read_chunks(self.uri(tenant, record), start, record.num_bytes if stop is None else stop)

    def delete(self, tenant: str, file_id: str) -> bool:
        """Returns False for an unknown file."""
        record = self.get(tenant, file_id)
        if record is not None:
            self.discard(tenant, record)
        return record is not None

    def discard(self, tenant: str, record: FileRecord) -> None:
        """Deletes a file, if it is still there."""
        for uri in (self._record_uri(tenant, record.id), self.uri(tenant, record)):
            with contextlib.suppress(FileNotFoundError):
                remove(uri)

    def delete_unrecorded(self, tenant: str, *, before: float) -> None:
        """Deletes contents without a record, and uploads in parts, that are older than Unix seconds."""
        filesystem, path = split_uri(join_uri(self._root, tenant))
        recorded = {split_uri(self.uri(tenant, record))[1] for record in self.records(tenant)}
        for name in filesystem.find(path):
            is_record = name.endswith(".json") and not name.endswith("/upload.json")
            if is_record or name in recorded or filesystem.modified(name).timestamp() >= before:
                continue
            with contextlib.suppress(FileNotFoundError):
                filesystem.rm_file(name)

    def uri(self, tenant: str, record: FileRecord) -> str:
        return join_uri(self._root, tenant, f"{record.sha256}.media")

    def _record_uri(self, tenant: str, file_id: str) -> str:
        return join_uri(self._root, tenant, f"{file_id}.json")


def read_chunks(uri: str, start: int, stop: int) -> Iterator[bytes]:
    with open_file(uri) as file:
        file.seek(start)
        while start < stop and (chunk := file.read(min(_CHUNK_BYTES, stop - start))):
            start += len(chunk)
            yield chunk


def page_of(records: Sequence[FileRecord], query: Mapping[str, str]) -> dict[str, object]:
    """Returns a page of OpenAI's list of files; `records` are the newest first.

    Raises:
        ApiError: 400 for an invalid `limit` or `order`.
    """
    limit, order = query.get("limit", str(MAX_PAGE)), query.get("order", "desc")
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= MAX_PAGE):
        raise ApiError(400, f"limit must be between 1 and {MAX_PAGE}", code="invalid_value", param="limit")
    if order not in ("asc", "desc"):
        raise ApiError(400, "order must be asc or desc", code="invalid_value", param="order")
    found = [record for record in records if query.get("purpose", record.purpose) == record.purpose]
    if order == "asc":
        found.reverse()
    ids = [record.id for record in found]
    if (after := query.get("after")) in ids:
        found = found[ids.index(after) + 1 :]
    shown = found[: int(limit[:9])]
    return {
        "object": "list",
        "data": [record.to_json() for record in shown],
        "first_id": shown[0].id if shown else None,
        "last_id": shown[-1].id if shown else None,
        "has_more": len(shown) < len(found),
    }


def no_such_file(param: str) -> ApiError:
    """`param` is the request's field with the id."""
    return ApiError(404, "no such file; upload it to /v1/files", code="file_not_found", param=param)


def display_name(filename: str) -> str:
    name = filename.replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(char for char in name if char.isprintable())[:255] or "upload"
