"""Uploads and data: URIs: media types by signature, and a content-addressed store per tenant. Decodes nothing."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import shutil
import time
from dataclasses import asdict, dataclass
from typing import IO

from timeviper_platform.common.storage import exists, files_in, join_uri, read_json, remove, write_atomic, write_json
from timeviper_platform.data.media.signatures import HEAD_BYTES, may_be_animation, sniff_modality
from timeviper_platform.serving.gateway.openai_protocol import ApiError
from timeviper_platform.serving.messages import MediaBytes, Modality

FILE_ID = re.compile(r"file-[0-9a-f]{32}")
DATA_URI = re.compile(r"data:(?P<mime>[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[^;,]*)*;base64,", re.ASCII)
_CHUNK_BYTES = 1 << 20


def require_media(head: bytes, *, expected: Modality | None = None, param: str) -> Modality:
    """Returns the modality by signature. What may be an animation passes as either.

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


def parse_data_uri(uri: str, *, expected: Modality, param: str) -> MediaBytes:
    """Decodes a base64 data: URI.

    Raises:
        ApiError: 400 for invalid base64, 415 for an unsupported or unexpected type.
    """
    match = DATA_URI.match(uri)
    if match is None:
        raise ApiError(
            400, "a data: URI must have the form data:TYPE;base64,DATA", code="invalid_data_uri", param=param
        )
    try:
        data = base64.b64decode(uri[match.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, "the data: URI is not valid base64", code="invalid_data_uri", param=param) from None
    modality = require_media(data[:HEAD_BYTES], expected=expected, param=param)
    return MediaBytes(data=data, sha256=hashlib.sha256(data).hexdigest(), modality=modality)


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
        }


class MediaStore:
    """Uploads under a URI, by tenant and SHA-256. A file exists once its record is written."""

    def __init__(self, root: str) -> None:
        self._root = root

    def put(self, tenant: str, file: IO[bytes], *, filename: str, purpose: str) -> FileRecord:
        """Stores a seekable file. Known content keeps its first record.

        Raises:
            ApiError: 415 for an unsupported type.
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
        record = FileRecord(
            id=f"file-{sha256[:32]}",
            sha256=sha256,
            num_bytes=num_bytes,
            modality=modality,
            may_be_animation=may_be_animation(head),
            filename=_display_name(filename),
            purpose=purpose,
            created_at=int(time.time()),
        )
        if (known := self.get(tenant, record.id)) is not None:
            return known
        file.seek(0)
        write_atomic(self.uri(tenant, record), lambda target: shutil.copyfileobj(file, target, _CHUNK_BYTES))
        write_json(self._record_uri(tenant, record.id), asdict(record))
        return record

    def get(self, tenant: str, file_id: str) -> FileRecord | None:
        if FILE_ID.fullmatch(file_id) is None or not exists(self._record_uri(tenant, file_id)):
            return None
        return FileRecord(**read_json(self._record_uri(tenant, file_id)))

    def list(self, tenant: str) -> list[FileRecord]:
        """Returns the newest first."""
        records = [FileRecord(**read_json(uri)) for uri in files_in(join_uri(self._root, tenant), ".json")]
        return sorted(records, key=lambda record: (-record.created_at, record.id))

    def delete(self, tenant: str, file_id: str) -> bool:
        """Returns False for an unknown file."""
        record = self.get(tenant, file_id)
        if record is None:
            return False
        remove(self._record_uri(tenant, file_id))
        remove(self.uri(tenant, record))
        return True

    def uri(self, tenant: str, record: FileRecord) -> str:
        return join_uri(self._root, tenant, f"{record.sha256}.media")

    def _record_uri(self, tenant: str, file_id: str) -> str:
        return join_uri(self._root, tenant, f"{file_id}.json")


def no_such_file(param: str) -> ApiError:
    """`param` is the request's field with the id."""
    return ApiError(404, "no such file; upload it to /v1/files", code="file_not_found", param=param)


def _display_name(filename: str) -> str:
    name = filename.replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(char for char in name if char.isprintable())[:255] or "upload"
