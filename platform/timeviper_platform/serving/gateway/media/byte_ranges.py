"""A file's bytes as a response, whole or one range (RFC 9110, section 14)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Scope

from timeviper_platform.serving.gateway.openai_protocol import ApiError

IS_HEAD = "timeviper.is_head"
"""Key of a scope whose HEAD is routed as GET."""
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)


class UnsatisfiableRangeError(ValueError):
    """The range holds no byte of the file."""


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """Returns (start, stop) or raises UnsatisfiableRangeError; None = the whole file, as for several ranges."""
    found = None if header is None else _RANGE.fullmatch(header.strip().lower())
    if found is None or found.group(1) == found.group(2) == "":
        return None
    first, last = found.groups()
    if first == "":
        start, stop = max(0, size - int(last)), size
    else:
        start, stop = int(first), size if last == "" else min(size, int(last) + 1)
        if last and int(last) < start:
            return None
    if start >= stop:
        raise UnsatisfiableRangeError(f"bytes {header} of a file of {size} bytes")
    return start, stop


def is_head(scope: Scope) -> bool:
    return bool(scope.get(IS_HEAD))


def content_response(
    request: Request, read: Callable[[int, int], Iterator[bytes]], *, size: int, etag: str, headers: dict[str, str]
) -> Response:
    """Status 200, 206 or 416; `read` takes start and stop."""
    tag = f'"{etag}"'
    headers = {**headers, "Accept-Ranges": "bytes", "ETag": tag, "X-Content-Type-Options": "nosniff"}
    wants_range = request.headers.get("if-range", tag) == tag
    try:
        found = parse_range(request.headers.get("range") if wants_range else None, size)
    except UnsatisfiableRangeError:
        error = ApiError(416, f"the file has {size} bytes; name a range inside", code="invalid_range", param="Range")
        return JSONResponse(error.body(), 416, {"Content-Range": f"bytes */{size}"})
    start, stop = found or (0, size)
    headers["Content-Length"] = str(stop - start)
    if found is not None:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    status = 200 if found is None else 206
    if is_head(request.scope):  # players send it before they read
        return Response(None, status, headers, media_type="application/octet-stream")
    return StreamingResponse(read(start, stop), status, headers, media_type="application/octet-stream")
