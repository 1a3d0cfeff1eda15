"""Bodies of requests: JSON, counted before it is parsed, and forms with a file."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from timeviper_platform.serving.gateway.chat_request import (
    count_values,
)
from timeviper_platform.serving.gateway.config import CurrentConfig, GatewayConfig
from timeviper_platform.serving.gateway.openai_protocol import ApiError

T = TypeVar("T")


class Bodies:
    def __init__(self, current: CurrentConfig) -> None:
        self._current = current
        self._parser = ThreadPoolExecutor(max_workers=1, thread_name_prefix="parse")
        """One thread, so that many large bodies are not in memory as Python objects at once."""

    async def parsed(self, request: Request, parse: Callable[[bytes], T]) -> T:
        body = await read_json(request, max_values=max_json_values(self._current.config))
        return await asyncio.get_running_loop().run_in_executor(self._parser, parse, body)


async def read_json(request: Request, *, max_values: int) -> bytes:
    """Returns the body. Drops one with too many values while it arrives.

    Raises:
        ApiError: 415 for other content types, which browsers let any page send; 400 for too many values.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, "send JSON with Content-Type: application/json", code="unsupported_media_type")
    chunks, num_values = [], 0
    async for chunk in request.stream():
        num_values += count_values(chunk)
        if num_values <= max_values:
            chunks.append(chunk)
        else:  # keeps reading, because a client that is still sending would not see the answer
            chunks.clear()
    if num_values > max_values:
        raise ApiError(400, f"the body holds more than {max_values} JSON values", code="too_many_values")
    return b"".join(chunks)


def max_json_values(config: GatewayConfig) -> int:
    """Commas and brackets of the largest useful body: each part has some, and a text may be all commas."""
    return 16 * config.max_parts_per_request + config.max_text_characters


@contextlib.asynccontextmanager
async def form_file(request: Request, name: str) -> AsyncIterator[tuple[FormData, UploadFile]]:
    """Yields a form and its file.

    Raises:
        ApiError: 415 for another content type, 400 for a form that cannot be read or has no such file.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(415, "send the file as multipart/form-data", code="unsupported_media_type")
    try:
        form = await request.form(max_files=1, max_fields=8)
    except (MultiPartException, HTTPException) as error:
        detail = getattr(error, "detail", None) or getattr(error, "message", "")
        raise ApiError(400, f"the form cannot be read: {detail}", code="invalid_form") from None
    try:
        file = form.get(name)
        if not isinstance(file, UploadFile):
            text = f"the form has no file named '{name}'"
            raise ApiError(400, text, code="missing_required_parameter", param=name)
        yield form, file
    finally:
        await form.close()
